"""`make bench-audit`: the audit at every level on SmolLM2-135M, and the tables that SECURITY.md shows of it.

Every figure in SECURITY.md is written here, between its two marks; `--tables` writes them again from the stored reports.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.plain import RESULTS
from benchmarks.process import run
from examples.smollm2 import smollm2_gguf
from export.audit.attack import Finding
from export.audit.report import Report, percent, read_json

SECURITY = Path(__file__).resolve().parent.parent / "SECURITY.md"
BEGIN, END = "<!-- figures: make bench-audit -->\n", "<!-- end of figures -->\n"
LEVELS = {  # column: scheme, head, dtype
    "permutation": ("permutation", "cloud", "float32"),
    "permutation, bf16": ("permutation", "cloud", "bfloat16"),
    "rotation": ("rotation", "cloud", "float32"),
    "rotation, bf16": ("rotation", "cloud", "bfloat16"),
    "rotation, head on device": ("rotation", "device", "float32"),
}


def main() -> None:
    """Audits every level, one process after another, stores the reports and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write SECURITY.md's tables from the stored reports")
    parser.add_argument("--level", action="append", choices=LEVELS, help="audit this level alone (repeatable)")
    options = parser.parse_args()
    if not options.tables:
        for level in options.level or LEVELS:
            audit(level)
    before, _, rest = SECURITY.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    SECURITY.write_text(before + BEGIN + tables(stored()) + END + after, encoding="utf-8")


def audit(level: str) -> None:
    """One export, attacked; its report goes to benchmarks/results."""
    scheme, head, dtype = LEVELS[level]
    options = ["--scheme", scheme, "--head", head, "--dtype", dtype, "--name", "audited"]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "smollm2"
        run([sys.executable, "-m", "export", "model", smollm2_gguf(), "--out", out, *options])
        run([sys.executable, "-m", "export", "audit", out, "--model", smollm2_gguf()])
        RESULTS.mkdir(exist_ok=True)
        path_of(level).write_bytes((out / "audit.json").read_bytes())


def path_of(level: str) -> Path:
    """Where a level's report is stored."""
    return RESULTS / f"audit-{'-'.join(LEVELS[level])}.json"


def stored() -> dict[str, Report]:
    """The stored reports, by level."""
    return {level: read_json(path_of(level).read_bytes()) for level in LEVELS}


def tables(reports: dict[str, Report]) -> str:
    """SECURITY.md between its marks."""
    return "\n".join([_machines(reports), *_attacks(reports), "", *_details(reports), ""])


def _machines(reports: dict[str, Report]) -> str:
    first = next(iter(reports.values()))
    longest = max(report.seconds for report in reports.values())
    most = max(report.peak_memory_bytes for report in reports.values())
    return (
        f"Model: SmolLM2-135M-Instruct. A share is what the attack recovered; the control, the same attack on the "
        f"unprotected model, is the lowest of all columns. {first.machine.processor}, {first.machine.threads} threads: "
        f"a whole audit took at most {longest / 60:.0f} min and {most / 2**30:.1f} GiB.\n"
    )


def _attacks(reports: dict[str, Report]) -> list[str]:
    names = [finding.name for finding in next(iter(reports.values())).findings]
    rows = [
        "| attack | beyond its own files and traffic the attacker knows | recovered are shares of | "
        + " | ".join(reports)
        + " | control |",
        "|---|---|---|" + "---:|" * (len(reports) + 1),
    ]
    for name in names:
        found = {level: _finding(report, name) for level, report in reports.items()}
        first = next(iter(found.values()))
        controls = [finding.control for finding in found.values() if finding.control is not None]
        cells = [percent(finding.recovered) for finding in found.values()]
        lowest = percent(min(controls)) if controls else "–"
        rows.append(f"| {first.title} | {first.knows} | {first.after} | {' | '.join(cells)} | {lowest} |")
    rows += ["", "– : does not apply, as that level gives the cloud no classifier."]
    return rows


def _finding(report: Report, name: str) -> Finding:
    return next(finding for finding in report.findings if finding.name == name)


def _details(reports: dict[str, Report]) -> list[str]:
    plain, turned = reports["permutation"], reports["rotation"]

    def figures(report: Report, name: str) -> dict[str, Any]:
        return _finding(report, name).figures

    return []
