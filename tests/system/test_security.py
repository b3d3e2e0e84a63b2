"""SECURITY.md says what the stored audits found, and nothing else."""

from __future__ import annotations

import re

import pytest

from benchmarks.audit import ATTACKS as CHOSEN
from benchmarks.audit import BEGIN, END, LEVELS, SECURITY, stored, tables
from export.audit import blocks, images
from export.audit.report import SOUND
from export.audit.run import ATTACKS

REPORTS = stored()
TEXT = SECURITY.read_text(encoding="utf-8")
FIGURES = TEXT.partition(BEGIN)[2].partition(END)[0]


def share(level: str, name: str) -> float:
    return next(finding.recovered for finding in REPORTS[level].findings if finding.name == name) or 0.0


def test_the_tables_are_those_of_the_reports() -> None:
    assert tables(REPORTS) == FIGURES


def test_a_figure_that_was_edited_is_found() -> None:
    assert FIGURES.count("100 %") > 5
    assert tables(REPORTS) != FIGURES.replace("100 %", "99 %", 1)


def test_no_share_stands_outside_the_tables() -> None:
    assert not re.findall(r"\d\s?%", TEXT.replace(FIGURES, ""))


@pytest.mark.parametrize("level", LEVELS)
def test_every_attack_ran_at_every_level_and_its_control_succeeded(level: str) -> None:
    report = REPORTS[level]
    # SmolLM2 takes no images, and no level is quantised.
    elsewhere = {one.name for one in (*images.ATTACKS, *blocks.ATTACKS)}
    found = [finding.name for finding in report.findings if finding.name not in elsewhere]
    assert found == [one.name for one in CHOSEN.get(level, ATTACKS) if one.name not in elsewhere]
    assert all(finding.skipped or finding.control >= SOUND for finding in report.findings)
    assert (report.scheme, report.head, report.dtype) == LEVELS[level]


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_words_say_of_the_strongest_attackers(level: str) -> None:
    for name in ("table-gram", "known-prompt", "base-norms", "hidden-vocabulary"):
        assert share(level, name) >= 0.99, name


def test_what_is_known_of_permutation() -> None:
    assert share("permutation", "table-sorted-entries") >= 0.99
    assert share("permutation", "tied-head") == 1.0


@pytest.mark.parametrize("level", [level for level in LEVELS if level.startswith("rotation")])
def test_rotation_stops_sorted_look_ups_alone(level: str) -> None:
    assert share(level, "table-sorted-entries") <= 0.05


def test_an_audit_takes_less_than_ten_minutes_and_four_gibibytes() -> None:
    assert all(report.peak_memory_bytes < 4 * 2**30 for report in REPORTS.values())
    assert REPORTS["permutation"].seconds < 600
