"""One connection: carries frames between a socket, its session and the scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from websockets.frames import CloseCode

from cloud_backend.admission import Allowance
from cloud_backend.engine import Work
from cloud_backend.limits import Limits
from cloud_backend.record import Record, positions
from cloud_backend.scheduler import Scheduler
from cloud_backend.session import Session
from cloud_backend.sockets import Closed, Socket
from shared.wire import ErrorCode

log = logging.getLogger("stip.cloud")

LAST_SECONDS = 2.0  # for a device to take a reply once the server stops, or its token is gone


class Connection:
    """Carries frames between one socket, its session and the scheduler.

    token: the hash of the one it was opened with. allowance: what that token may still compute; None: all it wants.
    """

    def __init__(self, socket: Socket, session: Session, scheduler: Scheduler, limits: Limits, record: Record) -> None:
        self.token: str | None = None
        self.allowance: Allowance | None = None
        self.record = record
        session.on_error = record.error
        self._socket = socket
        self._session = session
        self._scheduler = scheduler
        self._limits = limits
        self._received = asyncio.Event()
        self._answered = asyncio.Event()
        self._over = False  # nothing will be answered any more: the socket is gone
        self._sending = asyncio.Lock()  # keeps frames in order while a slow reader holds one up
        self._send_seconds = limits.send_seconds
        self._send_timeout: asyncio.Timeout | None = None  # of the frame that is being sent
        self._draining = False  # what is still sent is not read
        self._closing: asyncio.Task[None] | None = None
        session.on_displaced = self._displaced

    @property
    def model(self) -> str | None:
        """The served model of its session."""
        return None if self._session.context is None else self._session.context.served_name

    @property
    def closing(self) -> bool:
        """Whether its session has ended, though the socket may not have yet."""
        return self._session.closing is not None

    def bearers(self) -> list[str]:
        """The tokens of its handshake."""
        return self._socket.bearers

    async def run(self) -> None:
        """Until the socket closes, or the session wants it closed."""
        worker = asyncio.create_task(self._work())
        try:
            with contextlib.suppress(Closed):
                while self._session.closing is None:
                    await self._receive()
                    self._received.set()
                    await self.flush()
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker
            self._ended()

    async def _receive(self) -> None:
        session = self._session
        while session.full and not self._over:  # whoever sends faster than it is answered waits in its own socket
            self._answered.clear()
            await self._answered.wait()
        seconds = self._limits.idle_seconds if session.context else self._limits.open_seconds
        try:
            async with asyncio.timeout(seconds):  # unlike wait_for, it makes no task for every frame
                frame = await self._socket.receive()
        except TimeoutError:
            if not session.busy:
                session.fail("idle", f"nothing was sent for {seconds:g} s")
            return
        if isinstance(frame, str):
            session.fail("bad_frame", "frame: seen text, wanted binary")
            return
        if self._draining:
            return
        self.record.received(len(frame))
        opening = session.context is None
        session.receive(frame)
        if opening and session.context:
            self._socket.came_in(self._limits.longest_frame)
            self.record.opened(session.context.served_name, session.public_id)

    async def _work(self) -> None:
        """Answers until the socket is gone. Should that fail, the connection ends."""
        try:
            with contextlib.suppress(Closed):
                await self._answer()
        except Exception as error:
            log.error("connection failed: %s", type(error).__name__)  # its text could quote tensors
            self._session.closing = self._session.closing or (CloseCode.INTERNAL_ERROR, "the cloud failed")
            self._session.outbox.clear()
            await self._close()
        finally:
            self._ended()

    def _ended(self) -> None:
        """Nothing is answered any more: a reader that waits for room, or a drain for answers, would wait forever."""
        self._over = True
        self._answered.set()

    async def _answer(self) -> None:
        """Takes the session's work to the engine, one after the other, and sends what comes of it."""
        session = self._session
        while True:
            await self._received.wait()
            self._received.clear()
            while (work := await self._next()) is not None:
                assert session.context is not None
                engine, arrived = session.context.engine, session.arrived
                timed = await self._scheduler.submit(engine, work, session.dropped)
                self.record.answered(engine, work, arrived, timed.result)
                session.finish(timed.result, queue_us=timed.queue_us, compute_us=timed.compute_us)
                self._answered.set()
                await self.flush()
            self._answered.set()
            await self.flush()

    async def _next(self) -> Work | None:
        """The next work, once the token may have it computed. A request that waits for that can still be cancelled."""
        if self.allowance is None or not self._session.busy:
            return self._session.start()
        await self.allowance.turn()
        work = self._session.start()
        if work is not None and self._session.context is not None:
            self.allowance.charge(positions(self._session.context.engine, work))
        return work

    async def flush(self) -> None:
        """Sends what the session has to say, and closes if it wants to. A device that takes nothing loses the line."""
        try:
            async with self._sending:
                while self._session.outbox:
                    frame = self._session.outbox.popleft()
                    async with asyncio.timeout(self._send_seconds) as self._send_timeout:
                        await self._socket.send(frame)
                    self.record.sent(len(frame))
            if self._session.closing is not None:
                async with asyncio.timeout(self._send_seconds):
                    await self._socket.close(*self._session.closing)
        except TimeoutError:
            self._socket.abort()
        finally:
            self._send_timeout = None

    def _displaced(self) -> None:
        self._closing = asyncio.create_task(self._close())

    async def _close(self) -> None:
        self._answered.set()  # a reader that waits for room waits for nothing
        with contextlib.suppress(Closed):
            await self.flush()

    async def drain(self) -> None:
        """Takes no request any more, answers those it has, and ends the session."""
        self._draining = True
        self._hurry()
        while self._session.busy and not self._over:
            self._answered.clear()
            await self._answered.wait()
        await self.end("shutting_down", "the cloud stops")

    async def end(self, code: ErrorCode, text: str) -> None:
        """Tells the device why the session ends, and closes; a device that does not read is not waited for."""
        self._hurry()
        self._session.fail(code, text)
        await self._close()

    def _hurry(self) -> None:
        """From now on, and for the frame that is being sent, a device has little time to take a reply."""
        self._send_seconds = min(self._send_seconds, LAST_SECONDS)
        if self._send_timeout is not None and not self._send_timeout.expired():
            self._send_timeout.reschedule(asyncio.get_running_loop().time() + self._send_seconds)
