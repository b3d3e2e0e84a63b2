"""Runs the work of all sessions on the engines, one batch at a time, first come first served.

A session has at most one work here, so taking turns in order of arrival is round robin: none starves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cloud_backend.engine import Engine, Result, Work
from shared.errors import RequestError

log = logging.getLogger("stip.cloud")
T = TypeVar("T")


@dataclass(frozen=True)
class Timed:
    """A result, or why there is none, with the time it waited and ran."""

    result: Result | RequestError
    queue_us: int
    compute_us: int


@dataclass(frozen=True)
class _Job:
    engine: Engine
    work: Work
    arrived: float
    done: asyncio.Future[Timed]


class Scheduler:
    """Owns the one thread in which models are loaded and run.

    One, because each thread that runs torch gets OpenMP workers of its own, and with more workers than cores all of
    them go to sleep between parallel regions: a token then takes half as long again.
    """

    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "engine")
        self.on_step: Callable[[Engine, int, int, float], None] = lambda engine, sessions, rows, seconds: None
        self.on_evict: Callable[[Engine], None] = lambda engine: None
        self.step_began: float | None = None  # perf_counter() at the start of the step that runs now

    @property
    def waiting(self) -> int:
        """Requests that are not begun."""
        return len(self._jobs)

    async def call(self, function: Callable[[], T]) -> T:
        """Runs `function` in the engines' thread and gives what it gives: for loading models."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def submit(self, engine: Engine, work: Work) -> Timed:
        """Waits for the turn of `work` and gives its result. A caller that is cancelled gives up its turn."""
        job = _Job(engine, work, time.perf_counter(), asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._wake.set()
        return await job.done

    async def run(self) -> None:
        """Serves jobs until cancelled; the forward that is running then still ends."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                batch = self._next_batch()
                if not batch:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self.step_began = started = time.perf_counter()
                results = await loop.run_in_executor(self._thread, _run, batch)
                self.step_began = None
                seconds = time.perf_counter() - started
                compute_us = int(seconds * 1e6)
                self.on_step(batch[0].engine, len(batch), sum(len(job.work.embeddings) for job in batch), seconds)
                for job, result in zip(batch, results, strict=True):
                    if not job.done.done():
                        job.done.set_result(Timed(result, int((started - job.arrived) * 1e6), compute_us))
        finally:
            self._thread.shutdown(wait=True)

    def _next_batch(self) -> list[_Job]:
        """The oldest job, and others behind it for the same engine, as many as it takes at once."""
        batch: list[_Job] = []
        waiting: deque[_Job] = deque()
        while self._jobs:
            job = self._jobs.popleft()
            if job.done.done():
                continue  # its session went away
            if not batch or (job.engine is batch[0].engine and len(batch) < job.engine.largest_batch):
                batch.append(job)
            else:
                waiting.append(job)
        self._jobs = waiting
        return batch


def _run(batch: list[_Job]) -> list[Result] | list[RequestError]:
    try:
        return batch[0].engine.run([job.work for job in batch])
    except Exception as error:  # any failure of a model is this batch's alone: the server and other sessions go on
        log.error("engine failed: %s", type(error).__name__)  # its text could quote tensors
        return [RequestError("internal", "the engine failed; see the cloud's log") for _ in batch]
