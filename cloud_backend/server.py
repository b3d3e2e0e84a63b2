"""The socket: a thin shell around sessions, and the life of the process."""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import signal
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.typing import Origin

from cloud_backend.leases import Leases
from cloud_backend.limits import Limits
from cloud_backend.scheduler import Scheduler
from cloud_backend.session import Context, Session
from cloud_backend.tokens import Tokens
from shared.errors import UsageError
from shared.loopback import is_loopback
from shared.wire import SUBPROTOCOL

log = logging.getLogger("stip.cloud")


class CloudServer:
    """Serves contexts to devices over websockets."""

    def __init__(
        self, contexts: Iterable[Context], limits: Limits, tokens: Tokens | None, scheduler: Scheduler | None = None
    ) -> None:
        """tokens: None takes anyone, on loopback alone. scheduler: the one in whose thread the models were loaded."""
        self._contexts = {(context.served_name, context.key_id): context for context in contexts}
        self._limits = limits
        self._tokens = tokens
        self._scheduler = scheduler or Scheduler()
        self._connections: set[_Connection] = set()
        self._leases = Leases(limits.grace_seconds, self._scheduler.release)
        self._only_loopback = False

    @asynccontextmanager
    async def listening(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        origins: Iterable[str] = (),
    ) -> AsyncIterator[Server]:
        """The server, listening, until the block ends; then every session is told and closed.

        Raises UsageError for a host beyond loopback without tokens, and for an address that cannot be had.
        """
        self._only_loopback = is_loopback(host)
        if self._tokens is None and not self._only_loopback:
            raise UsageError(
                f"host {host}: seen an address beyond loopback and no token file",
                hint="make a token with `stip-cloud token --token-file F`, then serve with --token-file F",
            )
        try:
            server = await serve(
                self._serve,
                host,
                port,
                ssl=tls,
                subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]  # a NewType of str
                compression=None,  # floats hardly shrink, and it costs 100 times the transfer
                # A page on another site must not use this server through a visitor's browser (RFC 6455 §10.2).
                origins=[None, *map(Origin, origins)],
                process_request=self._check_host,
                # Frames a little beyond the limit still get their Error; larger ones only close code 1009.
                max_size=2 * self._limits.max_frame,
                max_queue=4,
                close_timeout=2,
                server_header=None,
            )
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host} port {port}: {error.strerror}", hint="is it in use? try --port"
            ) from None
        engines = asyncio.create_task(self._scheduler.run())
        expiry = asyncio.create_task(self._expire())
        try:
            async with server:
                yield server
                await self._tell_everyone()
        finally:
            expiry.cancel()
            engines.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await engines

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._leases.expire()

    def _check_host(self, connection: ServerConnection, request: Request) -> Response | None:
        """On loopback, refuses names that only DNS rebinding would bring here."""
        host = request.headers.get("Host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._only_loopback and not is_loopback(name):
            return connection.respond(http.HTTPStatus.FORBIDDEN, "Host: wanted a loopback name\n")
        return None

    async def _serve(self, socket: ServerConnection) -> None:
        session = Session(
            self._contexts,
            self._limits,
            lambda token: "anyone" if self._authorized(socket, token) else None,
            self._leases,
        )
        connection = _Connection(socket, session, self._scheduler, self._limits)
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
            log.info("session closed, %d open", len(self._connections))

    def _authorized(self, socket: ServerConnection, token: str | None) -> bool:
        if self._tokens is None:
            return True
        assert socket.request is not None
        tokens = [token]
        for header in socket.request.headers.get_all("Authorization"):
            scheme, _, given = header.partition(" ")
            tokens += [given] if scheme.lower() == "bearer" else []
        return any(self._tokens.accept(given) for given in tokens)

    async def _tell_everyone(self) -> None:
        await asyncio.gather(*(connection.shut_down() for connection in self._connections), return_exceptions=True)


class _Connection:
    """Carries frames between one socket, its session and the scheduler."""

    def __init__(self, socket: ServerConnection, session: Session, scheduler: Scheduler, limits: Limits) -> None:
        self._socket = socket
        self._session = session
        self._scheduler = scheduler
        self._limits = limits
        self._received = asyncio.Event()
        self._answered = asyncio.Event()
        self._over = False  # nothing will be answered any more: the socket is gone
        self._sending = asyncio.Lock()  # keeps frames in order while a slow reader holds one up
        self._closer: asyncio.Task[None] | None = None
        session.on_displaced = self._displaced

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
        opening = session.context is None
        session.receive(frame)
        if opening and session.context:
            log.info("session opened on %s", session.context.served_name)

    async def _work(self) -> None:
        """Takes the session's work to the engine, one after the other, and sends what comes of it."""
        session = self._session
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._received.wait()
                self._received.clear()
                while (work := session.start()) is not None:
                    assert session.context is not None
                    timed = await self._scheduler.submit(session.context.engine, work, session.dropped)
                    session.finish(timed.result, queue_us=timed.queue_us, compute_us=timed.compute_us)
                    self._answered.set()
                    await self.flush()
                self._answered.set()
                await self.flush()
        self._over = True
        self._answered.set()  # a reader that waits for room would wait forever

    async def flush(self) -> None:
        """Sends what the session has to say, and closes if it wants to."""
        async with self._sending:
            while self._session.outbox:
                await self._socket.send(self._session.outbox.popleft())
        if self._session.closing is not None:
            await self._socket.close(*self._session.closing)

    def _displaced(self) -> None:
        self._closer = asyncio.ensure_future(self.flush())

    async def shut_down(self) -> None:
        """Tells the device that the cloud stops; a device that does not read is not waited for."""
        self._session.fail("shutting_down", "the cloud stops")
        try:
            await asyncio.wait_for(self.flush(), 2)
        except ConnectionClosed:
            pass
        except TimeoutError:
            self._socket.transport.abort()  # close() would wait without end for room to write its own frame


async def serve_until_stopped(
    server: CloudServer, host: str, port: int, *, tls: ssl.SSLContext | None, origins: Iterable[str]
) -> None:
    """Serves until SIGTERM or SIGINT, then closes every session and returns."""
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    async with server.listening(host, port, tls=tls, origins=origins) as listener:
        actual = listener.sockets[0].getsockname()[1]
        log.info("listening on %s://%s:%d", "wss" if tls else "ws", f"[{host}]" if ":" in host else host, actual)
        await stop.wait()
        log.info("stopping")
