"""The open sessions of one model: who gets which, who waits, and how a blocking answer reaches the event loop.

A session's KV cache in the cloud holds the last conversation that it answered. A request gets the session that holds
the longest beginning of its prompt, so that only the rest is sent.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from device_app.answer import STOPPED
from device_app.gateway.errors import RETRY_SECONDS, ApiError
from shared.errors import Cancelled, UnreachableError

MOST_WAITING = 64  # requests of one model that wait for a session
OPENING = 16  # tokens whose sending is about as slow as to open a session
AGAIN_SECONDS = 0.2  # between interruptions of a call: one may come just before it asks the cloud, and be missed

OnFrame = Callable[[str, bytes], None]
_numbers = itertools.count(1)


@dataclass(frozen=True)
class WireEvent:
    """A frame as it travelled. at: Unix time."""

    assistant_number: int
    way: Literal["up", "down"]
    frame: bytes
    at: float


class Client(Protocol):
    """An Assistant or an Encoder."""

    def interrupt(self, error: BaseException | None = None) -> None: ...

    def close(self) -> None: ...


class RunningAnswer(Protocol):
    """What of an Answer is needed here."""

    ids: list[int]
    stats: Any

    def __iter__(self) -> Iterator[str]: ...

    def cancel(self) -> None: ...


C = TypeVar("C", bound=Client)
R = TypeVar("R")


@dataclass(frozen=True)
class Step:
    """A piece of an answer's text, and how many tokens there were when it was made."""

    text: str
    tokens: int


class _Seat(Generic[C]):
    """One session and the thread that uses it."""

    def __init__(self, open_one: Callable[[OnFrame], C], observed: Callable[[WireEvent], None]) -> None:
        number = self.number = next(_numbers)

        def on_frame(way: Any, frame: bytes) -> None:
            observed(WireEvent(number, way, frame, time.time()))

        self._open: Callable[[], C] = lambda: open_one(on_frame)
        self.client = self._open()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix=f"session-{number}")
        self.held = 0  # tokens of its last conversation
        self.used = 0.0

    def run(self, function: Callable[[], R]) -> R:
        """`function()`. A session whose cloud is gone is replaced by another: who asks next is told so at once."""
        try:
            return function()
        except UnreachableError:
            self.client.close()
            self.client, self.held = self._open(), 0
            raise


class Lease(Generic[C]):
    """One request's hold on a session. Blocking calls run in the session's own thread, one at a time."""

    def __init__(self, seat: _Seat[C]) -> None:
        self._seat = seat
        self._answer: RunningAnswer | None = None  # what the work is, unless it is a call
        self._work: asyncio.Future[Any] | None = None
        self._cancelled = False

    @property
    def client(self) -> C:
        """The Assistant (or Encoder) itself."""
        return self._seat.client

    @property
    def number(self) -> int:
        """What observers know the session by."""
        return self._seat.number

    async def call(self, function: Callable[[], R]) -> R:
        """`function()`, in the session's thread. Raises what it does, and Cancelled: leaving early interrupts it where
        it waits for the cloud."""
        return await asyncio.shield(self._begun(lambda: self._seat.run(function)))

    async def run(self, answer: RunningAnswer) -> AsyncGenerator[str, None]:
        """The pieces of an answer as they come. Leaving early cancels it, within 0.2 s. Raises what the answer does."""
        async with aclosing(self.steps(answer)) as steps:
            async for step in steps:
                yield step.text

    async def steps(self, answer: RunningAnswer) -> AsyncGenerator[Step, None]:
        """As `run`, with the number of tokens so far; the last step, which may have no text, has all of them."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()
        seat = self._seat

        def tell(item: Step | BaseException | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def make() -> None:
            for piece in answer:
                tell(Step(piece, len(answer.ids)))
            tell(Step("", len(answer.ids)))

        def work() -> None:
            try:
                seat.run(make)
            except BaseException as error:  # whatever it is, it belongs to who waits for the answer
                tell(error)
            else:
                seat.held = answer.stats.prompt_tokens + len(answer.ids)
                tell(None)

        begun = self._begun(work, answer)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
            await asyncio.shield(begun)  # its thread is idle: who asks next, asks the same session
        finally:
            answer.cancel()

    def cancel(self) -> None:
        """Ends the answer or the call that runs, if any; nothing begins after it."""
        cancelled, self._cancelled = self._cancelled, True
        if self._answer is not None:
            self._answer.cancel()
        elif not cancelled:
            self._interrupt()

    def _begun(self, work: Callable[[], R], answer: RunningAnswer | None = None) -> asyncio.Future[R]:
        if self._cancelled:
            raise Cancelled(STOPPED)
        begun = asyncio.get_running_loop().run_in_executor(self._seat.worker, work)
        self._work, self._answer = begun, answer
        return begun

    def _interrupt(self) -> None:
        """Until the call is over. Its client forgets what comes too late when it is asked again."""
        if self._work is not None and not self._work.done():
            self._seat.client.interrupt(Cancelled(STOPPED))
            self._work.get_loop().call_later(AGAIN_SECONDS, self._interrupt)

    def end(self, free: Callable[[], None]) -> None:
        """Cancels what still runs; `free` is called once the session's thread is idle."""
        self.cancel()
        if self._work is None or self._work.done():
            free()
        else:
            self._work.add_done_callback(lambda work: _after(work, free))


class Pool(Generic[C]):
    """Up to `sessions` sessions of one model, opened as they are needed."""

    def __init__(
        self,
        open_one: Callable[[OnFrame], C],
        *,
        sessions: int,
        shared: Callable[[C, Sequence[int]], int] = lambda client, ids: 0,
        observed: Callable[[WireEvent], None] = lambda event: None,
    ) -> None:
        """open_one: makes a client that reports its frames. shared: how many of some ids a client's session holds."""
        self._open_one = open_one
        self._most = sessions
        self._shared = shared
        self._observed = observed
        self._seats: list[_Seat[C]] = []
        self._idle: list[_Seat[C]] = []
        self._waiting: deque[asyncio.Future[_Seat[C]]] = deque()
        self._leases: set[Lease[C]] = set()
        self._stopped = False

    @asynccontextmanager
    async def lease(self, ids: Sequence[int] = ()) -> AsyncIterator[Lease[C]]:
        """The session that suits a prompt best; where all are busy, the next that is free, in order of asking.

        Raises ApiError: 429 where too many wait already, 503 where the gateway stops.
        """
        seat = await self._seat(ids)
        lease = Lease(seat)
        self._leases.add(lease)
        try:
            yield lease
        finally:
            self._leases.discard(lease)
            lease.end(lambda: self._free(seat))

    async def _seat(self, ids: Sequence[int]) -> _Seat[C]:
        if self._stopped:
            raise _stopping()
        if not self._waiting and (seat := self._choose(ids)) is not None:
            return seat
        if len(self._waiting) >= MOST_WAITING:
            raise ApiError(
                429,
                f"seen {MOST_WAITING} requests that wait for one of {self._most} sessions already; try again later",
                code="queue_full",
                retry_after=RETRY_SECONDS,
            )
        turn: asyncio.Future[_Seat[C]] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._free(turn.result())  # it was this one's turn just then
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _choose(self, ids: Sequence[int]) -> _Seat[C] | None:
        """The idle session that costs least, or a new one; None where all are busy."""
        best = min(self._idle, key=lambda seat: (self._cost(seat, ids), seat.used), default=None)
        if len(self._seats) < self._most and (best is None or self._cost(best, ids) > len(ids) + OPENING):
            seat = _Seat(self._open_one, self._observed)
            self._seats.append(seat)
            return seat
        if best is not None:
            self._idle.remove(best)
        return best

    def _cost(self, seat: _Seat[C], ids: Sequence[int]) -> float:
        """In tokens: those to be sent now, and half of those that are given up, as somebody may go on there."""
        shared = self._shared(seat.client, ids)
        return len(ids) - shared + max(0, seat.held - shared) / 2

    def _free(self, seat: _Seat[C]) -> None:
        seat.used = time.monotonic()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(seat)
                return
        self._idle.append(seat)

    def stop(self) -> None:
        """Ends all answers, and lets nobody in any more."""
        self._stopped = True
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(_stopping())
        for lease in tuple(self._leases):
            lease.cancel()

    def close(self) -> None:
        """After `stop`: ends the sessions. Blocks until their threads are done."""
        for seat in self._seats:
            seat.worker.submit(seat.client.close)
            seat.worker.shutdown()


def _after(work: asyncio.Future[Any], free: Callable[[], None]) -> None:
    if not work.cancelled():
        work.exception()  # nobody waits for it any more
    free()


def _stopping() -> ApiError:
    return ApiError(503, "the gateway is stopping", code="stopping", retry_after=RETRY_SECONDS)
