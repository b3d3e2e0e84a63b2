"""The life of the process: it listens, loads, serves, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

import torch

from cloud_backend.engine import Engine
from cloud_backend.listener import running, url
from cloud_backend.memory import give_back
from cloud_backend.scheduler import Scheduler
from cloud_backend.server import CloudServer
from cloud_backend.session import Context
from cloud_backend.tls import Certificate
from cloud_backend.warm_up import warm_up
from shared.manifest import CloudManifest

log = logging.getLogger("stip.cloud")
FAREWELL_SECONDS = 5.0  # of the drain, for devices to be told and the step that runs to end; at most half of it
FILES_BESIDE = 256  # sockets that open nothing, weights, libraries
Load = Callable[[], tuple[CloudManifest, Engine]]


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
        # A step that is stuck would keep the process: its thread cannot be interrupted either.
        self.last_resort = threading.Timer(self.drain_seconds, os._exit, [0])
        self.last_resort.daemon = True
        self.last_resort.start()

    def done(self) -> None:
        """The process ends by itself."""
        if self.last_resort is not None:
            self.last_resort.cancel()


async def serve_until_stopped(
    server: CloudServer,
    scheduler: Scheduler,
    loads: Sequence[Load],
    at: Listening,
    *,
    threads: int | None,
    drain_seconds: float,
) -> None:
    """Listens, loads every model in the scheduler's thread, tries each out, and serves until SIGTERM or SIGINT.

    Then every request that was received is answered, every session is closed, and it returns; what is not done within
    drain_seconds is left. A second signal ends the process at once. Raises StipError where it cannot listen, or a
    model cannot be loaded.

    threads: of torch; None: as many as torch takes.
    """
    _allow_files(server.max_sessions)
    stop = _Stop(drain_seconds)
    tls = None if at.certificate is None else at.certificate.context
    server.health.loading = True
    listening = server.listening(at.host, at.port, tls=tls, origins=at.origins, metrics_at=at.metrics_at)
    async with AsyncExitStack() as ending:
        ending.callback(stop.done)
        stop.listen()
        listener = await ending.enter_async_context(listening)
        if at.certificate is not None:
            await ending.enter_async_context(running("certificate", at.certificate.keep_fresh()))
        if threads is not None:
            await scheduler.call(partial(torch.set_num_threads, threads))  # of the thread that calls it alone
        for load in loads:
            server.add([await _loaded(scheduler, load)])
        await ending.enter_async_context(running("memory", give_back(scheduler)))
        server.health.loading = stop.loading = False
        log.info("listening on %s", url("wss" if tls else "ws", at.host, listener))
        await stop.told.wait()
        await server.drain(max(drain_seconds - FAREWELL_SECONDS, drain_seconds / 2))


def _allow_files(sessions: int) -> None:
    """Lets the process hold a socket for each session: many systems allow 1,024 files unless asked for more."""
    wanted = sessions + FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("open files: the system allows %d, %d sessions want %d (ulimit -Hn)", most, sessions, wanted)


async def _loaded(scheduler: Scheduler, load: Load) -> Context:
    manifest, engine = await scheduler.call(load)
    await warm_up(scheduler, engine, manifest.served_name)
    fields = {"event": "serving", "model": manifest.served_name, "dtype": engine.dtype, "context": engine.context}
    log.info("serving %s: %s, context %d", manifest.served_name, engine.dtype, engine.context, extra={"fields": fields})
    return Context(manifest.served_name, manifest.key_id, engine)
