"""The report as one self-contained page: its plots and tables inside it, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from export.audit.attack import Finding
from export.audit.plots import Plot, plots
from export.audit.report import (
    BROKEN,
    LEAKS,
    SOUND,
    Report,
    audited,
    percent,
    read_json,
    summary,
    to_json,
    verdict,
    warnings,
)

TEMPLATE = Path(__file__).with_name("report.html.jinja")
# The page may hold what others wrote (names, figures), so it may load and run nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Table:
    """Figures as text."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """Plots and tables that belong together."""

    title: str
    plots: list[Plot]
    tables: list[Table]


def page(report: Report) -> str:
    """The report as HTML."""
    report = read_json(to_json(report))  # numpy's arrays and tuples become lists
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, verdict=verdict)
    drawn = {plot.name: plot for plot in plots(report)}
    return environment.from_string(TEMPLATE.read_text()).render(
        report=report,
        policy=POLICY,
        audited=audited(report),
        summary=[sentence.replace(" %", "\N{NO-BREAK SPACE}%") for sentence in summary(report)],
        warnings=warnings(report),
        recovered=drawn.get("recovered"),
        findings=_findings(report, drawn),
        measures=_measures(report.measures, drawn),
        broken=percent(BROKEN),
        leaks=percent(LEAKS),
        sound=percent(SOUND),
        memory=f"{report.peak_memory_bytes / 2**30:.2f} GiB",
    )


PLOTS = {  # of a finding, by its name
    "base-fine-tuned": "fine-tuned",
    "traffic-frequency": "frequency",
    "theft-fine-tuning": "theft",
    "noise": "noise",
}


def _findings(report: Report, drawn: Mapping[str, Plot]) -> list[Section]:
    """A section for each finding with more to show than its share."""
    return [
        Section(finding.title, _chosen(drawn, PLOTS.get(finding.name, "")), list(tables(finding.figures)))
        for finding in report.findings
        if _has_more(finding)
    ]


def _has_more(finding: Finding) -> bool:
    return finding.recovered is not None and bool(finding.figures)


def _measures(measures: Mapping[str, Any], drawn: Mapping[str, Plot]) -> Section | None:
    if not measures:
        return None
    return Section("The papers’ own measure", _chosen(drawn, "entries", "tokens"), list(tables(measures)))


def _chosen(drawn: Mapping[str, Plot], *names: str) -> list[Plot]:
    return [drawn[name] for name in names if name in drawn]


# --- any figures as tables ---


def tables(figures: Mapping[str, Any], caption: str = "") -> Iterator[Table]:
    """Lists of one length stand side by side, dictionaries in a list are rows, single values come first."""
    single = [[_words(name), _text(value)] for name, value in figures.items() if not isinstance(value, dict | list)]
    if single:
        yield Table(caption, ["what", "value"], single)
    by_length: dict[int, dict[str, list[Any]]] = {}
    for name, values in _lists(figures):
        if values and all(isinstance(value, dict) for value in values):
            columns = list(dict.fromkeys(column for value in values for column in value))
            rows = [[_text(value.get(column)) for column in columns] for value in values]
            yield Table(_words(name), [_words(column) for column in columns], rows)
        elif values:
            by_length.setdefault(len(values), {})[name] = values
    for beside in by_length.values():
        rows = [[_text(value) for value in row] for row in zip(*beside.values(), strict=True)]
        yield Table(caption, [_words(name) for name in beside], rows)
    for name, value in figures.items():
        if isinstance(value, dict) and any(not isinstance(one, list) for one in value.values()):
            yield from tables(value, _words(name))


def _lists(figures: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """The lists of a dictionary, and those in dictionaries that hold nothing else."""
    for name, value in figures.items():
        if isinstance(value, list):
            yield name, value
        elif isinstance(value, dict) and all(isinstance(one, list) for one in value.values()):
            for label, values in value.items():
                yield label if name == "curves" else f"{name}: {label}", values


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
