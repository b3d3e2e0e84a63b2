"""Runs the work of all sessions on the engines, step by step: continuous batching.

One step takes every session of an engine that has work; `turns` says how much of each. Engines take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from cloud_backend.engine import AppendWork, Engine, Outcome, Work, failed
from cloud_backend.kv_cache import KVCache
from cloud_backend.turns import Job, Timed, Turns
from shared.errors import EngineError, RequestError

log = logging.getLogger("stip.cloud")
T = TypeVar("T")

RETURN_SHARE = 0.2  # of a step's time that the next one waits for those who were just answered
LOOK_SECONDS = 0.05  # between looks at memory that a request waits for


class Scheduler:
    """Owns the one thread in which models are loaded and run.

    One, because each thread that runs torch gets OpenMP workers of its own, and with more workers than cores all of
    them go to sleep between parallel regions: a token then takes half as long again.
    """

    def __init__(self) -> None:
        # Called after each step with its sessions, rows and seconds, and for each session that was evicted.
        self.on_step: Callable[[Engine, int, int, float], None] = lambda engine, sessions, rows, seconds: None
        self.on_evict: Callable[[Engine], None] = lambda engine: None
        self.step_began: float | None = None  # perf_counter() at the start of the step that runs now
        self._jobs: list[Job] = []
        self._turns: dict[Engine, Turns] = {}  # whose turn it is comes first
        self._stepping: set[KVCache] = set()  # whose step runs
        self._ended: set[KVCache] = set()  # those of them whose session ended meanwhile
        self._returning: set[KVCache] = set()  # who was answered in the last step
        self._return_until = 0.0
        self._failed = False  # no step will run any more
        self._lost: EngineError | None = None
        self._stop: Callable[[], object] = lambda: None  # ends `run`, from any thread
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "engine")

    @property
    def waiting(self) -> int:
        """Requests that no step has begun."""
        return sum(job.begun is None for job in self._jobs)

    async def call(self, function: Callable[[], T]) -> T:
        """Runs `function` in the engines' thread and gives what it gives: for loading models."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def submit(self, engine: Engine, work: Work, dropped: Callable[[], bool] = lambda: False) -> Timed:
        """Waits for the turns of `work` and gives its result.

        dropped: once it is true, no further step takes the work, and the result is the error `cancelled`; a caller
        that is cancelled gives up its turns in the same way. Either leaves the cache as it was, or cut to `keep`
        where a step had begun it.
        """
        if self._failed:
            return Timed(failed(), 0, 0)
        job = Job(engine, work, time.perf_counter(), asyncio.get_running_loop().create_future(), dropped)
        self._jobs.append(job)
        self._wake.set()
        return await job.done

    def release(self, engine: Engine, cache: KVCache) -> None:
        """A session has ended: its memory is free for others, once no step writes to it any more."""
        self._returning.discard(cache)
        if engine in self._turns:
            self._turns[engine].forget(cache)
        if cache in self._stepping:
            self._ended.add(cache)
        else:
            cache.clear()

    def lose(self, error: EngineError) -> None:
        """From any thread: what an engine computes with is gone. `run` ends with the error, whatever step runs."""
        self._lost = error
        self._stop()

    async def run(self) -> None:
        """Serves jobs until cancelled; the step that is running then still ends.

        Should it fail, requests are answered with `internal`, those that wait and those that come. Raises EngineError
        where what an engine computes with is gone.
        """
        loop = asyncio.get_running_loop()
        self._stop = partial(loop.call_soon_threadsafe, asyncio.current_task().cancel)  # type: ignore[union-attr]
        try:
            while self._lost is None:
                await self._gather()
                step = self._next_step()
                if not step:
                    await self._pause()
                    continue
                self.step_began = started = time.perf_counter()
                for job, _ in step:
                    job.begun = job.begun or started
                engine = step[0][0].engine
                self._stepping = {job.cache for job, _ in step}
                outcomes = await loop.run_in_executor(self._thread, _run, engine, [piece for _, piece in step])
                self.step_began = None
                self._finish(engine, step, outcomes, time.perf_counter() - started)
            raise self._lost
        except Exception:
            self._fail()
            raise
        except asyncio.CancelledError:
            if self._lost is None:
                raise
            self._fail()
            raise self._lost from None
        finally:
            self._stop = lambda: None
            self._thread.shutdown(wait=self._lost is None)  # else a step may wait for what is gone

    def _fail(self) -> None:
        self._failed = True
        for job in self._jobs:
            job.end(failed())

    async def _gather(self) -> None:
        """Waits a little for those who were just answered, so that steps are taken together rather than in halves."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._return_until):
                while self._jobs and self._returning.difference(job.cache for job in self._jobs):
                    self._wake.clear()
                    await self._wake.wait()

    async def _pause(self) -> None:
        """Until there is work, or for a moment where work waits for memory."""
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS if self._jobs else None):
                await self._wake.wait()

    def _next_step(self) -> list[tuple[Job, Work]]:
        self._end_dropped()
        for job in self._jobs:
            self._turns.setdefault(job.engine, Turns(job.engine, lambda engine: self.on_evict(engine)))
        for engine, turns in list(self._turns.items()):
            if step := turns.next_step([job for job in self._jobs if job.engine is engine]):
                self._turns[engine] = self._turns.pop(engine)  # the others come first next time
                return step
        return []

    def _end_dropped(self) -> None:
        for job in self._jobs:
            if not job.done.done() and job.dropped():
                job.end(RequestError("cancelled", "dropped by Cancel"))
            if job.done.done():
                job.let_go()
        self._jobs = [job for job in self._jobs if not job.done.done()]

    def _finish(self, engine: Engine, step: list[tuple[Job, Work]], outcomes: list[Outcome], seconds: float) -> None:
        ended = self._ended
        for cache in ended:
            cache.clear()
        self._stepping, self._ended, self._returning = set(), set(), set()
        for (job, piece), outcome in zip(step, outcomes, strict=True):
            job.compute += seconds
            if not job.done.done():  # else its connection went away meanwhile
                answered = self._take(job, piece, outcome)
                if job.cache not in ended:  # they are not known any more
                    self._turns[engine].served(job, answered=answered)
        self._returning -= ended
        self._return_until = asyncio.get_running_loop().time() + RETURN_SHARE * seconds
        self.on_step(engine, len(step), sum(len(piece.embeddings) for _, piece in step), seconds)

    def _take(self, job: Job, piece: Work, outcome: Outcome) -> bool:
        """Takes what came of a piece. Whether it was the last."""
        if isinstance(outcome, AppendWork):
            job.work = outcome
            return False
        if isinstance(outcome, RequestError):
            job.let_go()
        else:
            job.sent += len(piece.embeddings)
            if job.left:
                return False
            job.cache.trim()
        job.end(outcome)
        self._jobs.remove(job)
        self._returning.add(job.cache)
        return True


def _run(engine: Engine, batch: list[Work]) -> list[Outcome]:
    try:
        return engine.run(batch)
    except EngineError:
        raise
    except Exception as error:  # the engine's own doing: the server and other engines go on
        log.error("engine failed: %s", type(error).__name__)  # its text could quote tensors
        return [failed() for _ in batch]
