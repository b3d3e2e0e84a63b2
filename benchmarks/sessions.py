"""`make bench-sessions`: 1,000 connected sessions on one cloud, 50 of them active at any time, for 10 minutes.

Every session is a real device that stays connected. Activity moves over them at random: a conversation goes on for one
answer, then another one's does. Together they need several times the memory that the KV cache may take, so the cloud
evicts whoever was idle longest, and a device that comes back replays. What must hold:

- no device sees an error, and every connection lasts
- the server's memory, beyond that of the ready server, stays within 1.25 × the KV budget
- it does not grow: on average over the last third of the time it is no more than 2 % of the budget above the middle one

The devices share the processor with the server: that is part of the measure.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.device_process import Report, Wander
from benchmarks.fleet import Fleet
from benchmarks.load import smollm2
from benchmarks.plain import RESULTS, machine
from benchmarks.timelines import per_token, percentiles
from benchmarks.watch import Sample, Watch

KV_BYTES = 2**30
TOKENS, TURNS = 32, 3  # of an answer; of a conversation: 50 active ones fit the budget, 1,000 do not
SERVER_MOST = 1.25  # memory beyond the ready server's, in KV budgets
GROWTH_MOST = 0.02  # from the middle third to the last, in KV budgets


def main() -> None:
    """Prints the figures, writes them, and fails if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--active", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=5, help="that the devices run in")
    options = parser.parse_args()
    if not 1 <= options.processes <= options.active <= options.sessions // 2 or options.minutes <= 0:
        parser.error("wanted minutes, at least a process, no more than active, and at most half of the sessions active")
    _allow_files(options.sessions + 1000)
    figures = measure(options.sessions, options.active, options.minutes, options.processes)
    print(json.dumps(figures, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sessions.json").write_text(json.dumps(figures, indent=2) + "\n")
    if broken := broken_claims(figures):
        sys.exit("bench: error: " + "; ".join(broken))


def _allow_files(wanted: int) -> None:
    """A connection is an open file of the server's, which takes over this process's limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and hard < wanted:
        sys.exit(f"bench: error: open files: seen a limit of {hard}, wanted {wanted}\nhint: raise it with ulimit -Hn")
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def measure(sessions: int, active: int, minutes: float, processes: int) -> dict[str, Any]:
    """Every figure."""
    limits = ("--kv-bytes", str(KV_BYTES), "--max-sessions", str(sessions + 100))
    # Idle sessions are to stay, however long they are: they are what is measured.
    patience = ("--idle-seconds", str(60 * minutes + 3600))
    with smollm2("bfloat16", *limits, *patience) as (bundle, server), Watch(server.pid, every=1.0) as watch:
        with Fleet(bundle, server.address, sessions, processes) as fleet:
            began, used = time.monotonic(), watch.cpu_seconds
            connected = watch.memory_now
            report = fleet.wander(Wander(active=active, seconds=60 * minutes, tokens=TOKENS, turns=TURNS, seed=1))
            ended, used = time.monotonic(), watch.cpu_seconds - used
        samples = watch.between(began, ended)
        ready = watch.samples[0]
    return {
        "machine": machine(),
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "sessions": sessions,
        "active": active,
        "minutes": minutes,
        "processes": processes,
        "kv_bytes": KV_BYTES,
        **answers_of(report, ended - began),
        "fewest_connections": min(sample.sockets for sample in samples) - ready.sockets,
        "memory_beyond_ready_bytes": {"connected": connected} | memory_of(samples, ready),
        "cores_used": {"server": used / (ended - began), "driver": report.cpu_seconds / (ended - began)},
    }


def answers_of(report: Report, seconds: float) -> dict[str, Any]:
    """What the devices saw."""
    tokens = sum(len(timeline.moments) for timeline in report.timelines)
    return {
        "errors": report.errors,
        "answers": len(report.timelines),
        "sessions_that_answered": len({timeline.device for timeline in report.timelines}),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "recoveries": asdict(report.recoveries),
        "first_token_ms": asdict(percentiles(timeline.first_token_seconds for timeline in report.timelines)),
        "token_ms": asdict(percentiles(per_token(report.timelines))),
    }


def memory_of(samples: list[Sample], ready: Sample) -> dict[str, float]:
    """Bytes beyond the ready server's: the most, and means over the thirds of the time."""
    memory = [sample.memory - ready.memory for sample in samples]
    third = len(memory) // 3
    return {
        "peak": max(memory),
        "first_third": statistics.mean(memory[:third]),
        "middle_third": statistics.mean(memory[third : 2 * third]),
        "last_third": statistics.mean(memory[2 * third :]),
    }


def broken_claims(figures: dict[str, Any]) -> list[str]:
    """The claims that do not hold, in words."""
    memory, budget = figures["memory_beyond_ready_bytes"], figures["kv_bytes"]
    growth = (memory["last_third"] - memory["middle_third"]) / budget
    claims = {
        f"errors: seen {len(figures['errors'])}, wanted none": not figures["errors"],
        f"lost connections: seen {figures['recoveries']['lost']}, wanted none": figures["recoveries"]["lost"] == 0,
        f"connections: seen {figures['fewest_connections']}, wanted {figures['sessions']} at any time": (
            figures["fewest_connections"] >= figures["sessions"]
        ),
        f"memory: seen {memory['peak'] / budget:.2f} KV budgets beyond the ready server, wanted {SERVER_MOST}": (
            memory["peak"] <= SERVER_MOST * budget
        ),
        f"growth: seen {growth:.1%} of the KV budget in the last third, wanted {GROWTH_MOST:.0%}": (
            growth <= GROWTH_MOST
        ),
    }
    return [claim for claim, holds in claims.items() if not holds]


if __name__ == "__main__":
    main()
