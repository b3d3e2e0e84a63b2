"""The report of an audit: what was audited, on what, what each attack got; as JSON and as a table for a terminal."""

from __future__ import annotations

import platform
import resource
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from export.audit.attack import Finding
from export.audit.scene import Scene
from shared.errors import AuditError
from shared.manifest import DeviceManifest, Kind

FORMAT: Literal["stip-audit-1"] = "stip-audit-1"
SOUND = 0.99  # what an attack must get where nothing protects, or its figure says nothing
BROKEN, LEAKS = 0.5, 0.05  # shares from which on we say so
Verdict = Literal["broken", "leaks", "holds", "control failed", "not tried"]
LIMIT = (
    "These are the attacks we know and ran, on this export and one text: somebody may have a better one, "
    "and “holds” means no more than that."
)

WIDTHS = {"attack": 36, "the attacker knows": 30, "recovered": 9, "control": 8, "seconds": 8, "verdict": 14}
NUMBERS = ("recovered", "control", "seconds")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit ran on."""

    processor: str
    threads: int
    python: str
    torch: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that an audit found. Holds no path and no key, and of text only what a fixed public prompt gave."""

    format: Literal["stip-audit-1"] = FORMAT
    served_name: str
    kind: Kind = "decoder"
    scheme: str
    head: Literal["cloud", "device"]
    dtype: str  # of what travels
    quantisation: str | None = None  # what the cloud's matrices are in a GGUF file, mostly; None for safetensors
    model: str | None  # its last component alone; None where no public model was given
    machine: Machine
    seconds: float  # of the whole audit
    peak_memory_bytes: int  # resident, of the process
    check: dict[str, Any] = {}  # the equivalence check that ended the export
    findings: tuple[Finding, ...]
    measures: dict[str, Any] = {}


def make_report(
    scene: Scene,
    findings: Iterable[Finding],
    measures: dict[str, Any],
    *,
    manifest: DeviceManifest,
    model: str | None,
    seconds: float,
) -> Report:
    """The report on a scene. `model` is what the command line gave: a hub id, folder or file."""
    return Report(
        served_name=manifest.served_name,
        kind=manifest.kind,
        check=manifest.check,
        scheme=scene.target.scheme,
        head=scene.target.head,
        dtype=str(scene.target.dtype).removeprefix("torch."),
        quantisation=scene.quantisation,
        model=None if model is None else last_component(model),
        machine=machine(),
        seconds=round(seconds, 1),
        peak_memory_bytes=peak_memory(),
        findings=tuple(findings),
        measures=measures,
    )


def last_component(model: str) -> str:
    """A model's name without the folders or the owner before it, which are nobody's business."""
    return Path(model).name or Path(model).resolve().name


def machine() -> Machine:
    """This machine."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return Machine(
        processor=processor,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=str(torch.__version__),
    )


def peak_memory() -> int:
    """The most bytes this process has held at once."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- JSON ---


def to_json(report: Report) -> bytes:
    """The report as JSON; numpy's numbers and arrays become plain ones, NaN becomes null."""
    return msgspec.json.format(msgspec.json.encode(report, enc_hook=_plain), indent=2) + b"\n"


def read_json(data: bytes) -> Report:
    """A report that `to_json` wrote. Raises AuditError."""
    try:
        return msgspec.json.decode(data, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AuditError(f"not a report of an audit in format {FORMAT}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"figures: seen a {type(value).__name__}, wanted numbers, text, lists or arrays")


# --- what the figures mean ---


def sound(finding: Finding) -> bool:
    """Whether the attack worked where nothing protects. If not, what it got elsewhere says nothing."""
    return finding.control is not None and finding.control >= SOUND


def verdict(finding: Finding) -> Verdict:
    """One finding in a word or two."""
    if finding.recovered is None:
        return "not tried"
    if not sound(finding):
        return "control failed"
    return "broken" if finding.recovered >= BROKEN else "leaks" if finding.recovered >= LEAKS else "holds"


def percent(share: float | None) -> str:
    """A share as a percentage to one decimal: 100 % for 1.0 alone, and 0.0 % for 0.0 alone."""
    if share is None or share != share:
        return "–"
    if share >= 1.0:
        return "100 %"
    if share >= 0.9995:
        return "99.9 %"
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def audited(report: Report) -> str:
    """What was audited, in one line."""
    place = f", classifier {'in the cloud' if report.head == 'cloud' else 'on the device'}"
    if report.kind in ("encoder", "image-encoder"):
        place = f", {report.kind}"
    against = f"against the public model {report.model}" if report.model else "no public model given"
    values = report.dtype if report.quantisation is None else f"{report.dtype}, weights {report.quantisation} (GGUF)"
    return f"{report.served_name}: scheme {report.scheme}{place}, {values}; {against}"


def summary(report: Report) -> list[str]:
    """In plain sentences: who breaks the export and whom it leaks to; last, what that is worth.

    Nothing is said to hold: who fails with one attack may take another with the same knowledge.
    """
    openings: dict[Verdict, str] = {
        "broken": "Broken by one who knows",
        "leaks": "Leaks to one who knows",
    }
    strongest = _strongest(report.findings)
    sentences = [
        f"{opening} {finding.knows}: {percent(finding.recovered)} of {finding.after} ({finding.title})."
        for word, opening in openings.items()
        for finding in strongest
        if verdict(finding) == word
    ]
    return [*(sentences or ["No attack ran whose control succeeded: this report says nothing."]), LIMIT]


def _strongest(findings: Iterable[Finding]) -> list[Finding]:
    """Of the sound attacks by those who know the same and are after the same, the one that got most, in their order."""
    best: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        if finding.recovered is not None and sound(finding):
            known = best.get((finding.knows, finding.after))
            if known is None or (known.recovered or 0.0) < finding.recovered:
                best[finding.knows, finding.after] = finding
    return list(best.values())


def warnings(report: Report) -> list[str]:
    """A line for each attack whose control failed."""
    return [
        f"WARNING {finding.title}: control failed ({percent(finding.control)}): this figure says nothing"
        for finding in report.findings
        if verdict(finding) == "control failed"
    ]


# --- the terminal ---


def table(report: Report) -> str:
    """The report for a terminal, at most 120 columns wide."""
    lines = [*textwrap.wrap(audited(report), 118), "", _row({name: [name] for name in WIDTHS})]
    lines.append("  ".join("─" * width for width in WIDTHS.values()))
    for finding in report.findings:
        lines += _finding_rows(finding)
    for paragraphs in (warnings(report), summary(report)):
        lines.append("")
        for paragraph in paragraphs:
            lines += textwrap.wrap(paragraph, 118, subsequent_indent="  ")
    lines += ["", _cost(report)]
    return "\n".join(_printable(line) for line in lines)


def _cost(report: Report) -> str:
    where = report.machine
    memory = report.peak_memory_bytes / 2**30
    return f"{report.seconds:.0f} s on {where.threads} threads of {where.processor}; at most {memory:.2f} GiB"


def _finding_rows(finding: Finding) -> list[str]:
    cells: dict[str, list[str]] = {
        "attack": textwrap.wrap(finding.title, WIDTHS["attack"]),
        "the attacker knows": textwrap.wrap(finding.knows, WIDTHS["the attacker knows"]),
        "recovered": [percent(finding.recovered)],
        "control": [percent(finding.control)],
        "seconds": ["–" if finding.recovered is None else f"{finding.seconds:.1f}"],
        "verdict": [verdict(finding)],
    }
    rows = [_row(cells)]
    if finding.skipped:
        rows += textwrap.wrap(finding.skipped, 110, initial_indent="  – ", subsequent_indent="    ")
    return rows


def _row(cells: dict[str, list[str]]) -> str:
    """Cells of several lines side by side."""
    lines = []
    for number in range(max(1, *map(len, cells.values()))):
        texts = {name: cell[number] if number < len(cell) else "" for name, cell in cells.items()}
        padded = [
            f"{text:>{WIDTHS[name]}}" if name in NUMBERS else f"{text:<{WIDTHS[name]}}" for name, text in texts.items()
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Names come from files that somebody else wrote: nothing in them may steer a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)
