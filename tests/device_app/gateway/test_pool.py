"""Which session a request gets, who waits, and how an answer that blocks reaches the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from device_app.gateway.errors import ApiError
from device_app.gateway.pool import MOST_WAITING, Lease, OnFrame, Pool, WireEvent
from device_app.held import common_prefix
from shared.errors import Cancelled, UnreachableError


class Session:
    """Remembers what it was asked last, as a session in the cloud does."""

    def __init__(self, on_frame: OnFrame) -> None:
        self.ids: list[int] = []
        self.on_frame = on_frame
        self.closed = False
        self.interrupted: BaseException | None = None

    def close(self) -> None:
        self.closed = True

    def interrupt(self, error: BaseException | None = None) -> None:
        self.interrupted = error

    def wait(self) -> None:
        """Until it is interrupted, as a client that waits for the cloud; what came before it began is forgotten."""
        self.interrupted = None
        while self.interrupted is None:
            time.sleep(0.005)
        raise self.interrupted

    def shared(self, ids: Sequence[int]) -> int:
        return common_prefix(list(ids), self.ids)


@dataclass
class Figures:
    prompt_tokens: int = 0


@dataclass
class Counting:
    """An answer that says one number after the other, each when it is let."""

    session: Session
    prompt: list[int]
    length: int
    pause: float = 0.0
    fails: Exception | None = None
    ids: list[int] = field(default_factory=list)
    stats: Figures = field(default_factory=Figures)
    cancelled: threading.Event = field(default_factory=threading.Event)
    thread: int = 0

    def __iter__(self) -> Iterator[str]:
        self.thread = threading.get_ident()
        self.stats.prompt_tokens = len(self.prompt)
        for number in range(self.length):
            if self.cancelled.wait(self.pause):
                raise RuntimeError("cancelled")
            self.ids.append(number)
            self.session.ids = self.prompt + self.ids
            yield f"{number} "
        if self.fails is not None:
            raise self.fails

    def cancel(self) -> None:
        self.cancelled.set()


def pool_of(sessions: int, **options: Any) -> Pool[Session]:
    return Pool(Session, sessions=sessions, shared=Session.shared, **options)


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(asyncio.wait_for(test(), 20))


async def answer(pool: Pool[Session], prompt: list[int], length: int = 3, **options: Any) -> int:
    """Answers a prompt, and gives the number of the session that did."""
    async with pool.lease(prompt) as lease:
        pieces = [piece async for piece in lease.run(Counting(lease.client, prompt, length, **options))]
        assert "".join(pieces) == "".join(f"{number} " for number in range(length))
        return lease.number


ONE, OTHER = list(range(100, 300)), list(range(500, 700))


@in_loop
async def test_a_conversation_goes_on_where_it_was() -> None:
    pool = pool_of(4)
    first, other = await answer(pool, ONE), await answer(pool, OTHER)
    assert first != other
    assert await answer(pool, [*ONE, 0, 1, 2, 7, 7]) == first
    assert await answer(pool, [*OTHER, 0, 1, 2, 7, 7]) == other
    assert await answer(pool, [*ONE, 9]) == first  # regenerated: what it held behind that is given up
    pool.close()


@in_loop
async def test_another_conversation_gets_another_session_as_long_as_there_are_any() -> None:
    pool = pool_of(2)
    numbers = [await answer(pool, [*range(20), *range(at, at + 100)]) for at in (1000, 2000, 3000)]
    assert numbers[0] != numbers[1] and numbers[2] == numbers[0]  # all open: the one that was not used for longest
    pool.close()


@in_loop
async def test_requests_beyond_the_sessions_wait_in_order() -> None:
    pool, ended = pool_of(1), list[int]()

    async def ask(number: int) -> None:
        await answer(pool, [number], 2, pause=0.01)
        ended.append(number)

    tasks = [asyncio.create_task(ask(number)) for number in range(6)]
    await asyncio.sleep(0.005)
    tasks[3].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert ended == [0, 1, 2, 4, 5]
    pool.close()


@in_loop
async def test_too_many_that_wait_are_refused() -> None:
    pool = pool_of(1)
    async with pool.lease():
        waiting = [asyncio.create_task(answer(pool, [1], 1)) for _ in range(MOST_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refusal:
            await answer(pool, [1])
        assert (refusal.value.status, refusal.value.code) == (429, "queue_full") and refusal.value.retry_after
    assert len(set(await asyncio.gather(*waiting))) == 1
    pool.close()


@in_loop
async def test_an_answer_that_is_left_is_cancelled_and_its_session_free_again() -> None:
    pool = pool_of(1)
    async with pool.lease() as lease:
        left = Counting(lease.client, [], 1000, pause=0.05)
        async for _ in lease.run(left):
            break
    assert left.cancelled.is_set()
    began = time.monotonic()
    await answer(pool, [5])
    assert time.monotonic() - began < 1
    pool.close()


@in_loop
async def test_a_session_is_not_given_on_before_its_thread_is_done() -> None:
    pool = pool_of(1)
    busy = threading.Event()

    async def slow() -> None:
        async with pool.lease() as lease:
            await lease.call(lambda: (time.sleep(0.1), busy.set()))

    task = asyncio.create_task(slow())
    await asyncio.sleep(0.02)
    task.cancel()
    async with pool.lease():
        assert busy.is_set()
    pool.close()


@in_loop
async def test_a_call_that_is_left_is_interrupted_and_its_session_free_again() -> None:
    pool = pool_of(1)

    async def ask() -> None:
        async with pool.lease() as lease:
            await lease.call(lambda: (time.sleep(0.05), lease.client.wait()))  # the first interruption comes too early

    left = asyncio.create_task(ask())
    await asyncio.sleep(0.02)
    left.cancel()
    await answer(pool, [5])
    assert left.cancelled()
    pool.close()


@in_loop
async def test_stopping_ends_a_call_and_nothing_begins_after_it() -> None:
    pool = pool_of(1)
    async with pool.lease() as lease:
        asyncio.get_running_loop().call_later(0.02, pool.stop)
        with pytest.raises(Cancelled):
            await lease.call(lease.client.wait)
        with pytest.raises(Cancelled):
            await lease.call(lambda: None)
        with pytest.raises(Cancelled):
            [piece async for piece in lease.run(Counting(lease.client, [], 3))]
    pool.close()


@in_loop
async def test_an_answer_runs_outside_of_the_event_loop_s_thread() -> None:
    pool = pool_of(1)
    async with pool.lease() as lease:
        running = Counting(lease.client, [], 3)
        steps = [step async for step in lease.steps(running)]
    assert running.thread != threading.get_ident()
    assert [(step.text, step.tokens) for step in steps] == [("0 ", 1), ("1 ", 2), ("2 ", 3), ("", 3)]
    pool.close()


@in_loop
async def test_what_an_answer_raises_reaches_who_asked() -> None:
    pool = pool_of(1)
    with pytest.raises(ValueError, match="out of ink"):
        await answer(pool, [1], fails=ValueError("out of ink"))
    await answer(pool, [1])
    pool.close()


async def unreachable_call(lease: Lease[Session]) -> None:
    def fail() -> None:
        raise UnreachableError("cloud: gone")

    await lease.call(fail)


async def unreachable_answer(lease: Lease[Session]) -> None:
    [piece async for piece in lease.run(Counting(lease.client, [1], 3, fails=UnreachableError("cloud: gone")))]


@pytest.mark.parametrize("ask", [unreachable_call, unreachable_answer])
def test_a_session_whose_cloud_is_gone_is_replaced(ask: Callable[[Lease[Session]], Coroutine[Any, Any, None]]) -> None:
    @in_loop
    async def test() -> None:
        pool = pool_of(1)
        async with pool.lease() as lease:
            gone = lease.client
            with pytest.raises(UnreachableError):
                await ask(lease)
        async with pool.lease() as lease:
            assert gone.closed and lease.client is not gone and not lease.client.closed
        pool.close()

    test()


@in_loop
async def test_stopping_ends_answers_and_those_who_wait() -> None:
    pool = pool_of(1)
    running = asyncio.create_task(answer(pool, [1], 1000, pause=0.05))
    await asyncio.sleep(0.02)
    waiting = asyncio.create_task(answer(pool, [2]))
    await asyncio.sleep(0.02)
    pool.stop()
    with pytest.raises(RuntimeError, match="cancelled"):
        await running
    for refused in (waiting, answer(pool, [3])):
        with pytest.raises(ApiError, match="stopping"):
            await refused
    session = pool._seats[0].client
    pool.close()
    assert session.closed


@in_loop
async def test_observers_know_whose_frame_it_was() -> None:
    seen: list[WireEvent] = []
    pool = pool_of(2, observed=seen.append)
    async with pool.lease() as one, pool.lease() as other:
        one.client.on_frame("up", b"one")
        other.client.on_frame("down", b"other")
        assert [(event.assistant_number, event.way, event.frame) for event in seen] == [
            (one.number, "up", b"one"),
            (other.number, "down", b"other"),
        ]
    pool.close()
