"""The page: self-contained, without script, whatever the names in it, with a plot for each finding that has one."""

from __future__ import annotations

import re

import numpy as np
import pytest

from export.audit.page import page, tables
from export.audit.plots import plots
from export.audit.report import Report
from tests.export.audit.findings import CURVES, MEASURES, finding, report
from tests.export.audit.pages import Elements, assert_nothing_is_loaded_or_run

TITLES = {
    "base-fine-tuned": "Knowing the base of a fine-tuned model",
    "traffic-frequency": "Counting equal vectors in traffic",
    "theft-fine-tuning": "Training what was stolen",
    "noise": "Noise on what travels",
}


@pytest.fixture(scope="module")
def full() -> Report:
    return report(
        finding("sorted-lookup", 1.0),
        finding("failed", 0.2, 0.5),
        finding("skipped", None, None, skipped="no public model was given"),
        *(finding(name, 0.3, figures=figures) for name, figures in CURVES.items()),
        measures=MEASURES,
    )


@pytest.fixture(scope="module")
def shown(full: Report) -> str:
    return page(full)


def test_nothing_is_loaded_and_nothing_runs(shown: str) -> None:
    assert_nothing_is_loaded_or_run(shown)
    assert_nothing_is_loaded_or_run(page(report()))


def test_the_policy_forbids_the_rest(shown: str) -> None:
    policies = [attributes for _, attributes in Elements(shown).tags if attributes.get("http-equiv")]
    assert "default-src 'none'" in (policies[0]["content"] or "")


def test_ids_are_unique_and_every_reference_has_its_target(shown: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', shown)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', shown)) <= {(one, "") for one in ids} | {
        ("", one) for one in ids
    }


def test_hostile_names_stay_text() -> None:
    hostile = "</style><script>alert(1)</script>\"'><img src=x onerror=alert(1)> $x^$ http&colon;"
    curves = {"curves": {hostile: [1.0, 0.5], "two": [0.1, 0.2]}, "strengths": [0.1, 1.0]}
    shown = page(
        report(
            finding("base-fine-tuned", 0.5, 0.1, title=hostile, knows=hostile, after=hostile, figures=curves),
            finding("b", None, None, skipped=hostile),
            served_name=hostile,
            model=hostile,
        )
    )
    elements = Elements(shown)
    assert not {"script", "img"} & {tag for tag, _ in elements.tags}
    assert hostile in elements.text
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)


def test_the_same_report_gives_the_same_page(full: Report, shown: str) -> None:
    assert page(full) == shown


def test_each_plot_is_there_when_its_finding_is(full: Report, shown: str) -> None:
    assert [plot.name for plot in plots(full)] == [
        "recovered", "fine-tuned", "frequency", "theft", "noise", "entries", "tokens",
    ]  # fmt: skip
    assert all(title in shown for title in TITLES.values())
    assert shown.count("<svg") == 7


@pytest.mark.parametrize("name", CURVES)
def test_a_plot_without_its_finding_is_left_out(name: str) -> None:
    others = [finding(other, 0.3, figures=figures) for other, figures in CURVES.items() if other != name]
    shown = page(report(*others))
    assert TITLES[name] not in shown and shown.count("<svg") == 4


def test_a_finding_without_the_figures_of_its_plot_is_no_error() -> None:
    shown = page(report(*(finding(name, 0.3, figures={"more": 1}) for name in CURVES)))
    assert shown.count("<svg") == 1


def test_figures_may_be_numpys() -> None:
    figures = {"tokens": np.array([1000, 10_000]), "recovered": (np.float32(0.1), np.float64(0.2))}
    shown = page(report(finding("traffic-frequency", 0.3, figures=figures)))
    assert shown.count("<svg") == 2 and "10,000" in shown


def test_a_report_without_findings_is_still_a_page() -> None:
    shown = page(report())
    assert "None was carried out" in shown and "<svg" not in shown


def test_plots_are_described_for_who_cannot_see_them(shown: str) -> None:
    labels = [
        attributes["aria-label"] or "" for _, attributes in Elements(shown).tags if attributes.get("role") == "img"
    ]
    assert len(labels) == 7
    assert "Attack sorted-lookup: 100 %, control 100 %" in labels[0]


def test_table_headers_have_a_scope(shown: str) -> None:
    headers = [attributes for tag, attributes in Elements(shown).tags if tag == "th"]
    assert headers and all(attributes.get("scope") in ("col", "row") for attributes in headers)


def test_letters_of_plots_stay_letters_and_take_the_pages_colours(full: Report) -> None:
    svg = plots(full)[0].svg
    assert "Attack sorted-lookup" in svg and "var(--series-1)" in svg
    assert not re.search(r"#0003|font-family|<metadata|<style", svg)


def test_any_figures_become_tables() -> None:
    made = list(
        tables(
            {
                "share": 0.5,
                "sizes": [1, 2000],
                "curves": {"one": [0.25, None]},
                "rows": [{"name": "a", "value": 1}, {"name": "b"}],
                "deeper": {"count": 3, "list": [True]},
            }
        )
    )
    assert [(table.columns, table.rows) for table in made] == [
        (["what", "value"], [["share", "0.5"]]),
        (["name", "value"], [["a", "1"], ["b", "–"]]),
        (["sizes", "one"], [["1", "0.25"], ["2,000", "–"]]),
        (["what", "value"], [["count", "3"]]),
        (["list"], [["yes"]]),
    ]
