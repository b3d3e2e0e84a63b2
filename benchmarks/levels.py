"""`make bench-levels`: what the stronger levels cost while decoding, side by side in one run on SmolLM2-135M.

Each level is an export of its own behind a server of its own; the levels take turns, round after round. A ratio is the
median of the rounds' own ratios, with a bootstrap interval of 95 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode import STEPS, Stip
from benchmarks.plain import RESULTS, machine
from benchmarks.process import listening, run
from device_app.bundle import Bundle
from examples.smollm2 import smollm2_gguf

LEVELS = {
    "permutation": ("permutation", "cloud"),
    "rotation": ("rotation", "cloud"),
    "permutation, head on device": ("permutation", "device"),
    "rotation, head on device": ("rotation", "device"),
}


def main() -> None:
    """Runs all levels and writes the table and its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch), options.dtype, options.rounds, options.tokens)
    show(figures)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"levels-{options.dtype}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nwritten to benchmarks/results/{path.name}")


def measure(scratch: Path, dtype: str, rounds: int, tokens: int) -> dict[str, Any]:
    """Every figure of the table."""
    exports: dict[str, Any] = {}
    with ExitStack() as servers:
        columns: dict[str, Stip] = {}
        for number, (level, (scheme, head)) in enumerate(LEVELS.items()):
            out = scratch / str(number)
            command: list[str | Path] = [sys.executable, "-m", "export", "model", smollm2_gguf(), "--out", out]
            exported = run([*command, "--dtype", dtype, "--scheme", scheme, "--head", head, "--json"])
            exports[level] = {"seconds": exported.seconds, "check": json.loads(exported.stdout)["check"]}
            serve: list[str | Path] = [sys.executable, "-m", "cloud_backend", "serve", out / "cloud", "--port", "0"]
            url = servers.enter_context(listening(serve, log="stderr"))
            columns[level] = Stip(Bundle.open(out / "device"), url, tokens)
        for column in columns.values():
            column.run()  # warm up
        times: dict[str, list[float]] = {level: [] for level in LEVELS}
        work: dict[str, list[dict[str, float]]] = {level: [] for level in LEVELS}
        for turn in range(rounds):
            for level in _rotated(list(LEVELS), turn):
                times[level].append(statistics.median(columns[level].run()))
                spent = columns[level].counters.work_ns
                work[level].append({step: spent.get(step, 0) / 1e6 / tokens for step in (*STEPS, "classify")})
        traffic = {level: column.traffic() for level, column in columns.items()}
    first = times["permutation"]
    return {
        "machine": machine(),
        "dtype": dtype,
        "rounds": rounds,
        "tokens": tokens,
        "levels": {
            level: {
                "ms_per_token": _interval(times[level]),
                "against_permutation": _interval([one / other for one, other in zip(times[level], first, strict=True)]),
                "device_ms_per_token": _medians(work[level]),
                **traffic[level],
                "export": exports[level],
            }
            for level in LEVELS
        },
    }


def _rotated(levels: list[str], turn: int) -> list[str]:
    """Another level goes first each round, so that none always has the warm caches."""
    at = turn % len(levels)
    return levels[at:] + levels[:at]


def _interval(values: list[float]) -> dict[str, float]:
    """The median, and where 95 % of medians of resampled rounds lie."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return {"median": statistics.median(values), "low": float(low), "high": float(high)}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    steps = {step: statistics.median(one[step] for one in rounds) for step in rounds[0]}
    return steps | {"total": sum(steps.values())}


def show(figures: dict[str, Any]) -> None:
    """The table."""
    print(
        f"\nSmolLM2-135M, {figures['dtype']}, {figures['machine']['processor']}, "
        f"{figures['machine']['threads']} threads, {figures['rounds']} rounds of {figures['tokens']} tokens\n"
    )
    titles = f"{'level':<30}{'ms a token':>22}{'against permutation':>24}"
    print(titles + f"{'device ms':>11}{'classify':>10}{'B up':>7}{'B down':>8}")
    for level, row in figures["levels"].items():
        time, ratio, work = row["ms_per_token"], row["against_permutation"], row["device_ms_per_token"]
        print(
            f"{level:<30}{time['median']:>8.2f} ({time['low']:.2f}–{time['high']:.2f})"
            f"{ratio['median']:>10.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"
            f"{work['total']:>10.2f}{work['classify']:>10.2f}"
            f"{row['token_bytes_up']:>8.0f}{row['token_bytes_down']:>8.0f}"
        )


if __name__ == "__main__":
    main()
