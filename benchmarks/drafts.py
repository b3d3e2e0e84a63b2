"""`make bench-drafts`: answers with drafts against the same without, on SmolLM2-135M.

1. Identity, float32: the same ids at the same seed, with drafts and without, 40 prompts, greedy and sampled.
2. Speed, bfloat16: both sides through a delaying line at round trips of 0, 10, 50 and 250 ms, in turns, on prompts
   whose answers copy from them and on open chat. Ratios are of the same prompt on both sides; medians over prompts.
3. The first token of a prompt of 1,000 tokens at 10 Mbit/s up.

Every answer is an assistant's first: nothing is drafted from an earlier one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.draft_identity import identity
from benchmarks.plain import RESULTS, machine
from benchmarks.process import listening, run
from benchmarks.prompts import COPYING, OPEN, PROMPTS
from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.drafting import Drafting
from device_app.prompt import Prompt
from device_app.sampler import Sampling
from examples.smollm2 import smollm2_gguf

SETS = {"copying": COPYING, "open": OPEN}
GREEDY, WARM = Sampling(), Sampling(temperature=0.8, top_p=0.95, seed=1)
WITHOUT, WITH = Drafting(most=0), Drafting()
LONG_PROMPT, UP_MBIT, UP_ROUND_TRIP = 1000, 10, 50


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    round_trips: tuple[int, ...] = (0, 10, 50, 250)  # ms
    prompts: int = 6  # of each set
    fewer_prompts: int = 4  # where a round trip takes 100 ms or more, and sampled
    tokens: int = 112
    sampled_at: int = 50  # ms
    repeats: int = 2  # at the shortest round trip, where the ratio is nearest 1
    identical_prompts: int = 40
    identical_tokens: int = 32
    first_tokens: int = 5
    characters: int | None = None  # of each prompt


QUICK = Size(
    round_trips=(0, 10),
    prompts=1,
    fewer_prompts=1,
    tokens=6,
    sampled_at=10,
    repeats=1,
    identical_prompts=2,
    identical_tokens=6,
    first_tokens=1,
    characters=60,
)


@dataclass(frozen=True)
class Run:
    """One answer."""

    tokens: int
    tokens_a_second: float  # behind the first token
    round_trips: int
    drafted: int
    accepted: int
    bytes: int  # behind the first round trip

    @property
    def bytes_a_token(self) -> float:
        return self.bytes / max(1, self.tokens - 1)


def main() -> None:
    """Prints the table, writes its JSON, and fails if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few tokens of everything, to see that it runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        exact, fast = (Path(scratch) / dtype for dtype in ("float32", "bfloat16"))
        for out in (exact, fast):
            run([sys.executable, "-m", "export", "model", smollm2_gguf(), "--out", out, "--dtype", out.name])
        figures = measure(exact, fast, QUICK if options.quick else Size())
    show(figures)
    if options.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "drafts.json").write_text(json.dumps(figures, indent=2) + "\n")
    print("\nwritten to benchmarks/results/drafts.json")
    if failed := missed(figures):
        sys.exit("bench: error: " + "; ".join(failed))


def measure(exact: Path, fast: Path, size: Size) -> dict[str, Any]:
    """Every figure, of two exports of the same model: in float32, and as it is served."""
    figures: dict[str, Any] = {"machine": machine(), "size": asdict(size), "drafting": asdict(WITH)}
    with listening(_serve(exact), log="stderr") as url:
        prompts = [prompt[: size.characters] for prompt in (*PROMPTS, *COPYING, *OPEN)[: size.identical_prompts]]
        figures["identity"] = identity(
            Bundle.open(exact / "device"), url, prompts, size.identical_tokens, (GREEDY, WARM)
        )
    bundle = Bundle.open(fast / "device")
    with ExitStack() as stack:
        url = stack.enter_context(listening(_serve(fast), log="stderr"))
        _answer(bundle, url, OPEN[0][: size.characters], GREEDY, WITH, size.tokens)  # warm up
        rows = []
        for round_trip in size.round_trips:
            with _line(url, round_trip) as delayed:
                repeats = size.repeats if round_trip == min(size.round_trips) else 1
                rows += [_compared(bundle, delayed, GREEDY, size, repeats, round_trip, name) for name in SETS]
                if round_trip == size.sampled_at:
                    rows += [_compared(bundle, delayed, WARM, size, 1, round_trip, name) for name in SETS]
        figures["speed"] = rows
        with _line(url, UP_ROUND_TRIP, UP_MBIT) as thin:
            seconds = [_first_token(bundle, thin) for _ in range(size.first_tokens)]
        figures["first_token"] = {
            "prompt_tokens": min(LONG_PROMPT, bundle.manifest.context - 1),
            "up_mbit": UP_MBIT,
            "round_trip_ms": UP_ROUND_TRIP,
            "seconds": statistics.median(seconds),
        }
    return figures


def _serve(export: Path) -> list[str | Path]:
    return [sys.executable, "-m", "cloud_backend", "serve", export / "cloud", "--port", "0"]


def _line(url: str, round_trip: int, up: int | None = None) -> Any:
    command = [sys.executable, "-m", "benchmarks.delay", url.split("/")[-1], "--round-trip", str(round_trip)]
    return listening(command if up is None else [*command, "--up", str(up)])


def _answer(bundle: Bundle, address: str, prompt: str, sampling: Sampling, drafting: Drafting, tokens: int) -> Run:
    """One answer of an assistant of its own, to `tokens` or its end."""
    url = address if "://" in address else f"ws://{address}"
    with Assistant(bundle, Address(url), drafting=drafting) as assistant:
        answer = assistant.chat([{"role": "user", "content": prompt}], sampling=sampling, max_tokens=tokens)
        first = None
        for _ in answer:
            first = first or replace(answer.stats.counters)
    stats, counters = answer.stats, answer.stats.counters
    first = first or counters
    return Run(
        stats.tokens,
        stats.tokens_per_second,
        counters.round_trips,
        counters.drafted,
        counters.accepted,
        counters.bytes_up + counters.bytes_down - first.bytes_up - first.bytes_down,
    )


def _compared(
    bundle: Bundle, url: str, sampling: Sampling, size: Size, repeats: int, round_trip: int, name: str
) -> dict[str, Any]:
    """A line of the table: one set of prompts at one round trip, both sides in turns."""
    ratios, drafts, plains = [], [], []
    most = size.fewer_prompts if round_trip >= 100 or sampling.temperature else size.prompts
    for number, prompt in enumerate(SETS[name][:most]):
        pairs = []
        for turn in range(repeats):
            sides = (WITH, WITHOUT) if (number + turn) % 2 else (WITHOUT, WITH)
            runs = {
                side.most: _answer(
                    bundle, url, prompt[: size.characters], replace(sampling, seed=number), side, size.tokens
                )
                for side in sides
            }
            pairs.append((runs[WITH.most], runs[WITHOUT.most]))
        ratios.append(statistics.median(drafted.tokens_a_second / plain.tokens_a_second for drafted, plain in pairs))
        drafts.append(pairs[0][0])
        plains.append(pairs[0][1])
    low, high = median_interval(ratios)
    tokens = sum(one.tokens for one in drafts)
    return {
        "round_trip_ms": round_trip,
        "prompts": name,
        "sampled": sampling.temperature > 0,
        "answers": len(ratios),
        "tokens": tokens,
        "round_trips_a_token": sum(one.round_trips for one in drafts) / tokens,
        "drafted_a_token": sum(one.drafted for one in drafts) / tokens,
        "accepted_a_token": sum(one.accepted for one in drafts) / tokens,
        "bytes_a_token": statistics.median(one.bytes_a_token for one in drafts),
        "bytes_a_token_without": statistics.median(one.bytes_a_token for one in plains),
        "tokens_a_second": statistics.median(one.tokens_a_second for one in drafts),
        "tokens_a_second_without": statistics.median(one.tokens_a_second for one in plains),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of what `values` are drawn from with 95 %: by bootstrap, seeded."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return float(low), float(high)


def _first_token(bundle: Bundle, address: str) -> float:
    """Seconds to the first token of a long prompt, on a line that is open."""
    ids = bundle.tokenizer.encode(" ".join(COPYING) * 2)
    ids = (ids * (LONG_PROMPT // len(ids) + 1))[: min(LONG_PROMPT, bundle.manifest.context - 1)]
    with Assistant(bundle, Address(f"ws://{address}"), drafting=WITH) as assistant:
        assistant.context()
        return assistant.answer(Prompt(ids), max_tokens=1).finish().stats.first_token_seconds


def missed(figures: dict[str, Any]) -> list[str]:
    """Claims that do not hold."""
    failed = [
        f"identity ({'sampled' if one['sampled'] else 'greedy'}): {one['differing']} answers differ, "
        f"{one['excused']} by rounding"
        for one in figures["identity"]
        if one["differing"] > one["excused"]
    ]
    least = {("copying", 50): 1.8, ("copying", 250): 2.0, ("open", 50): 1.15, ("open", 250): 1.15}
    most_trips = {"copying": 0.4, "open": 0.8}
    for row in figures["speed"]:
        if row["sampled"]:
            continue
        name, round_trip = row["prompts"], row["round_trip_ms"]
        if row["round_trips_a_token"] > most_trips[name]:
            failed.append(f"{name} at {round_trip} ms: {row['round_trips_a_token']:.2f} round trips a token")
        if row["ratio"] < least.get((name, round_trip), 0.0):
            failed.append(f"{name} at {round_trip} ms: {row['ratio']:.2f} times as fast")
        if row["ratio_high"] < 1:
            failed.append(f"{name} at {round_trip} ms: slower with drafts")
        if (most := WITH.bytes_a_token) is not None and row["bytes_a_token"] > most:
            failed.append(f"{name} at {round_trip} ms: {row['bytes_a_token']:.0f} bytes a token, wanted {most}")
    return failed


def show(figures: dict[str, Any]) -> None:
    """The table."""
    for one in figures["identity"]:
        print(
            f"identity  {'sampled' if one['sampled'] else 'greedy':<8} {one['prompts']} prompts, {one['tokens']} "
            f"tokens, {one['accepted']} of {one['drafted']} drafted ones accepted: {one['differing']} answers differ, "
            f"of which {one['excused']} where the margin is below the numeric error"
        )
    print(
        f"\n{'round trip':<11}{'prompts':<18}{'trips/token':>12}{'drafted':>9}{'accepted':>9}{'KiB/token':>10}"
        f"{'without':>9}{'tokens/s':>10}{'without':>9}{'ratio':>7}   95 %"
    )
    for row in figures["speed"]:
        name = row["prompts"] + (", sampled" if row["sampled"] else "")
        print(
            f"{row['round_trip_ms']:>7} ms {name:<18}{row['round_trips_a_token']:>12.2f}{row['drafted_a_token']:>9.2f}"
            f"{row['accepted_a_token']:>9.2f}{row['bytes_a_token'] / 1024:>10.1f}"
            f"{row['bytes_a_token_without'] / 1024:>9.1f}{row['tokens_a_second']:>10.1f}"
            f"{row['tokens_a_second_without']:>9.1f}{row['ratio']:>7.2f}   "
            f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        )
    first = figures["first_token"]
    print(
        f"\nfirst token of a prompt of {first['prompt_tokens']} tokens at {first['up_mbit']} Mbit/s up and "
        f"{first['round_trip_ms']} ms: {first['seconds']:.2f} s"
    )


if __name__ == "__main__":
    main()
