"""Many devices on the cloud of `make bench`: what batching gains, and what a long prompt costs the others.

(e) 16 devices together against one of them alone
(g) 15 devices that decode while another one's prompt of 2,000 tokens is prefilled, against the same 15 without it; and
    how long that prompt takes beside them, against the same on an idle server

Devices are in processes of their own, and share the processor with the server: that is part of the measure. Sides take
turns, round after round; a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.device_process import Report, Run
from benchmarks.fleet import PROCESSES, Fleet
from benchmarks.prompts import PROMPTS
from benchmarks.timelines import Timeline, during, outside, percentiles, together
from device_app.bundle import Bundle

DEVICES = 16
LONG_PROMPT = 2000  # tokens
SECONDS = 3.0  # of decoding without the long prompt, before it and after
ENDLESS = 4000  # tokens: more than are made until the devices are stopped, and fewer than the context has


def measure(folder: Path, url: str, rounds: int, tokens: int) -> dict[str, Any]:
    """All figures, for the results of `make bench`. folder: OUT/device."""
    prompt, length = long_prompt(Bundle.open(folder))
    with Fleet(folder, url, DEVICES) as many, Fleet(folder, url, 1) as other:
        measured = [(gain(many, tokens), _cost(many, other, prompt)) for _ in range(rounds)]
    gains, costs = zip(*measured, strict=True)
    return {
        "devices": DEVICES,
        "processes": PROCESSES,
        "cores": len(os.sched_getaffinity(0)),
        "together": _medians(gains),
        "long_prompt": {"tokens": length} | _medians(costs),
    }


def long_prompt(bundle: Bundle) -> tuple[str, int]:
    """The prompts, again and again, as many as LONG_PROMPT tokens hold, chat template included; and their tokens."""
    assert bundle.template is not None
    text, tokens = "", 0
    for prompt in itertools.cycle(PROMPTS):
        longer = f"{text}{prompt}\n"
        ids = bundle.tokenizer.encode(bundle.template.render([{"role": "user", "content": longer}]))
        if len(ids) > LONG_PROMPT:
            break
        text, tokens = longer, len(ids)
    return text, tokens


def gain(many: Fleet, tokens: int) -> dict[str, float]:
    """(e), of a fleet of so many DEVICES."""
    alone = together(_sound(many.run(Run(devices=(0,), tokens=tokens, prompts=PROMPTS))).timelines)
    began = time.monotonic()
    report = _sound(many.run(Run(devices=tuple(range(DEVICES)), tokens=tokens, prompts=PROMPTS)))
    seconds = time.monotonic() - began
    all_ran = together(report.timelines)
    return {
        "alone_tokens_per_second": alone.tokens_per_second,
        "tokens_per_second": all_ran.tokens_per_second,
        "ratio": all_ran.tokens_per_second / alone.tokens_per_second,
        "slowest_to_fastest": all_ran.slowest / all_ran.fastest,
        "jain": all_ran.jain,
        "driver_cores_used": report.cpu_seconds / seconds,
    }


def _cost(many: Fleet, other: Fleet, prompt: str) -> dict[str, float]:
    """(g)"""
    ask = Run(devices=(0,), tokens=1, prompts=(prompt,), fresh=True)
    [idle] = _sound(other.run(ask)).timelines
    many.start(Run(devices=tuple(range(DEVICES - 1)), tokens=ENDLESS, prompts=PROMPTS))
    time.sleep(SECONDS)
    [beside] = _sound(other.run(ask)).timelines
    time.sleep(SECONDS)
    decoding = _sound(many.stop()).timelines
    with_it, without = _latencies(decoding, beside)
    return {
        "token_p99_ms_without": without,
        "token_p99_ms_with": with_it,
        "token_p99_ratio": with_it / without,
        "first_token_ms_idle": 1000 * idle.first_token_seconds,
        "first_token_ms_beside": 1000 * beside.first_token_seconds,
        "first_token_ratio": beside.first_token_seconds / idle.first_token_seconds,
    }


def _latencies(decoding: list[Timeline], beside: Timeline) -> tuple[float, float]:
    """p99 of the time a token, in ms, while the prompt was prefilled and at all other times."""
    begin, end = beside.began, beside.moments[0]
    return percentiles(during(decoding, begin, end)).p99, percentiles(outside(decoding, begin, end)).p99


def _sound(report: Report) -> Report:
    """The report. Raises RuntimeError where a device failed, or had to begin again."""
    if report.errors or any(asdict(report.recoveries).values()):
        raise RuntimeError(f"devices: seen {report.errors or report.recoveries}, wanted answers without interruption")
    return report


def _medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def show(figures: dict[str, Any], against_generate: float) -> None:
    """The lines behind the table. against_generate: tokens/s of one device by those of generate()."""
    gain, cost = figures["together"], figures["long_prompt"]
    print(
        f"\n(e) {figures['devices']} devices together   {gain['tokens_per_second']:.1f} tokens/s, "
        f"{gain['ratio']:.2f} × the {gain['alone_tokens_per_second']:.1f} of one alone; slowest ÷ fastest "
        f"{gain['slowest_to_fastest']:.3f}, Jain's index {gain['jain']:.4f}; "
        f"the devices took {gain['driver_cores_used']:.2f} of {figures['cores']} cores"
    )
    print(f"(f) one device alone       {against_generate:.2f} × the tokens/s of generate()")
    print(
        f"(g) {figures['devices'] - 1} devices beside a prompt of {cost['tokens']} tokens: p99 a token "
        f"{cost['token_p99_ms_with']:.0f} ms, {cost['token_p99_ratio']:.2f} × the {cost['token_p99_ms_without']:.0f} ms"
    )
    print(
        f"    without it; the prompt's first token {cost['first_token_ms_beside']:.0f} ms, "
        f"{cost['first_token_ratio']:.2f} × the {cost['first_token_ms_idle']:.0f} ms on an idle server"
    )
    print(f"    the devices of (e) and (g) run in {figures['processes']} processes on the server's own cores")
