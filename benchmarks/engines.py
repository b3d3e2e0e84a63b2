"""`make bench-engines`: STIP on llama.cpp against llama.cpp's own token loop, and both beside the torch engine.

SmolLM2-135M with its weights in Q8_0 and in Q4_1. The unprotected file is fed token ids in this process; the protected
one, which has the same quantised values in another order, is served by `stip-cloud serve` and asked over a websocket:
with drafts, as devices do, and a token a round trip. The columns take turns, round after round; a ratio is the median
of the rounds' own. Then 16 devices together on each server, against one of them alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.decode import PROMPT
from benchmarks.fleet import Fleet
from benchmarks.plain import RESULTS, machine
from benchmarks.process import listening, run
from benchmarks.together import DEVICES, gain
from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.drafting import NO_DRAFTS, Drafting
from examples.plain_gguf import write_plain_gguf
from examples.plain_llama import PlainLlama
from examples.smollm2 import smollm2_gguf

TOGETHER_ROUNDS = 3
MESSAGES = [{"role": "user", "content": PROMPT}]


@dataclass(frozen=True)
class Column:
    """One way to an answer: its ids, and milliseconds a token behind the first."""

    name: str
    answer: Callable[[], tuple[list[int], float]]


def main() -> None:
    """Prints the table and writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        figures = measure(Path(scratch), stack, options.rounds, options.tokens)
    show(figures)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "engines.json").write_text(json.dumps(figures, indent=2) + "\n")
    print("\nwritten to benchmarks/results/engines.json")


def measure(scratch: Path, stack: ExitStack, rounds: int, tokens: int) -> dict[str, Any]:
    """Every figure. Servers end with the stack."""
    threads = len(os.sched_getaffinity(0))
    q8_0 = scratch / "q8_0.gguf"
    write_plain_gguf(smollm2_gguf(), q8_0, "q8_0")
    columns: list[Column] = []
    served: dict[str, tuple[Path, str]] = {}
    for name, plain in (("q8_0", q8_0), ("q4_1", smollm2_gguf())):
        out = _exported(plain, scratch / name, "--gguf", "source")
        bundle, url = Bundle.open(out / "device"), stack.enter_context(listening(_serve(out), log="stderr"))
        served[name] = out / "device", url
        columns += [
            Column(f"{name} own", _own(PlainLlama(plain, threads=threads), bundle, tokens)),
            Column(f"{name} STIP", _stip(bundle, url, tokens, Drafting())),
            Column(f"{name} STIP without drafts", _stip(bundle, url, tokens, NO_DRAFTS)),
        ]
    out = _exported(smollm2_gguf(), scratch / "torch", "--dtype", "bfloat16")
    url = stack.enter_context(listening(_serve(out), log="stderr"))
    served["torch bfloat16"] = out / "device", url
    bundle = Bundle.open(out / "device")
    columns += [
        Column("torch bfloat16 STIP", _stip(bundle, url, tokens, Drafting())),
        Column("torch bfloat16 STIP without drafts", _stip(bundle, url, tokens, NO_DRAFTS)),
    ]
    figures = _in_turns(columns, rounds) | {"together": {name: _together(*at, tokens) for name, at in served.items()}}
    return figures | {"machine": machine(), "rounds": rounds, "tokens": tokens, "threads": threads}


def _together(device: Path, url: str, tokens: int) -> dict[str, float]:
    """Medians of rounds: tokens a second of 16 devices, a token a round trip, and how many times those of one alone."""
    with Fleet(device, url, DEVICES) as many:
        rounds = [gain(many, tokens) for _ in range(TOGETHER_ROUNDS)]
    return {key: statistics.median(one[key] for one in rounds) for key in ("tokens_per_second", "ratio")}


def _in_turns(columns: Sequence[Column], rounds: int) -> dict[str, Any]:
    ids = {column.name: column.answer()[0] for column in columns}  # warm up
    times: dict[str, list[float]] = {column.name: [] for column in columns}
    for number in range(rounds):
        for column in columns if number % 2 else reversed(columns):
            times[column.name].append(column.answer()[1])

    def ratio(one: str, other: str) -> float:
        return statistics.median(x / y for x, y in zip(times[one], times[other], strict=True))

    return {
        "ms_per_token": {name: statistics.median(values) for name, values in times.items()},
        "llama.cpp": {
            name: {
                "ratio": ratio(f"{name} STIP", f"{name} own"),
                "without_drafts": ratio(f"{name} STIP without drafts", f"{name} own"),
                "of_torch": ratio(f"{name} STIP", "torch bfloat16 STIP"),
                "without_drafts_of_torch": ratio(f"{name} STIP without drafts", "torch bfloat16 STIP without drafts"),
                "same_first_ids": _same(ids[f"{name} STIP without drafts"], ids[f"{name} own"]),
            }
            for name in ("q8_0", "q4_1")
        },
    }


def _same(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many are the same before the first that is not."""
    return next((at for at, (x, y) in enumerate(zip(ids, others, strict=False)) if x != y), len(ids))


def _exported(model: Path, out: Path, *options: str) -> Path:
    run([sys.executable, "-m", "export", "model", model, "--out", out, *options])
    return out


def _serve(out: Path) -> list[str | Path]:
    return [sys.executable, "-m", "cloud_backend", "serve", out / "cloud", "--port", "0"]


def _own(loop: PlainLlama, bundle: Bundle, tokens: int) -> Callable[[], tuple[list[int], float]]:
    assert bundle.template is not None
    prompt = bundle.tokenizer.encode(bundle.template.render(MESSAGES))

    def answer() -> tuple[list[int], float]:
        continued = loop(prompt, tokens)
        return continued.ids, 1000 * statistics.mean(continued.seconds)

    return answer


def _stip(bundle: Bundle, url: str, tokens: int, drafting: Drafting) -> Callable[[], tuple[list[int], float]]:
    def answer() -> tuple[list[int], float]:
        moments: list[float] = []
        # An assistant of its own, as nothing is to be drafted from the same answer before.
        with Assistant(bundle, Address(url), drafting=drafting) as assistant:
            answer = assistant.chat(MESSAGES, max_tokens=tokens)
            for _ in answer:
                # A token inside a character shows with the next one; drafts that are accepted show together.
                moments += [time.perf_counter()] * (len(answer.ids) - len(moments))
        return answer.ids, 1000 * (moments[-1] - moments[0]) / (len(moments) - 1)

    return answer


def show(figures: dict[str, Any]) -> None:
    """The table."""
    print(
        f"\nSmolLM2-135M, {figures['machine']['processor']}, {figures['threads']} threads, {figures['rounds']} rounds\n"
    )
    for name, value in figures["ms_per_token"].items():
        print(f"{name:<36}{value:>8.2f} ms a token{1000 / value:>10.1f} tokens/s")
    for name, one in figures["llama.cpp"].items():
        print(
            f"\n{name}: the time a token of STIP is {one['ratio']:.3f} × that of llama.cpp's own loop, without drafts "
            f"{one['without_drafts']:.3f} ×;\n  {one['of_torch']:.3f} × that of STIP on torch, without drafts "
            f"{one['without_drafts_of_torch']:.3f} ×; the first {one['same_first_ids']} tokens are the same"
        )
    for name, one in figures["together"].items():
        print(
            f"\n16 devices on {name}: {one['tokens_per_second']:.0f} tokens/s, {one['ratio']:.1f} × one alone", end=""
        )
    print()


if __name__ == "__main__":
    main()
