"""What is left of a request that nobody wants any more, and of the memory of a session that has ended."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from cloud_backend.kv_cache import PAGE
from cloud_backend.scheduler import Scheduler
from cloud_backend.turns import Timed
from tests.cloud_backend.held_engine import CHUNK, HeldEngine, code, drive, eventually, filled, submitted
from tests.cloud_backend.list_jobs import append

LONG = 10 * CHUNK


class Dropped:
    """Whether a request is still wanted, as sessions say it."""

    def __init__(self) -> None:
        self.yes = False

    def __call__(self) -> bool:
        return self.yes


async def cancelled(task: asyncio.Task[Timed]) -> None:
    """Cancels a caller, as a lost connection does."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("keep", [0, 40, 70])
def test_a_prompt_that_is_cancelled_between_its_chunks_leaves_the_cache_cut_to_keep(keep: int) -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache, dropped = await filled(scheduler, engine, 70), Dropped()
        task = submitted(scheduler, engine, append(cache, LONG, keep=keep), dropped=dropped)
        engine.let(2)
        await eventually(lambda: len(engine.steps) == 3)
        dropped.yes = True
        engine.let()
        timed = await task
        assert (code(timed), len(engine.steps)) == ("cancelled", 3) and timed.compute_us > 0
        assert (cache.length, cache.held) == (keep, -(-keep // PAGE))

    drive(test)


def test_a_request_that_is_cancelled_before_its_turn_leaves_the_cache_as_it_was() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache, dropped = await filled(scheduler, engine, 70), Dropped()
        other = submitted(scheduler, engine, append(engine.new_cache(), 1))
        await eventually(lambda: len(engine.steps) == 1)
        task = submitted(scheduler, engine, append(cache, LONG, keep=10), dropped=dropped)
        await eventually(lambda: scheduler.waiting == 1)
        dropped.yes = True
        engine.let()
        assert code(await task) == "cancelled" and code(await other) is None
        assert (cache.length, cache.held) == (70, 3)

    drive(test)


def test_a_request_that_is_cancelled_in_its_last_step_is_answered() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache, dropped = engine.new_cache(), Dropped()
        task = submitted(scheduler, engine, append(cache, 9), dropped=dropped)
        await eventually(lambda: len(engine.steps) == 1)
        dropped.yes = True
        engine.let()
        assert code(await task) is None and cache.length == 9

    drive(test)


def test_a_caller_that_is_cancelled_between_chunks_takes_no_further_step() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache = await filled(scheduler, engine, 70)
        task = submitted(scheduler, engine, append(cache, LONG, keep=40))
        engine.let(2)
        await eventually(lambda: len(engine.steps) == 3)
        await cancelled(task)
        other = submitted(scheduler, engine, append(engine.new_cache(), 1))
        engine.let()
        assert code(await other) is None
        assert engine.sizes()[3:] == [[1]] and (cache.length, cache.held) == (40, 2)

    drive(test)


def test_a_caller_that_is_cancelled_before_its_turn_leaves_the_cache_as_it_was() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache = await filled(scheduler, engine, 70)
        first = submitted(scheduler, engine, append(engine.new_cache(), 1))
        await eventually(lambda: len(engine.steps) == 1)
        task = submitted(scheduler, engine, append(cache, LONG, keep=40))
        await eventually(lambda: scheduler.waiting == 1)
        await cancelled(task)
        engine.let()
        await first
        await eventually(lambda: scheduler.waiting == 0)
        assert len(engine.steps) == 1 and (cache.length, cache.held) == (70, 3)

    drive(test)


def test_the_next_request_of_a_session_builds_on_what_a_cancelled_one_left() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache = await filled(scheduler, engine, 70)
        task = submitted(scheduler, engine, append(cache, LONG, keep=40))
        await eventually(lambda: len(engine.steps) == 1)
        await cancelled(task)
        too_much = submitted(scheduler, engine, append(cache, 1, keep=70))  # before the step has ended
        engine.let()
        assert code(await too_much) == "out_of_step" and cache.length == 40
        assert code(await scheduler.submit(engine, append(cache, 1, keep=40))) is None

    drive(test)


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("keep", [0, 40, 70])
def test_a_session_that_ends_while_its_step_runs_gives_all_its_memory_back(keep: int, failing: bool) -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache = await filled(scheduler, engine, 70)
        task = submitted(scheduler, engine, append(cache, LONG, keep=keep))
        await eventually(lambda: len(engine.steps) == 1)
        await cancelled(task)
        scheduler.release(engine, cache)
        if failing:
            engine.failure = RuntimeError("no memory")
        engine.let()
        await scheduler.submit(engine, append(engine.new_cache(), PAGE))
        assert engine.pool is not None and engine.pool.used == engine.pool.page_bytes  # of the other one

    drive(test)


def test_pages_of_a_session_that_ends_are_nobody_elses_while_its_step_runs() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache = await filled(scheduler, engine, 70)
        task = submitted(scheduler, engine, append(cache, 1))
        await eventually(lambda: len(engine.steps) == 1)
        await cancelled(task)
        scheduler.release(engine, cache)
        assert engine.pool is not None and engine.pool.free == engine.pool.pages - 3
        engine.let()
        pool = engine.pool
        await eventually(lambda: pool.used == 0)

    drive(test)


@pytest.mark.parametrize("begun", [False, True])
def test_a_session_that_ends_between_its_requests_gives_its_memory_back_at_once(begun: bool) -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache: Any = await filled(scheduler, engine, 70) if begun else engine.new_cache()
        scheduler.release(engine, cache)
        assert engine.pool is not None and engine.pool.used == 0

    drive(test)
