"""`python -m benchmarks.load`: many devices at once on one cloud. Throughput, latencies, fairness, the server's memory.

Devices are real: assistants with prompts, sampling and sockets of their own, in a few processes with a thread each.
Answers go on past their end, so that all have the tokens asked for. Connecting and a first answer are not counted.
What all prompts begin with (the chat template's system prompt) the cloud holds from before.

Without --url it exports SmolLM2-135M and serves it. The devices then share the processor with the server: that is part
of the measure, and so is said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.device_process import Report, Run
from benchmarks.fleet import PROCESSES, Fleet
from benchmarks.plain import machine
from benchmarks.process import Server, run, serving
from benchmarks.prompts import PROMPTS
from benchmarks.timelines import per_token, percentiles, together
from benchmarks.watch import Watch
from examples.smollm2 import smollm2_gguf
from shared.errors import StipError


def main() -> None:
    """Prints the figures, and fails if a device had an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=3, help="of each device (default: %(default)s)")
    parser.add_argument(
        "--stagger", type=float, default=0.1, metavar="S", help="from one device's start to the next one's"
    )
    parser.add_argument("--processes", type=int, default=PROCESSES, help="that the devices run in")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the served export")
    parser.add_argument("--kv-bytes", metavar="BYTES", help="of the served export's KV cache, as stip-cloud takes it")
    parser.add_argument("--url", help="of a cloud that is there already; give --bundle too, and STIP_TOKEN if it asks")
    parser.add_argument("--bundle", type=Path, metavar="OUT/device", help="the device half of what --url serves")
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    if (options.url is None) != (options.bundle is None):
        parser.error("--url and --bundle: seen one alone, wanted both or none")
    if min(options.devices, options.tokens - 1, options.answers, options.processes) < 1 or options.stagger < 0:
        parser.error("wanted at least 1 device, 2 tokens, 1 answer, 1 process, and a stagger of at least 0")
    try:
        if options.url is not None:
            figures = measure(options.bundle, options.url, options)
        else:
            limits = ["--kv-bytes", options.kv_bytes] if options.kv_bytes else []
            with smollm2(options.dtype, *limits) as (bundle, server):
                figures = measure(bundle, server.address, options, server)
    except (RuntimeError, StipError) as error:
        sys.exit(f"load: error: {error}")
    print(json.dumps(figures, indent=2)) if options.json else show(figures)
    if figures["errors"]:
        sys.exit(f"load: error: {len(figures['errors'])} devices failed, the first with {figures['errors'][0]}")


@contextmanager
def smollm2(dtype: str, *limits: str) -> Iterator[tuple[Path, Server]]:
    """SmolLM2-135M, exported and served with further options of `stip-cloud serve`: its device half, and the server."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "smollm2"
        run([sys.executable, "-m", "export", "model", smollm2_gguf(), "--out", out, "--dtype", dtype])
        serve: list[str | Path] = [sys.executable, "-m", "cloud_backend", "serve", out / "cloud", "--port", "0"]
        with serving([*serve, *limits], log="stderr") as server:
            yield out / "device", server


def measure(bundle: Path, url: str, options: argparse.Namespace, server: Server | None = None) -> dict[str, Any]:
    """Every figure; the server's only where it is a process of this machine that we started."""
    order = Run(
        devices=tuple(range(options.devices)),
        tokens=options.tokens,
        prompts=PROMPTS,
        answers=options.answers,
        stagger=options.stagger,
    )
    with ExitStack() as stack:
        watch = stack.enter_context(Watch(server.pid)) if server is not None else None
        fleet = stack.enter_context(Fleet(bundle, url, options.devices, options.processes))
        began, used = time.monotonic(), watch.cpu_seconds if watch else 0.0
        report = fleet.run(order)
        seconds = time.monotonic() - began
        cores = {"driver": report.cpu_seconds / seconds}
        memory = {}
        if watch is not None:
            cores["server"] = (watch.cpu_seconds - used) / seconds
            memory = {"now": watch.memory_now, "peak": watch.memory_peak}
    return {
        "machine": machine(),
        "model": f"SmolLM2-135M, {options.dtype}" if server is not None else url,
        "devices": options.devices,
        "processes": min(options.processes, options.devices),
        "answers": options.answers,
        "tokens": options.tokens,
        **figures_of(report),
        "memory_beyond_ready_bytes": memory,
        "cores_used": cores,
        "cores": len(os.sched_getaffinity(0)),
    }


def figures_of(report: Report) -> dict[str, Any]:
    """What the devices saw. Without a figure where none of them has an answer."""
    figures: dict[str, Any] = {"recoveries": asdict(report.recoveries), "errors": report.errors}
    if report.errors:
        return figures
    return figures | {
        "together": asdict(together(report.timelines)),
        "first_token_ms": asdict(percentiles(timeline.first_token_seconds for timeline in report.timelines)),
        "token_ms": asdict(percentiles(per_token(report.timelines))),
    }


def show(figures: dict[str, Any]) -> None:
    """The figures as lines."""
    print(
        f"\n{figures['devices']} devices in {figures['processes']} processes, {figures['answers']} answers of "
        f"{figures['tokens']} tokens each, {figures['model']}, {figures['machine']['processor']}\n"
    )
    if "together" in figures:
        all_ran = figures["together"]
        print(
            f"throughput    {all_ran['tokens_per_second']:.1f} tokens/s over the {all_ran['seconds']:.1f} s in which "
            f"all devices ran"
        )
        for title, key in (("first token", "first_token_ms"), ("per token", "token_ms")):
            print(f"{title:<14}" + "   ".join(f"{name} {value:.1f} ms" for name, value in figures[key].items()))
        print(
            f"fairness      a device got {all_ran['slowest']:.2f} to {all_ran['fastest']:.2f} tokens/s, "
            f"lowest ÷ highest {all_ran['slowest'] / all_ran['fastest']:.3f}, Jain's index {all_ran['jain']:.4f}"
        )
    if memory := figures["memory_beyond_ready_bytes"]:
        now, peak = memory["now"] / 2**20, memory["peak"] / 2**20
        print(f"memory        {now:+.0f} MiB now, {peak:+.0f} MiB at its peak, beyond the ready server's")
    used = ", ".join(f"{name} {value:.2f}" for name, value in figures["cores_used"].items())
    print(f"processor     {used} of {figures['cores']} cores")
    print("recoveries    " + ", ".join(f"{name} {value}" for name, value in figures["recoveries"].items()))


if __name__ == "__main__":
    main()
