"""Whose turn it is: what the next step of an engine takes of the requests that wait.

Requests of few embeddings go whole; prompts go in chunks that share a fixed number of rows, so that nobody's tokens
wait for another's prompt. Who was served longest ago comes first: no session waits for more than two steps while others
get many, unless more sessions wait than a step takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cloud_backend.engine import AppendWork, Engine, Result, Work
from cloud_backend.eviction import Admission
from cloud_backend.kv_cache import KVCache
from shared.errors import RequestError

LARGEST_BATCH = 64  # sessions in a step
SHORT = 16  # embeddings of a request that is never cut: tokens, and drafts of them
LEAST_CHUNK = 4  # embeddings of a prompt in a step
# Embeddings of prompts in a step. Fewer beside sessions that decode, as each of them adds to everyone's latency.
CHUNK_ALONE = {"cpu": 256, "cuda": 2048}
CHUNK_BESIDE = {"cpu": 32, "cuda": 256}
DECODING_SECONDS = 1.0  # since its last token, a session counts as decoding
MOST_WHOLE = 4096  # embeddings in a step of what is never cut, but for a request that has more


@dataclass(frozen=True)
class Timed:
    """A result, or why there is none, with the time it waited and ran."""

    result: Result | RequestError
    queue_us: int
    compute_us: int


@dataclass(eq=False)
class Job:
    """A request and how far it is: `sent` of its embeddings have been through the model."""

    engine: Engine
    work: Work
    arrived: float
    done: asyncio.Future[Timed]
    dropped: Callable[[], bool]
    sent: int = 0
    turn: int | None = None  # the step that it was last in, or after which it came
    begun: float | None = None
    compute: float = 0.0

    @property
    def cache(self) -> KVCache:
        return self.work.cache

    @property
    def left(self) -> int:
        """Embeddings that it still has."""
        return len(self.work.embeddings) - self.sent

    @property
    def whole(self) -> bool:
        """Whether it is run in one step whatever its length: an Encode, an image."""
        return not isinstance(self.work, AppendWork) or self.work.kind == "image"

    @property
    def short(self) -> bool:
        return not self.whole and self.left <= SHORT

    def piece(self, most: int) -> Work:
        """The next of it: `most` embeddings, but results come from one piece."""
        work = self.work
        if not isinstance(work, AppendWork) or self.whole or self.left == len(work.embeddings) <= most:
            return work
        last = self.left <= most or self.left - most < work.rows
        embeddings = work.embeddings[self.sent :] if last else work.embeddings[self.sent : self.sent + most]
        return replace(work, keep=work.keep + self.sent, embeddings=embeddings, rows=work.rows if last else 0)

    def lost(self) -> bool:
        """Whether what it builds on was evicted while it waited. What it had appended itself is appended again."""
        if not isinstance(self.work, AppendWork):
            return False
        if self.work.keep + self.sent > self.cache.length:
            self.sent = 0
        return self.work.keep > self.cache.length or not self.cache.ready

    def end(self, result: Result | RequestError) -> None:
        if not self.done.done():
            begun = self.begun or time.perf_counter()
            self.done.set_result(Timed(result, int((begun - self.arrived) * 1e6), int(self.compute * 1e6)))

    def let_go(self) -> None:
        """Leaves its cache as it was, or cut to `keep` where a step had begun it."""
        if self.begun is not None and isinstance(self.work, AppendWork):
            self.cache.cut(self.work.keep)
        self.cache.trim()


class Turns:
    """The turns of one engine's sessions."""

    def __init__(self, engine: Engine, evicted: Callable[[Engine], None]) -> None:
        self._engine = engine
        self._admission = Admission(engine, evicted)
        self._steps = 0
        self._decoded: dict[KVCache, float] = {}  # when a session last got a result

    def next_step(self, jobs: list[Job]) -> list[tuple[Job, Work]]:
        """Jobs for the next step, each with its piece, for which memory is taken. Ends those that were evicted."""
        # Who comes does not go before those who wait already. Stable: first come, first served.
        for job in jobs:
            job.turn = self._steps if job.turn is None else job.turn
        jobs = sorted(jobs, key=lambda job: job.turn or 0)
        jobs = [job for job in jobs if not _ended_as_lost(job)]
        pending = {job.cache for job in jobs}
        self._admission.still(pending)
        step = self._step(jobs, pending) or self._step(jobs, pending, alone=True)
        self._steps += bool(step)
        return list(step.values())

    def _step(self, jobs: list[Job], pending: set[KVCache], *, alone: bool = False) -> dict[KVCache, tuple[Job, Work]]:
        """Those that get memory now. alone: it is known that none does unless another gives some back."""
        step: dict[KVCache, tuple[Job, Work]] = {}
        for job, most in self._shares(jobs):
            if _ended_as_lost(job):  # evicted just now, for another of this step
                continue
            # The same session twice: another connection has taken it over.
            if len(step) < LARGEST_BATCH and job.cache not in step:
                piece = job.piece(most)
                if self._admission.admit(job.work, step, pending, alone=alone):
                    step[job.cache] = (job, piece)
        return step

    def _shares(self, jobs: list[Job]) -> Iterable[tuple[Job, int]]:
        """Jobs in their order, each with the embeddings that a step may take of it."""
        prompts = [job for job in jobs if not job.short and not job.whole]
        room = self._room(prompts)
        served = self._served(prompts, room)
        share = max(LEAST_CHUNK, room // max(1, len(served)))
        whole = late = 0
        for job in jobs:
            if job.short:
                yield job, SHORT
            elif job.whole:
                if not whole or whole + job.left <= MOST_WHOLE:
                    yield job, job.left
                whole += job.left
            elif job in served:
                spare = room - share * len(served) if job is served[0] else 0
                yield job, share + max(0, spare)
            elif late < room and self._admission.waits(job.cache):  # so that it stands in line
                yield job, LEAST_CHUNK
                late += 0 if self._admission.waits(job.cache) else LEAST_CHUNK

    def _served(self, prompts: list[Job], room: int) -> list[Job]:
        """Prompts that share a step. Those that wait for memory would hold the turns of those that have it."""
        able = [job for job in prompts if not self._admission.waits(job.cache)]
        # Of more prompts than fit, every second one has its turn, whether the first in line gets its memory or not.
        first = any(self._admission.is_first(job.cache) for job in able)
        return able if len(able) * LEAST_CHUNK <= 2 * room else able[: (len(able) + 1) // 2 + first]

    def _room(self, prompts: list[Job]) -> int:
        """Embeddings of prompts that a step takes."""
        now, prefilling = time.monotonic(), {job.cache for job in prompts}
        decoding = any(now - at < DECODING_SECONDS for cache, at in self._decoded.items() if cache not in prefilling)
        return (CHUNK_BESIDE if decoding else CHUNK_ALONE)[self._engine.device]

    def served(self, job: Job, *, answered: bool) -> None:
        """Notes that a session was in the step that has just ended."""
        job.turn = self._steps
        self._admission.used(job.cache, answered=answered)
        if answered:
            self._decoded.pop(job.cache, None)
            self._decoded[job.cache] = time.monotonic()

    def forget(self, cache: KVCache) -> None:
        """The session has ended."""
        self._admission.forget(cache)
        self._decoded.pop(cache, None)


def _ended_as_lost(job: Job) -> bool:
    """Ends a job that can no longer be done as its cache was evicted."""
    if lost := job.lost():
        job.end(RequestError("out_of_step", "the KV cache was given to others meanwhile"))
    return lost
