"""Figures of what a session did."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Counters:
    """What went over the wire and what the device did for it. Bytes are WebSocket payloads."""

    bytes_up: int = 0
    bytes_down: int = 0
    vectors_up: int = 0
    round_trips: int = 0
    full_rows: int = 0
    drafted: int = 0  # tokens that were guessed and sent along
    accepted: int = 0  # of those: the ones that the sampler chose
    replays: int = 0  # times that the cloud had lost something, and it was sent again
    resumes: int = 0  # times that it was still there after a lost connection
    queue_us: int = 0
    compute_us: int = 0
    work_ns: dict[str, int] = field(default_factory=dict)  # processor time by step: embed, hide, encode, …

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Adds the processor time spent inside to `step`: what else runs on the machine does not count."""
        started = time.thread_time_ns()
        try:
            yield
        finally:
            self.work_ns[step] = self.work_ns.get(step, 0) + time.thread_time_ns() - started
