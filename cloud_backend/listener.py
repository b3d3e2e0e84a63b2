"""The listener of `stip-cloud serve`: websockets' sockets for a server, and plain HTTP beside them."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin

from cloud_backend.admission import Doorstep
from cloud_backend.http import Pages
from cloud_backend.server import CloudServer
from cloud_backend.sockets import GOODBYE, LONGEST_OPEN, Closed, bearer_tokens
from shared.errors import UsageError
from shared.loopback import is_loopback
from shared.wire import SUBPROTOCOL

log = logging.getLogger("stip.cloud")
Handler = Callable[[ServerConnection], Awaitable[None]]


class CountedConnection(ServerConnection):
    """A connection that stands on the doorstep from its start until `came_in`, or its end."""

    doorstep: Doorstep  # of the server: set by a subclass

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self._leave = self.doorstep.enter(peer[0] if peer else None)  # None: gone before its first byte
        if self._leave is None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.came_in()
        super().connection_lost(exc)

    def came_in(self) -> None:
        """It has opened a session."""
        if self._leave is not None:
            self._leave()


class ListenerSocket:
    """A Socket of websockets' server."""

    def __init__(self, connection: CountedConnection) -> None:
        self._connection = connection

    @property
    def bearers(self) -> list[str]:
        """The tokens of its handshake."""
        assert self._connection.request is not None
        return bearer_tokens(self._connection.request.headers.get_all("Authorization"))

    @property
    def said_goodbye(self) -> bool:
        """Whether the device does not mean to come back."""
        return self._connection.close_code == GOODBYE

    async def receive(self) -> bytes | str:
        """The next message. Raises Closed."""
        try:
            return await self._connection.recv()
        except ConnectionClosed:
            raise Closed from None

    async def send(self, frame: bytes) -> None:
        """Sends a binary message. Raises Closed."""
        try:
            await self._connection.send(frame)
        except ConnectionClosed:
            raise Closed from None

    async def close(self, code: int, reason: str) -> None:
        """Closes it, and waits a little for the device to do so too."""
        await self._connection.close(code, reason)

    def abort(self) -> None:
        """Ends it at once: close() would wait without end for room to write its own frame."""
        self._connection.transport.abort()

    def came_in(self, max_size: int) -> None:
        """A session was opened on it."""
        self._connection.came_in()
        self._connection.protocol.max_message_size = max_size


@asynccontextmanager
async def listening(
    server: CloudServer,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    origins: Iterable[str] = (),
    metrics_at: tuple[str, int] | None = None,
) -> AsyncIterator[Server]:
    """The server at work, and its listener, until the block ends; then every session is told and closed.

    On loopback it answers for its health and metrics too, beyond it for its health alone. metrics_at: the host and
    port of a plain HTTP listener that answers for both.

    Raises UsageError for a host beyond loopback without tokens, and for an address that cannot be had.
    """
    only_loopback = is_loopback(host)
    if server.takes_anyone and not only_loopback:
        raise UsageError(
            f"host {host}: seen an address beyond loopback and no token file",
            hint="make a token with `stip-cloud token --token-file F`, then serve with --token-file F",
        )

    async def handle(connection: ServerConnection) -> None:
        assert isinstance(connection, CountedConnection)
        await server.serve(ListenerSocket(connection))

    allowed = frozenset(origins)
    shown = server.metrics if only_loopback else None
    listener = await _listen(
        "--port",
        handle,
        host,
        port,
        ssl=tls,
        subprotocols=[SUBPROTOCOL],
        origins=[None, *map(Origin, allowed)],
        process_request=Pages(server.health, shown, only_loopback, allowed, devices=True),
        create_connection=type("Connection", (CountedConnection,), {"doorstep": server.doorstep}),
        max_size=min(LONGEST_OPEN, server.limits.longest_frame),
        max_queue=4,
    )
    async with AsyncExitStack() as ending:  # the listener ends before the engines that its sessions wait for
        await ending.enter_async_context(server.working())
        await ending.enter_async_context(listener)
        if metrics_at is not None:
            pages = Pages(server.health, server.metrics, is_loopback(metrics_at[0]))
            other = await _listen("--metrics-port", _nobody, *metrics_at, process_request=pages)
            await ending.enter_async_context(other)
            log.info("metrics on %s", url("http", metrics_at[0], other))
        yield listener
        await server.farewell()


async def _listen(option: str, handler: Handler, host: str, port: int, **options: Any) -> Server:
    """A listener at an address. Raises UsageError, which names the option of the port, where it cannot be had."""
    try:
        return await serve(
            handler,
            host,
            port,
            compression=None,  # floats hardly shrink, and it costs 100 times the transfer
            close_timeout=2,
            server_header=None,
            **options,
        )
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}", hint=f"is it in use? try {option}"
        ) from None


async def _nobody(socket: ServerConnection) -> None:
    """Where no websockets are taken."""


def url(scheme: str, host: str, listener: Server) -> str:
    """Where a listener can be reached."""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.sockets[0].getsockname()[1]}"
