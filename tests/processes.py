"""What a running server says of itself, and what the kernel says of its process."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Held:
    """What a process holds of the machine."""

    threads: int
    descriptors: int
    memory: int  # bytes that belong to it alone: not those of mapped files


def held_by(pid: int) -> Held:
    """What the process holds now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return Held(
        threads=int(status["Threads"]),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        memory=int(status["RssAnon"].split()[0]) * 1024,
    )


def at_rest(pid: int, seconds: float = 1.0) -> Held:
    """The least that the process holds in that time: connections that were just closed take a moment to go."""
    readings: list[Held] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        readings.append(held_by(pid))
        time.sleep(0.05)
    return min(readings, key=lambda held: (held.descriptors, held.threads))


def metric(url: str, name: str) -> float:
    """A figure of the server's at `url` (ws://…), summed over models and other labels. Raises KeyError for none."""
    page = urllib.request.urlopen(url.replace("ws", "http", 1) + "/metrics", timeout=20).read().decode()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    values = [sample.value for sample in samples if sample.name == name]
    if not values:
        raise KeyError(f"metric {name}: seen {sorted({sample.name for sample in samples})}")
    return sum(values)


def eventually(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether `holds` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()
