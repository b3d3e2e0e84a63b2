"""The cloud without its sockets: which sessions are open, who may open one, and what runs beside them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

from cloud_backend.admission import Allowance, Doorstep
from cloud_backend.connection import Connection
from cloud_backend.health import Health
from cloud_backend.leases import Leases
from cloud_backend.limits import Limits
from cloud_backend.metrics import Metrics
from cloud_backend.record import Record
from cloud_backend.scheduler import Scheduler
from cloud_backend.session import Context, Session
from cloud_backend.sockets import Closed, Socket
from cloud_backend.tasks import running
from cloud_backend.tokens import Tokens
from cloud_backend.watch import LOOK_SECONDS
from shared.errors import RequestError
from shared.wire import Open

log = logging.getLogger("stip.cloud")


class CloudServer:
    """Serves contexts to devices, over sockets that `listener` or `asgi` brings.

    health, metrics: its own. doorstep: where connections stand that have not opened a session.
    """

    def __init__(
        self, contexts: Iterable[Context], limits: Limits, tokens: Tokens | None, scheduler: Scheduler | None = None
    ) -> None:
        """tokens: None takes anyone, on loopback alone. scheduler: the one in whose thread the models are loaded."""
        self._contexts: dict[tuple[str, str], Context] = {}
        self._limits = limits
        self._tokens = tokens
        self._scheduler = scheduler or Scheduler()
        self._connections: set[Connection] = set()
        self._leases = Leases(limits.grace_seconds, self._scheduler.release)
        self.doorstep = Doorstep(limits.max_unopened if tokens else None)
        self._allowances: dict[str, Allowance] = {}  # by the hash of the token that sessions share
        self.health = Health(self._scheduler, lambda: len(self._connections), limits.max_sessions)
        self.metrics = self._measured()
        self.add(contexts)

    @property
    def limits(self) -> Limits:
        """What its sessions may ask for."""
        return self._limits

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

    @property
    def takes_anyone(self) -> bool:
        """Whether no token is wanted, so that it may be reached over loopback alone."""
        return self._tokens is None

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Runs the engines, and looks after tokens and sessions that nobody has, until the block ends.

        Sockets may be brought in it; they are to be gone at its end, for they wait for the engines.
        """
        async with AsyncExitStack() as ending:
            self.health.engines = await ending.enter_async_context(running("engines", self._scheduler.run()))
            await ending.enter_async_context(running("tokens", self._keep_tokens_fresh()))
            await ending.enter_async_context(running("leases", self._end_leases()))
            yield

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
                self._allowances = {one: left for one, left in self._allowances.items() if tokens.known(one)}
                revoked = [each for each in self._connections if each.token and not tokens.known(each.token)]
                ends = (connection.end("unauthorized", "token: it is no longer known here") for connection in revoked)
                await asyncio.gather(*ends, return_exceptions=True)

    async def _end_leases(self) -> None:
        """Once a second, until cancelled: ends the sessions that nobody came back to."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._leases.expire()

    async def serve(self, socket: Socket) -> None:
        """Serves the device at a socket until it is closed. Its handshake is done."""
        session = Session(self._contexts, self._limits, lambda message: self._owner(connection, message), self._leases)
        connection = Connection(socket, session, self._scheduler, self._limits, Record(self.metrics))
        if self.health.draining:  # it came in while the door was being closed
            session.fail("shutting_down", "the cloud stops")
        elif len(self._connections) >= self._limits.max_sessions:
            most = f"sessions: {len(self._connections)} are open, the most this server takes"
            session.fail("too_many_sessions", most)
        if session.closing is not None:
            with contextlib.suppress(Closed):
                await connection.flush()
            return
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            # A device that says goodbye does not come back, nor is one welcome that was sent away.
            session.leave(keep=session.closing is None and not socket.said_goodbye)
            connection.record.closed(len(self._connections))

    def _owner(self, connection: Connection, message: Open) -> str | None:
        """The hash of the connection's token, None where it is not known.

        Raises RequestError where the token has all its sessions, but for one that the connection takes over.
        """
        if self._tokens is None:
            return "anyone"
        digests = [self._tokens.digest_of(given) for given in (message.token, *connection.bearers())]
        digest = next(filter(None, digests), None)
        if digest is None:
            return None
        count = sum(other.token == digest and not other.closing for other in self._connections)
        if message.resume and self._leases.taken(message.resume, (message.model, message.key_id, digest)):
            count -= 1
        most = self._limits.token_sessions
        if count >= most:
            raise RequestError("too_many_sessions", f"sessions: {count} of this token are open, the most it may have")
        connection.token = digest
        if rate := self._limits.token_rate:
            connection.allowance = self._allowances.setdefault(digest, Allowance(rate))
        return digest

    async def farewell(self) -> None:
        """Tells every device that the cloud stops, and closes its socket."""
        ends = (connection.end("shutting_down", "the cloud stops") for connection in self._connections)
        await asyncio.gather(*ends, return_exceptions=True)
