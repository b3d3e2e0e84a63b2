"""A small load of real devices, in processes of their own, on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.device_process import Run, Wander
from benchmarks.fleet import Fleet
from tests.conftest import run_cloud

PROMPTS = ("Hello!", "Where are you?", "Goodbye.")


@pytest.fixture(scope="module")
def fleet(tiny: Path) -> Iterator[Fleet]:
    """Six devices in two processes."""
    with run_cloud(tiny) as cloud, Fleet(tiny / "device", cloud.url, 6, processes=2) as fleet:
        yield fleet


def test_every_device_of_a_run_makes_all_tokens_of_all_answers(fleet: Fleet) -> None:
    report = fleet.run(Run(devices=(0, 1, 4), tokens=8, prompts=PROMPTS, answers=2))
    assert report.errors == []
    assert sorted(timeline.device for timeline in report.timelines) == [0, 0, 1, 1, 4, 4]
    assert all(len(timeline.moments) == 8 for timeline in report.timelines)
    assert not any(vars(report.recoveries).values())


def test_answers_go_on_until_they_are_stopped(fleet: Fleet) -> None:
    fleet.start(Run(devices=(0, 1), tokens=200, prompts=PROMPTS, answers=10_000))
    report = fleet.stop()
    assert report.errors == []
    assert {timeline.device for timeline in report.timelines} == {0, 1}
    assert len(report.timelines) < 1000


def test_a_device_that_fails_is_told_of(fleet: Fleet) -> None:
    report = fleet.run(Run(devices=(2, 3), tokens=2, prompts=("too long for any context " * 20_000,)))
    assert len(report.errors) == 2
    assert all(error.startswith("RefusedError: prompt") for error in report.errors)


def test_a_wandering_activity_has_as_many_active_as_asked_for(fleet: Fleet) -> None:
    report = fleet.wander(Wander(active=2, seconds=1.5, tokens=4, turns=2, seed=1))
    assert report.errors == []
    assert len({timeline.device for timeline in report.timelines}) > 2
    changes = sorted(change for one in report.timelines for change in ((one.began, 1), (one.moments[-1], -1)))
    active = most = 0
    for _, change in changes:
        active += change
        most = max(most, active)
    assert most == 2
