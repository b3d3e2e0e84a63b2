"""What `make bench` says of the device app's start."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.startup import first_start, libraries_alone, measure, show
from tests.conftest import run_cloud


def test_a_start_is_timed_to_its_first_frame_and_weighed(tiny: Path) -> None:
    with run_cloud(tiny) as cloud:
        start = first_start(tiny / "device", cloud.url)
    assert 0.1 < start.first_frame_seconds < 60
    assert 0.1 < start.processor_seconds < 60
    assert 20 * 2**20 < start.resident_bytes <= start.peak_bytes < 250 * 2**20


def test_the_line_of_the_table_has_every_figure(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_cloud(tiny) as cloud:
        figures = measure(tiny / "device", cloud.url, starts=1)
    show(figures)
    assert figures["to_libraries"] * figures["libraries_seconds"] == pytest.approx(figures["first_frame_seconds"])
    line = capsys.readouterr().out
    assert line.startswith("(h) ")
    assert f"{figures['first_frame_seconds']:.2f} s" in line


def test_the_libraries_alone_can_be_timed() -> None:
    assert 0.05 < libraries_alone() < 60
