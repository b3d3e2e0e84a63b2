"""The socket: a thin shell around sessions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

from websockets.asyncio.server import Server, ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.typing import Origin

from cloud_backend.admission import Allowance, CountedConnection, Doorstep
from cloud_backend.engine import Work
from cloud_backend.health import Health
from cloud_backend.http import Pages
from cloud_backend.leases import Leases
from cloud_backend.limits import Limits
from cloud_backend.listener import listen, nobody, running, url
from cloud_backend.metrics import Metrics
from cloud_backend.record import Record, positions
from cloud_backend.scheduler import Scheduler
from cloud_backend.session import Context, Session
from cloud_backend.tokens import Tokens
from cloud_backend.watch import LOOK_SECONDS
from shared.errors import RequestError, UsageError
from shared.loopback import is_loopback
from shared.wire import SUBPROTOCOL, ErrorCode

log = logging.getLogger("stip.cloud")
LAST_SECONDS = 2.0  # for a device to take a reply once the server stops, or its token is gone


class CloudServer:
    """Serves contexts to devices over websockets. `health` and `metrics` are its own."""

    def __init__(
        self, contexts: Iterable[Context], limits: Limits, tokens: Tokens | None, scheduler: Scheduler | None = None
    ) -> None:
        """tokens: None takes anyone, on loopback alone. scheduler: the one in whose thread the models are loaded."""
        self._contexts: dict[tuple[str, str], Context] = {}
        self._limits = limits
        self._tokens = tokens
        self._scheduler = scheduler or Scheduler()
        self._connections: set[_Connection] = set()
        self._leases = Leases(limits.grace_seconds, self._scheduler.release)
        self._doorstep = Doorstep(limits.max_unopened if tokens else None)
        self._allowances: dict[str, Allowance] = {}  # by the hash of the token that sessions share
        self.health = Health(self._scheduler, lambda: len(self._connections), limits.max_sessions)
        self.metrics = self._measured()
        self.add(contexts)

    @property
    def max_sessions(self) -> int:
        """Sessions that it takes at a time."""
        return self._limits.max_sessions

    def add(self, contexts: Iterable[Context]) -> None:
        """Serves these contexts too."""
        added = {(context.served_name, context.key_id): context for context in contexts}
        self._contexts.update(added)
        self.metrics.serve(added.values())

    def _measured(self) -> Metrics:
        metrics = Metrics()
        metrics.sessions_open = lambda model: sum(connection.model == model for connection in self._connections)
        metrics.sessions_held = self._leases.held
        metrics.requests_waiting = lambda: self._scheduler.waiting
        self._scheduler.on_step = metrics.step
        self._scheduler.on_evict = metrics.evicted
        return metrics

    @asynccontextmanager
    async def listening(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        origins: Iterable[str] = (),
        metrics_at: tuple[str, int] | None = None,
    ) -> AsyncIterator[Server]:
        """The server, listening, until the block ends; then every session is told and closed.

        On loopback it answers for its health and metrics too, beyond it for its health alone. metrics_at: the host and
        port of a plain HTTP listener that answers for both.

        Raises UsageError for a host beyond loopback without tokens, and for an address that cannot be had.
        """
        only_loopback = is_loopback(host)
        if self._tokens is None and not only_loopback:
            raise UsageError(
                f"host {host}: seen an address beyond loopback and no token file",
                hint="make a token with `stip-cloud token --token-file F`, then serve with --token-file F",
            )
        allowed = frozenset(origins)
        shown = self.metrics if only_loopback else None
        pages = Pages(self.health, shown, only_loopback, allowed, devices=True)
        server = await listen(
            "--port",
            self._serve,
            host,
            port,
            ssl=tls,
            subprotocols=[SUBPROTOCOL],
            origins=[None, *map(Origin, allowed)],
            process_request=pages,
            create_connection=type("Connection", (CountedConnection,), {"doorstep": self._doorstep}),
            # Frames a little beyond the limit still get their Error; larger ones only close code 1009.
            max_size=2 * self._limits.max_frame,
            max_queue=4,
        )
        async with AsyncExitStack() as ending:  # the server ends before the engines that its sessions wait for
            self.health.engines = await ending.enter_async_context(running("engines", self._scheduler.run()))
            await ending.enter_async_context(server)
            if metrics_at is not None:
                pages = Pages(self.health, self.metrics, is_loopback(metrics_at[0]))
                other = await listen("--metrics-port", nobody, *metrics_at, process_request=pages)
                await ending.enter_async_context(other)
                log.info("metrics on %s", url("http", metrics_at[0], other))
            await ending.enter_async_context(running("tokens", self._keep_tokens_fresh()))
            await ending.enter_async_context(running("leases", self._end_leases()))
            yield server
            await self._tell_everyone()

    async def drain(self, seconds: float) -> None:
        """Lets nobody in any more, answers what was received, and ends each session when it has its answers.

        Sessions that have not got them after so many seconds are left.
        """
        self.health.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(connection.drain() for connection in self._connections), return_exceptions=True)

    async def _keep_tokens_fresh(self) -> None:
        """Once a second, until cancelled: reads the tokens again, and ends the sessions of those that are gone."""
        while (tokens := self._tokens) is not None:
            await asyncio.sleep(LOOK_SECONDS)
            if tokens.look():
                self._leases.expire(known=tokens.known)
                revoked = [each for each in self._connections if each.token and not tokens.known(each.token)]
                ends = (connection.end("unauthorized", "token: it is no longer known here") for connection in revoked)
                await asyncio.gather(*ends, return_exceptions=True)

    async def _end_leases(self) -> None:
        """Once a second, until cancelled: ends the sessions that nobody came back to."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._leases.expire()

    async def _serve(self, socket: ServerConnection) -> None:
        session = Session(self._contexts, self._limits, lambda token: self._owner(connection, token), self._leases)
        connection = _Connection(socket, session, self._scheduler, self._limits, Record(self.metrics))
        if len(self._connections) >= self._limits.max_sessions:
            session.fail(
                "too_many_sessions", f"sessions: {len(self._connections)} are open, the most this server takes"
            )
            await connection.flush()
            return
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            # A device that says goodbye does not come back, nor is one welcome that was sent away.
            session.leave(keep=session.closing is None and socket.close_code != CloseCode.NORMAL_CLOSURE)
            connection.record.closed(len(self._connections))

    def _owner(self, connection: _Connection, token: str | None) -> str | None:
        """The hash of the connection's token, None where it is not known.

        Raises RequestError where the token has all its sessions.
        """
        if self._tokens is None:
            return "anyone"
        digests = [self._tokens.digest_of(given) for given in (token, *connection.bearers())]
        digest = next(filter(None, digests), None)
        if digest is None:
            return None
        count, most = sum(other.token == digest for other in self._connections), self._limits.token_sessions
        if count >= most:
            raise RequestError("too_many_sessions", f"sessions: {count} of this token are open, the most it may have")
        connection.token = digest
        if rate := self._limits.token_rate:
            connection.allowance = self._allowances.setdefault(digest, Allowance(rate))
        return digest

    async def _tell_everyone(self) -> None:
        ends = (connection.end("shutting_down", "the cloud stops") for connection in self._connections)
        await asyncio.gather(*ends, return_exceptions=True)


class _Connection:
    """Carries frames between one socket, its session and the scheduler.

    token: the hash of the one it was opened with. allowance: what that token may still compute; None: all it wants.
    """

    def __init__(
        self, socket: ServerConnection, session: Session, scheduler: Scheduler, limits: Limits, record: Record
    ) -> None:
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
        self._closer: asyncio.Task[None] | None = None
        session.on_displaced = self._displaced

    @property
    def model(self) -> str | None:
        """The served model of its session."""
        return None if self._session.context is None else self._session.context.served_name

    def bearers(self) -> list[str]:
        """The tokens of its handshake (RFC 6750 §2.1)."""
        assert self._socket.request is not None
        parts = [header.partition(" ") for header in self._socket.request.headers.get_all("Authorization")]
        return [given for scheme, _, given in parts if scheme.lower() == "bearer"]

    async def run(self) -> None:
        """Until the socket closes, or the session wants it closed."""
        worker = asyncio.create_task(self._work())
        with contextlib.suppress(ConnectionClosed):
            while self._session.closing is None:
                await self._receive()
                self._received.set()
                await self.flush()
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker
        self._over = True
        self._answered.set()  # a drain that waits for answers would wait for all its time

    async def _receive(self) -> None:
        session = self._session
        while session.full and not self._over:  # whoever sends faster than it is answered waits in its own socket
            self._answered.clear()
            await self._answered.wait()
        seconds = self._limits.idle_seconds if session.context else self._limits.open_seconds
        try:
            async with asyncio.timeout(seconds):  # unlike wait_for, it makes no task for every frame
                frame = await self._socket.recv()
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
            self._socket.came_in()  # type: ignore[attr-defined]  # a CountedConnection
            self.record.opened(session.context.served_name, session.public_id)

    async def _work(self) -> None:
        """Takes the session's work to the engine, one after the other, and sends what comes of it."""
        session = self._session
        with contextlib.suppress(ConnectionClosed):
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
        self._over = True
        self._answered.set()  # a reader that waits for room would wait forever

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
            self._socket.transport.abort()  # close() would wait without end for room to write its own frame
        finally:
            self._send_timeout = None

    def _displaced(self) -> None:
        self._closer = asyncio.ensure_future(self.flush())

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
        with contextlib.suppress(ConnectionClosed):
            await self.flush()

    def _hurry(self) -> None:
        """From now on, and for the frame that is being sent, a device has little time to take a reply."""
        self._send_seconds = min(self._send_seconds, LAST_SECONDS)
        if self._send_timeout is not None and not self._send_timeout.expired():
            self._send_timeout.reschedule(asyncio.get_running_loop().time() + self._send_seconds)
