"""Findings as attacks give them, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from export.audit.attack import Finding
from export.audit.report import Machine, Report

CURVES: dict[str, dict[str, Any]] = {
    "base-fine-tuned": {"strengths": [0.0, 0.01, 1.0], "curves": {"by norm": [1.0, 0.9, 0.1], "both": [1.0, 1.0, 0.3]}},
    "traffic-frequency": {"tokens": [1000, 100_000], "recovered": [0.01, 0.2]},
    "theft-fine-tuning": {"steps": [0, 10], "perplexity": {"original": [31.0, 21.0], "stolen": [5e4, 919.0]}},
    "noise": {"sigma": [0.0, 0.1], "recovered": [1.0, 0.2], "perplexity": [18.0, 40.0]},
}
MEASURES: dict[str, Any] = {
    "entries": {
        "widths": [128, 8192],
        "szekely": {"permutation": [0.15, 0.018]},
        "printed": {"permutation": [1.0, 1.0]},
    },
    "tokens": {"widths": [128, 8192], "corrected": {"permutation": [1.0, 1.0]}},
    "published": {"widths": [128, 8192], "permutation": [0.14, 0.017]},
    "parameters": [{"name": "lm_head.weight", "rows": 16, "szekely": 0.07}],
}


def finding(name: str, recovered: float | None, control: float | None = 1.0, **more: Any) -> Finding:
    """A finding with a sound control, unless told otherwise."""
    described = {"title": f"Attack {name}", "knows": "the embedding table", "after": "tokens", "source": "a paper"}
    return Finding(name=name, recovered=recovered, control=control, seconds=1.25, **described | more)


def report(*findings: Finding, measures: dict[str, Any] | None = None, **more: Any) -> Report:
    """A report on these findings."""
    described: dict[str, Any] = {
        "served_name": "car",
        "scheme": "permutation",
        "head": "cloud",
        "dtype": "float32",
        "model": "base",
        "machine": Machine(processor="a processor", threads=2, python="3.11", torch="2.13"),
        "seconds": 12.5,
        "peak_memory_bytes": 2**30,
    }
    return Report(**described | more, findings=findings, measures=measures or {})
