"""The life of the process: it listens, loads, serves, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import threading
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from cloud_backend.last_resort import answering_seconds, last_resort
from cloud_backend.listener import listening, url
from cloud_backend.memory import give_back
from cloud_backend.serving import Serving, load_models
from cloud_backend.tasks import running
from cloud_backend.tls import Certificate

log = logging.getLogger("stip.cloud")
FILES_BESIDE = 256  # sockets that open nothing, weights, libraries


@dataclass(frozen=True)
class Listening:
    """Where the server listens, and how."""

    host: str
    port: int
    certificate: Certificate | None = None
    origins: Iterable[str] = ()
    metrics_at: tuple[str, int] | None = None  # host and port


@dataclass
class _Stop:
    """SIGTERM or SIGINT: the first drains, the second ends the process at once."""

    drain_seconds: float
    told: asyncio.Event = field(default_factory=asyncio.Event)
    loading: bool = True
    last_resort: threading.Timer | None = None

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signal, number)

    def _signal(self, number: int) -> None:
        if self.told.is_set():
            os._exit(128 + number)
        log.info("stopping")
        if self.loading:  # nobody is served yet, and a load in its thread cannot be interrupted
            os._exit(0)
        self.told.set()
        self.last_resort = self.force(0)

    def force(self, status: int) -> threading.Timer:
        """Ends the process when the drain has had its time."""
        return last_resort(self.drain_seconds, status)

    async def wait(self) -> None:
        """Returns when the process is told to stop."""
        await self.told.wait()

    def done(self) -> None:
        """The process ends by itself."""
        if self.last_resort is not None:
            self.last_resort.cancel()


async def serve_until_stopped(serving: Serving, at: Listening) -> None:
    """Listens, loads every model in the scheduler's thread, tries each out, and serves until SIGTERM or SIGINT.

    Then every request that was received is answered, every session is closed, and it returns; what is not done within
    drain_seconds is left. A second signal ends the process at once. Raises StipError where it cannot listen, a model
    cannot be loaded, or what an engine computes with is gone.
    """
    server, drain_seconds = serving.server, serving.drain_seconds
    _allow_files(server.limits.max_sessions)
    stop = _Stop(drain_seconds)
    tls = None if at.certificate is None else at.certificate.context
    server.health.loading = True
    async with AsyncExitStack() as ending:
        ending.callback(stop.done)
        stop.listen()
        opened = listening(server, at.host, at.port, tls=tls, origins=at.origins, metrics_at=at.metrics_at)
        listener = await ending.enter_async_context(opened)
        if at.certificate is not None:
            await ending.enter_async_context(running("certificate", at.certificate.keep_fresh()))
        await load_models(serving)
        await ending.enter_async_context(running("memory", give_back(serving.scheduler)))
        server.health.loading = stop.loading = False
        log.info("listening on %s", url("wss" if tls else "ws", at.host, listener))
        engines = server.health.engines
        assert engines is not None
        told = await ending.enter_async_context(running("the word to stop", stop.wait()))
        await asyncio.wait([told, engines], return_when=asyncio.FIRST_COMPLETED)
        if engines.done():
            stop.force(1)
        await server.drain(answering_seconds(drain_seconds))
        if engines.done():
            engines.result()  # raises what they ended with


def _allow_files(sessions: int) -> None:
    """Lets the process hold a socket for each session: many systems allow 1,024 files unless asked for more."""
    wanted = sessions + FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("open files: the system allows %d, %d sessions want %d (ulimit -Hn)", most, sessions, wanted)
