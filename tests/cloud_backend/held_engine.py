"""A scheduler in an event loop, and an engine whose steps run once they are let."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from cloud_backend.engine import LogitRows, Outcome, Work
from cloud_backend.kv_cache import KVCache
from cloud_backend.scheduler import Scheduler
from cloud_backend.turns import CHUNK_ALONE, Timed
from shared.errors import RequestError
from tests.cloud_backend.list_jobs import JobEngine, append

CHUNK = CHUNK_ALONE["cpu"]
PATIENCE = 20.0  # seconds; longer is a hang


class HeldEngine(JobEngine):
    """`steps`: those that were given to it, the one that waits included."""

    def __init__(self, pages: int | None = 4096) -> None:
        super().__init__(pages)
        self.steps: list[list[Work]] = []
        self.failure: Exception | None = None
        self._let = threading.Semaphore(0)

    def let(self, steps: int = 1000) -> None:
        """Lets so many steps run."""
        self._let.release(steps)

    def run(self, batch: Sequence[Work]) -> list[Outcome]:
        self.steps.append(list(batch))
        assert self._let.acquire(timeout=PATIENCE)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return super().run(batch)

    def sizes(self) -> list[list[int]]:
        """Embeddings of each request in each step."""
        return [[len(work.embeddings) for work in step] for step in self.steps]


@asynccontextmanager
async def running(scheduler: Scheduler, *engines: HeldEngine) -> AsyncIterator[None]:
    task = asyncio.create_task(scheduler.run())
    try:
        yield
    finally:
        for engine in engines:
            engine.let()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110  # what is waited for is in the engine's thread
            await asyncio.sleep(0.001)


def drive(test: Callable[[Scheduler, HeldEngine], Awaitable[None]], engine: HeldEngine | None = None) -> None:
    """Runs a test with a scheduler that runs."""

    async def run() -> None:
        scheduler, held = Scheduler(), engine or HeldEngine()
        async with running(scheduler, held):
            await test(scheduler, held)

    asyncio.run(run())


def submitted(scheduler: Scheduler, engine: Any, work: Work, **options: Any) -> asyncio.Task[Timed]:
    return asyncio.create_task(scheduler.submit(engine, work, **options))


async def filled(scheduler: Scheduler, engine: HeldEngine, length: int) -> KVCache:
    """A session that holds so many positions."""
    cache, before = engine.new_cache(), len(engine.steps)
    engine.let(-(-length // CHUNK))
    assert isinstance((await scheduler.submit(engine, append(cache, length))).result, LogitRows)
    del engine.steps[before:]
    return cache


def code(timed: Timed) -> str | None:
    return timed.result.code if isinstance(timed.result, RequestError) else None
