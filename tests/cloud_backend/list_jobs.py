"""Requests without a model: an engine that says only where it would run and what memory it has, and jobs for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from cloud_backend.engine import AppendWork, EncodeWork, LogitRows, Outcome, Work
from cloud_backend.kv_cache import PAGE, KVCache, PagePool
from cloud_backend.turns import Job, Timed, Turns
from shared.errors import RequestError

PAGE_BYTES = PAGE * 4 * 2  # of one head with a key and a value of one number


def pool_of(pages: int) -> PagePool:
    return PagePool(PAGE_BYTES, pages * PAGE_BYTES)


class JobEngine:
    """The least that turns need of an engine; runs work by counting positions."""

    device: Literal["cpu", "cuda"] = "cpu"

    def __init__(self, pages: int | None = 4096) -> None:
        self.pool = None if pages is None else pool_of(pages)
        self.evictions = 0

    def new_cache(self) -> KVCache:
        return KVCache(self.pool)

    def run(self, batch: Sequence[Work]) -> list[Outcome]:
        for work in batch:
            if isinstance(work, AppendWork):
                work.cache.cut(work.keep)
                assert work.reserve()
                work.cache.length = work.end
        return [rows(work) for work in batch]


def rows(work: Work) -> LogitRows:
    count = work.rows if isinstance(work, AppendWork) else 0
    return LogitRows(
        np.zeros((count, 1), np.float32), np.zeros((count, 1), np.uint32), np.zeros((count, 2), np.float32)
    )


def append(cache: KVCache, count: int, *, keep: int | None = None, rows: int = 1, kind: Any = "text") -> AppendWork:
    """An Append of `count` embeddings, each its own number, behind what the cache holds."""
    embeddings = np.arange(count, dtype=np.float32)[:, None]
    start = cache.length if keep is None else keep
    return AppendWork(cache, start, embeddings, rows, "logits", 1, 1.0, "float32", kind)


def encode(cache: KVCache, count: int) -> EncodeWork:
    return EncodeWork(cache, np.zeros((count, 1), np.float32), (count,), "hidden", "float32")


class Line:
    """Requests that wait for one engine, and the steps that its turns make of them."""

    def __init__(self, engine: JobEngine | None = None) -> None:
        self.engine: Any = engine or JobEngine()
        self.turns = Turns(self.engine, self._evict)
        self.jobs: list[Job] = []
        self._loop = asyncio.new_event_loop()  # futures want one; it is never run

    def close(self) -> None:
        self._loop.close()

    def _evict(self, engine: Any) -> None:
        engine.evictions += 1

    def submit(self, work: Work, dropped: Callable[[], bool] = lambda: False) -> Job:
        done: asyncio.Future[Timed] = self._loop.create_future()
        self.jobs.append(Job(self.engine, work, time.perf_counter(), done, dropped))
        return self.jobs[-1]

    def plan(self) -> list[tuple[Job, Work]]:
        """The next step, without running it."""
        return self.turns.next_step([job for job in self.jobs if not job.done.done()])

    def step(self) -> dict[Job, Work]:
        """Runs the next step as the scheduler does: what each job had in it."""
        step = self.plan()
        for job, piece in step:
            assert not isinstance(piece, AppendWork) or piece.keep <= job.cache.length, "it would build on nothing"
        self.engine.run([piece for _, piece in step])
        for job, piece in step:
            job.begun = job.begun or time.perf_counter()
            job.sent += len(piece.embeddings)
            self.turns.served(job, answered=not job.left)
            if not job.left:
                job.cache.trim()
                job.end(rows(piece))
        self.jobs = [job for job in self.jobs if not job.done.done()]
        return dict(step)

    def sizes(self) -> list[int]:
        """Embeddings of each job in the next step, in the order of the jobs that wait; 0 where it is not in it."""
        jobs, step = list(self.jobs), self.step()
        return [len(step[job].embeddings) if job in step else 0 for job in jobs]


def code(job: Job) -> str | None:
    """With which error it ended, if with any."""
    result = job.done.result().result if job.done.done() else None
    return result.code if isinstance(result, RequestError) else None
