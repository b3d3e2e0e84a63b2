"""Figures of a load, on timelines that are worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.timelines import Timeline, during, outside, per_token, percentiles, together
from shared.errors import UsageError


def every(seconds: float, begin: float, tokens: int, device: int = 0) -> Timeline:
    """An answer whose tokens come at equal distances."""
    return Timeline(device, begin - 1, [begin + seconds * token for token in range(tokens)])


def test_devices_that_get_the_same_are_served_fairly() -> None:
    figures = together([every(0.5, 10, 21, device) for device in range(4)])
    assert (figures.seconds, figures.tokens, figures.tokens_per_second) == (10, 80, 8)
    assert figures.slowest == figures.fastest == 2
    assert figures.jain == 1


def test_throughput_counts_only_the_time_all_ran() -> None:
    early, late = every(1, 0, 11, 0), every(1, 6, 11, 1)  # together from 6 to 10
    figures = together([early, late])
    assert (figures.seconds, figures.tokens) == (4, 8)


def test_one_that_gets_all_has_the_least_fairness() -> None:
    busy, starved = every(1, 0, 101, 0), Timeline(1, 0, [0, 100])
    figures = together([busy, starved])
    assert figures.slowest / figures.fastest == 0.01
    assert figures.jain == pytest.approx(101**2 / (2 * (100**2 + 1)))


def test_several_answers_of_a_device_are_one_run() -> None:
    figures = together([every(1, 0, 5, 0), every(1, 10, 5, 0), every(1, 0, 15, 1)])
    assert (figures.seconds, figures.tokens) == (14, 9 + 14)


def test_devices_that_never_ran_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="never did all 2 run"):
        together([every(1, 0, 3, 0), every(1, 50, 3, 1)])


def test_waiting_for_the_prompt_is_no_time_of_a_token() -> None:
    timeline = Timeline(0, 0, [5, 6, 8])
    assert timeline.first_token_seconds == 5
    assert per_token([timeline]) == [1, 2]


def test_percentiles_are_in_milliseconds() -> None:
    figures = percentiles(value / 1000 for value in range(101))
    assert (figures.p50, figures.p95, figures.p99) == pytest.approx((50, 95, 99))


def test_a_stall_belongs_to_what_it_overlaps() -> None:
    stalled = Timeline(0, 0, [1, 2, 3, 9, 10, 11])
    late = Timeline(1, 0, [2, 3, 9, 10, 11])  # before its first token not all ran
    assert during([stalled, late], 4, 8) == [6, 6]
    assert outside([stalled, late], 4, 8) == [1, 1, 1, 1, 1, 1]
