"""The report's plots, as SVG to stand inside its page: no network, no script, colours from the page's style sheet.

Every plot is 330 units wide, so that its letters stay readable where it fills a phone.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from export.audit.attack import Finding
from export.audit.measures import TRANSFORMATIONS
from export.audit.report import Report, percent

WIDTH = 330  # units of the view box
# Colours that stand for the page's, which has others in the dark.
INK, MUTED = "#000100", "#000200"
SERIES = ("#000301", "#000302", "#000303", "#000304", "#000305")
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)
}
MARKERS, DASHES = "osD^v", ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))
SETTINGS: Any = {
    "svg.fonttype": "none",  # letters stay letters: sharp, small, readable aloud
    "svg.hashsalt": "stip-audit",  # the same report gives the same bytes
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    name: str
    title: str
    described: str  # for who cannot see it
    svg: str  # an <svg> element


def plots(report: Report) -> list[Plot]:
    """The plots that the report has figures for."""
    by_name = {finding.name: finding.figures for finding in report.findings if finding.figures}
    with matplotlib.rc_context(SETTINGS):
        drawn = [
            _recovered(report.findings),
            _strengths(by_name.get("base-fine-tuned", {})),
            _frequency(by_name.get("traffic-frequency", {})),
            _theft(by_name.get("theft-fine-tuning", {})),
            _noise(by_name.get("noise", {})),
            _entries(report.measures),
            _tokens(report.measures),
        ]
    return [plot for plot in drawn if plot is not None]


# --- the plots ---


def _recovered(findings: Sequence[Finding]) -> Plot | None:
    tried = [finding for finding in findings if finding.recovered is not None]
    if not tried:
        return None
    figure, axes = _figure(62 + 32 * len(tried))
    places = range(len(tried))
    axes.barh(places, [finding.recovered or 0.0 for finding in tried], height=0.36, color=SERIES[0], label="recovered")
    axes.plot(
        [float("nan") if finding.control is None else finding.control for finding in tried],
        places,
        linestyle="none",
        marker="D",
        markersize=6,
        markerfacecolor="none",
        markeredgewidth=1.6,
        color=SERIES[1],
        label="control, unprotected",
        clip_on=False,
    )
    for place, finding in enumerate(tried):
        label = textwrap.shorten(finding.title, 46, placeholder="…")
        axes.text(0, place - 0.26, label, va="bottom", fontsize=9.5)
        axes.text(1.0, place - 0.26, percent(finding.recovered), va="bottom", ha="right", fontsize=9.5)
    axes.set(xlim=(0, 1), ylim=(len(tried) - 0.6, -0.85), xticks=[0, 0.25, 0.5, 0.75, 1], yticks=[])
    axes.grid(False)
    axes.xaxis.set_major_formatter(lambda value, place: f"{100 * value:.0f} %")
    axes.spines["left"].set_color(MUTED)
    _legend(figure)
    described = "; ".join(f"{one.title}: {percent(one.recovered)}, control {percent(one.control)}" for one in tried)
    return _plot("recovered", "What each attack recovered", described, figure)


def _strengths(figures: Mapping[str, Any]) -> Plot | None:
    curves = figures.get("curves") or ({"recovered": figures["recovered"]} if "recovered" in figures else None)
    if not curves or "strengths" not in figures:
        return None
    figure, axes = _figure(240)
    _evenly_spaced(axes, figures["strengths"])
    for number, (label, shares) in enumerate(curves.items()):
        _line(axes, number, range(len(shares)), shares, label)
    _shares(axes)
    axes.set_xlabel("strength of fine-tuning")
    if len(curves) > 1:
        _legend(figure)
    described = _said("strength", figures["strengths"], {label: map(percent, one) for label, one in curves.items()})
    return _plot("fine-tuned", "Knowing the base of a fine-tuned model", described, figure)


def _frequency(figures: Mapping[str, Any]) -> Plot | None:
    if not {"tokens", "recovered"} <= figures.keys():
        return None
    figure, axes = _figure(230)
    _line(axes, 0, figures["tokens"], figures["recovered"], "recovered")
    _log_x(axes, figures["tokens"])
    _shares(axes)
    axes.set_xlabel("tokens of traffic seen")
    described = _said("tokens", figures["tokens"], {"recovered": map(percent, figures["recovered"])})
    return _plot("frequency", "Counting equal vectors in traffic", described, figure)


def _theft(figures: Mapping[str, Any]) -> Plot | None:
    if not figures.get("perplexity") or "steps" not in figures:
        return None
    figure, axes = _figure(250)
    for number, (label, values) in enumerate(figures["perplexity"].items()):
        _line(axes, number, figures["steps"][: len(values)], values, label)
    _log_y(axes)
    axes.set(xlabel="steps of training", ylabel="perplexity")
    _legend(figure)
    ends = {
        label: [f"{values[0]:.4g} to {values[-1]:.4g}"] for label, values in figures["perplexity"].items() if values
    }
    return _plot("theft", "Training what was stolen", _said("from the first step", ["to the last"], ends), figure)


def _noise(figures: Mapping[str, Any]) -> Plot | None:
    if not {"sigma", "recovered"} <= figures.keys():
        return None
    perplexity = figures.get("perplexity")
    figure, axes = _figure(330 if perplexity else 230, panels=2 if perplexity else 1)
    _evenly_spaced(axes, figures["sigma"])
    _line(axes, 0, range(len(figures["recovered"])), figures["recovered"], "recovered")
    _shares(axes)
    columns = {"recovered": map(percent, figures["recovered"])}
    lowest = axes
    if perplexity:
        lowest = figure.axes[1]
        _line(lowest, 1, range(len(perplexity)), perplexity, "perplexity")
        _log_y(lowest)
        lowest.set_ylabel("perplexity")
        columns["perplexity"] = map(_short, perplexity)
    lowest.set_xlabel("standard deviation of the noise")
    return _plot("noise", "Noise on what travels", _said("noise", figures["sigma"], columns), figure)


def _entries(measures: Mapping[str, Any]) -> Plot | None:
    curves = measures.get("entries", {}).get("szekely")
    if not curves:
        return None
    widths = measures["entries"]["widths"]
    figure, axes = _figure(290)
    for label, values in curves.items():
        _line(axes, list(TRANSFORMATIONS).index(label), widths, values, label)  # the same look in both plots
    published = measures.get("published")
    if published:
        points = (published["widths"], published["permutation"])
        axes.plot(*points, "x", color=INK, markersize=9, markeredgewidth=2, label="permutation, as published", zorder=5)
    _log_x(axes, widths)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, place: _short(value))
    axes.set_yticks([0.01, 0.03, 0.1, 0.3, 1])
    axes.yaxis.minorticks_off()
    axes.set(xlabel="hidden size", ylabel="distance correlation")
    _legend(figure)
    described = _said("hidden size", widths, {label: map(_short, values) for label, values in curves.items()})
    return _plot("entries", "The papers’ measure, entry by entry (their Figure 6b)", described, figure)


def _tokens(measures: Mapping[str, Any]) -> Plot | None:
    curves = measures.get("tokens", {}).get("corrected")
    if not curves:
        return None
    widths = measures["tokens"]["widths"]
    figure, axes = _figure(290)
    for label, values in curves.items():
        _line(axes, list(TRANSFORMATIONS).index(label), widths, values, label)  # the same look in both plots
    _log_x(axes, widths)
    axes.set(xlabel="hidden size", ylabel="distance correlation, corrected", ylim=(-0.03, 1.05))
    _legend(figure)
    described = _said("hidden size", widths, {label: map(_short, values) for label, values in curves.items()})
    return _plot("tokens", "The same measure, token by token", described, figure)


# --- their parts ---


def _figure(height: int, panels: int = 1) -> tuple[Figure, Axes]:
    """A figure and the first of its panels, which share their x axis."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)
    first: Axes = axes[0, 0]
    return figure, first


def _line(axes: Axes, number: int, x: Sequence[float], y: Sequence[float | None], label: str) -> None:
    values = [float("nan") if value is None else value for value in y]
    style = number % len(SERIES)
    axes.plot(x, values, color=SERIES[style], marker=MARKERS[style], linestyle=DASHES[style], label=label)


def _shares(axes: Axes) -> None:
    axes.set(ylim=(-0.03, 1.05), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="recovered")
    axes.yaxis.set_major_formatter(lambda value, place: f"{100 * value:.0f} %")


def _evenly_spaced(axes: Axes, values: Sequence[float]) -> None:
    """Ticks for values that may begin at 0 and grow by factors."""
    axes.set_xticks(range(len(values)), [_short(value) for value in values])


def _log_x(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(values, [_thousands(value) for value in values])
    axes.xaxis.minorticks_off()


def _log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, place: _short(value))
    axes.yaxis.set_minor_formatter(lambda value, place: "")


def _thousands(value: float) -> str:
    for size, letter in ((1_000_000, "M"), (10_000, "k")):
        if value >= size:
            return f"{value / (size if letter == 'M' else 1000):.3g}{letter}"
    return _short(value)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=9, columnspacing=1.2, handlelength=2.4)


def _said(what: str, values: Sequence[Any], columns: Mapping[str, Any]) -> str:
    """Curves in words: 'label: a, b, c, for what v, w, x'."""
    curves = "; ".join(f"{label}: {', '.join(map(str, column))}" for label, column in columns.items())
    return f"{curves}, for {what} {', '.join(map(str, values))}"


def _plot(name: str, title: str, described: str, figure: Figure) -> Plot:
    return Plot(name, title, f"{title}. {described}.", _svg(figure, name))


def _svg(figure: Figure, name: str) -> str:
    """The bare <svg> element: no prolog, metadata, style sheet or address; ids of its own; the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda one: f' id="{name}-{one[1]}"' if one[1] in wanted else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    height = round(figure.get_figheight() * 72)
    return f'<svg viewBox="0 0 {WIDTH} {height}" aria-hidden="true" focusable="false">{body}'
