"""The scheduler in an event loop: steps, turns of engines, and what is left of a request that nobody wants any more."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

from cloud_backend.kv_cache import PAGE
from cloud_backend.scheduler import Scheduler
from shared.errors import EngineError
from tests.cloud_backend.held_engine import CHUNK, PATIENCE, HeldEngine, code, drive, eventually, filled, submitted
from tests.cloud_backend.list_jobs import append

# --- steps ---


def test_requests_that_come_during_a_step_are_one_step() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        first = submitted(scheduler, engine, append(engine.new_cache(), 2))
        await eventually(lambda: len(engine.steps) == 1)
        others = [submitted(scheduler, engine, append(engine.new_cache(), count)) for count in (1, 3, 16)]
        engine.let()
        await asyncio.gather(first, *others)
        assert engine.sizes() == [[2], [1, 3, 16]]

    drive(test)


def test_sessions_that_were_answered_together_are_waited_for_a_little() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        caches = [engine.new_cache() for _ in range(3)]
        tasks = [submitted(scheduler, engine, append(cache, 2)) for cache in caches]
        await eventually(lambda: len(engine.steps) == 1)
        await asyncio.sleep(0.25)  # the length of a step, of which the next one waits a share
        engine.let(1)
        await asyncio.gather(*tasks)
        tasks = []
        for cache in caches:  # each in a turn of the event loop of its own, as frames come
            tasks.append(submitted(scheduler, engine, append(cache, 1)))
            for _ in range(5):
                await asyncio.sleep(0)
        engine.let()
        await asyncio.gather(*tasks)
        assert engine.sizes() == [[2, 2, 2], [1, 1, 1]]

    drive(test)


def test_sessions_that_do_not_come_back_hold_nobody_up() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        engine.let()
        first, second = engine.new_cache(), engine.new_cache()
        await asyncio.gather(*(scheduler.submit(engine, append(cache, 2)) for cache in (first, second)))
        async with asyncio.timeout(PATIENCE):
            await scheduler.submit(engine, append(first, 1))

    drive(test)


def test_engines_take_turns() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        order: list[str] = []
        scheduler.on_step = lambda which, *_: order.append("one" if which is engine else "other")
        other = HeldEngine()
        other.let()
        tasks = [submitted(scheduler, one, append(one.new_cache(), 4 * CHUNK)) for one in (engine, other)]
        engine.let()
        await asyncio.gather(*tasks)
        assert order == ["one", "other"] * 4

    drive(test)


def test_each_step_is_told_with_its_sessions_rows_and_seconds() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        told: list[Any] = []
        scheduler.on_step = lambda *step: told.append(step)
        submitted(scheduler, engine, append(engine.new_cache(), 7))
        await eventually(lambda: len(engine.steps) == 1)
        tasks = [submitted(scheduler, engine, append(engine.new_cache(), count)) for count in (1, CHUNK + 5)]
        engine.let()
        await asyncio.gather(*tasks)
        assert [(sessions, rows) for _, sessions, rows, _ in told] == [
            (len(step), sum(step)) for step in engine.sizes()
        ]
        assert sum(rows for _, _, rows, _ in told) == 7 + 1 + CHUNK + 5
        assert all(which is engine and seconds > 0 for which, _, _, seconds in told)

    drive(test)


def test_waiting_counts_the_requests_that_no_step_has_begun() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        assert scheduler.waiting == 0
        tasks = [submitted(scheduler, engine, append(engine.new_cache(), 2 * CHUNK))]
        await eventually(lambda: len(engine.steps) == 1)
        tasks += [submitted(scheduler, engine, append(engine.new_cache(), 2)) for _ in range(3)]
        await eventually(lambda: scheduler.waiting == 3)
        engine.let(1)
        await eventually(lambda: len(engine.steps) == 2)
        assert scheduler.waiting == 0
        engine.let()
        await asyncio.gather(*tasks)

    drive(test)


def test_a_result_says_how_long_it_waited_and_ran() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        first = submitted(scheduler, engine, append(engine.new_cache(), 2))
        await eventually(lambda: len(engine.steps) == 1)
        second = submitted(scheduler, engine, append(engine.new_cache(), 2))
        await asyncio.sleep(0.05)  # what is measured
        engine.let()
        one, other = await asyncio.gather(first, second)
        assert one.compute_us >= 50_000 > one.queue_us
        assert other.queue_us >= 50_000 > other.compute_us

    drive(test)


# --- failures ---


def test_an_engine_that_fails_is_internal_for_that_step_and_the_next_one_runs() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        cache = await filled(scheduler, engine, 70)
        engine.failure = RuntimeError("no memory")
        tasks = [
            submitted(scheduler, engine, append(one, 2, keep=one.length // 2)) for one in (cache, engine.new_cache())
        ]
        engine.let()
        assert [code(timed) for timed in await asyncio.gather(*tasks)] == ["internal"] * 2
        assert (cache.length, cache.held) == (35, 2)
        assert code(await scheduler.submit(engine, append(cache, 2))) is None

    drive(test)


def test_a_session_that_ended_during_its_step_is_forgotten() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        task = submitted(scheduler, engine, append(engine.new_cache(), 2))
        await eventually(lambda: len(engine.steps) == 1)
        ended = weakref.ref(engine.steps[0][0].cache)
        scheduler.release(engine, engine.steps[0][0].cache)
        engine.let()
        await task
        await scheduler.submit(engine, append(engine.new_cache(), 2))
        engine.steps.clear()
        del task
        gc.collect()
        assert ended() is None

    drive(test)


def test_a_scheduler_that_fails_answers_all_that_wait_and_all_that_come() -> None:
    async def test() -> None:
        scheduler, engine = Scheduler(), HeldEngine()
        scheduler.on_step = lambda *step: [][0]
        engine.let()
        run = asyncio.create_task(scheduler.run())
        waiting = [submitted(scheduler, engine, append(engine.new_cache(), 2 * CHUNK)) for _ in range(3)]
        async with asyncio.timeout(PATIENCE):
            assert [code(timed) for timed in await asyncio.gather(*waiting)] == ["internal"] * 3
            assert code(await scheduler.submit(engine, append(engine.new_cache(), 1))) == "internal"
            with pytest.raises(IndexError):
                await run

    asyncio.run(test())


def test_who_lost_memory_to_others_is_counted_and_told() -> None:
    async def test(scheduler: Scheduler, engine: HeldEngine) -> None:
        evicted: list[Any] = []
        scheduler.on_evict = evicted.append
        cache = await filled(scheduler, engine, 3 * PAGE)
        engine.let()
        assert code(await scheduler.submit(engine, append(engine.new_cache(), 2 * PAGE))) is None
        assert evicted == [engine] and (cache.length, cache.held) == (0, 0)
        assert code(await scheduler.submit(engine, append(cache, 1, keep=3 * PAGE))) == "out_of_step"

    drive(test, HeldEngine(pages=4))


# --- what an engine computes with is gone ---


def test_whoever_waits_is_answered_when_an_engine_is_lost_whatever_step_runs() -> None:
    async def test() -> None:
        scheduler, engine = Scheduler(), HeldEngine()
        ended = asyncio.create_task(scheduler.run())
        requests = [submitted(scheduler, engine, append(engine.new_cache(), 2)) for _ in range(2)]
        await eventually(lambda: len(engine.steps) == 1)
        requests.append(submitted(scheduler, engine, append(engine.new_cache(), 2)))
        await asyncio.to_thread(scheduler.lose, EngineError("gone"))
        assert [code(await request) for request in requests] == ["internal"] * 3
        with pytest.raises(EngineError, match="gone"):
            await ended
        assert code(await scheduler.submit(engine, append(engine.new_cache(), 2))) == "internal"
        engine.let()

    asyncio.run(test())


def test_an_engine_that_says_it_is_lost_ends_the_scheduler() -> None:
    async def test() -> None:
        scheduler, engine = Scheduler(), HeldEngine()
        ended = asyncio.create_task(scheduler.run())
        engine.failure = EngineError("gone")
        engine.let()
        assert code(await scheduler.submit(engine, append(engine.new_cache(), 2))) == "internal"
        with pytest.raises(EngineError, match="gone"):
            await ended

    asyncio.run(test())
