"""The measure of drafts runs, on a tiny model."""

from __future__ import annotations

from pathlib import Path

from benchmarks.drafts import QUICK, measure, median_interval, missed, show


def test_every_figure_is_there(tiny: Path) -> None:
    figures = measure(tiny, tiny, QUICK)
    show(figures)
    assert not [claim for claim in missed(figures) if claim.startswith("identity")]
    assert {(row["round_trip_ms"], row["prompts"], row["sampled"]) for row in figures["speed"]} == {
        (round_trip, name, sampled)
        for round_trip, name, sampled in (
            (0, "copying", False),
            (0, "open", False),
            (10, "copying", False),
            (10, "open", False),
            (10, "copying", True),
            (10, "open", True),
        )
    }
    for row in figures["speed"]:
        assert 0 < row["round_trips_a_token"] <= 1
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_the_interval_of_a_median_holds_it() -> None:
    low, high = median_interval([1.0, 1.1, 1.2, 1.3, 5.0])
    assert 1.0 <= low <= 1.2 <= high <= 5.0
