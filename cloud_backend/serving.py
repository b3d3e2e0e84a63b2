"""What the options of `stip-cloud serve` come to: one server, and the models that it is to load."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers.utils import logging as transformers_logging

from cloud_backend.engine import Engine
from cloud_backend.folders import check_folders
from cloud_backend.limits import Limits
from cloud_backend.log import log_to_stderr
from cloud_backend.memory import bound_preparations
from cloud_backend.opening import check_engine, device_called, open_context
from cloud_backend.scheduler import Scheduler
from cloud_backend.server import CloudServer
from cloud_backend.session import Context
from cloud_backend.tensor_parallel.engine import split_of_folder
from cloud_backend.tensor_parallel.ranks import Ranks
from cloud_backend.tokens import Tokens
from cloud_backend.warm_up import warm_up
from shared.errors import UsageError
from shared.manifest import CloudManifest, read_manifest

log = logging.getLogger("stip.cloud")
Load = Callable[[], tuple[CloudManifest, Engine]]


@dataclass(frozen=True)
class Serving:
    """A server that serves nothing yet, the scheduler that is to run its engines, and what gives each model.

    threads: of torch; None: as many as torch takes. drain_seconds: from the word to stop to the end, at most.
    ranks: the processes that share the models, to be closed at the end.
    """

    server: CloudServer
    scheduler: Scheduler
    loads: Sequence[Load]
    threads: int | None
    drain_seconds: float
    ranks: Ranks | None = None


def prepare(options: argparse.Namespace) -> Serving:
    """What the options ask for; nothing is loaded yet. It also sets up this process: its log, what torch keeps.

    Raises UsageError where they contradict each other, and BundleError for a folder or a token file that is not whole.
    """
    bound_preparations()
    log_to_stderr(options.log)
    transformers_logging.set_verbosity_error()  # it would report the embedding as missing: it is, on purpose
    transformers_logging.disable_progress_bar()
    limits = _limits(options)
    tokens = Tokens(options.token_file) if options.token_file else None
    check_folders(options.folders)
    scheduler = Scheduler()
    ranks = None
    if options.tensor_parallel > 1:
        device = device_called(options.device)
        for folder in options.folders:  # before any process is started
            manifest = read_manifest(folder, CloudManifest)
            check_engine(folder, manifest, options.engine)
            split_of_folder(folder, manifest, options.tensor_parallel)
        ranks = Ranks(options.tensor_parallel, device, options.threads, options.log, on_lost=scheduler.lose)
    load = partial(
        open_context,
        engine=options.engine,
        dtype=options.dtype,
        device=options.device,
        context=options.context,
        verify=options.verify,
        kv_bytes=options.kv_bytes,
        ranks=ranks,
    )
    server = CloudServer([], limits, tokens, scheduler)
    loads = [partial(load, folder) for folder in options.folders]
    threads = options.threads if ranks is None else ranks.threads
    return Serving(server, scheduler, loads, threads, options.drain_seconds, ranks)


def _limits(options: argparse.Namespace) -> Limits:
    """What sessions may ask for. Raises UsageError where no frame could be as long as the options say."""
    if options.window < options.max_frame:
        raise UsageError(
            f"window: seen {options.window}, wanted at least --max-frame, {options.max_frame}",
            hint="a larger --window, or a smaller --max-frame",
        )
    return Limits(
        max_frame=options.max_frame,
        window=options.window,
        max_sessions=options.max_sessions,
        token_sessions=options.token_sessions,
        token_rate=options.token_rate,
        idle_seconds=options.idle_seconds,
        grace_seconds=options.grace_seconds,
    )


async def load_models(serving: Serving) -> None:
    """Loads every model in the scheduler's thread, tries each out, and has the server serve it.

    The server is at work. Raises StipError where a model cannot be loaded, or does not compute, or what an engine
    computes with is gone.
    """
    try:
        if serving.threads is not None:
            only_there = partial(torch.set_num_threads, serving.threads)  # it counts for the thread that calls it
            await serving.scheduler.call(only_there)
        for load in serving.loads:
            serving.server.add([await _loaded(serving.scheduler, load)])
    except Exception:
        engines = serving.server.health.engines
        if engines is not None and engines.done() and not engines.cancelled():
            engines.result()  # raises why they ended, of which the other error is but what came of it
        raise


async def _loaded(scheduler: Scheduler, load: Load) -> Context:
    manifest, engine = await scheduler.call(load)
    await warm_up(scheduler, engine, manifest.served_name)
    fields = {"event": "serving", "model": manifest.served_name, "dtype": engine.dtype, "context": engine.context}
    log.info("serving %s: %s, context %d", manifest.served_name, engine.dtype, engine.context, extra={"fields": fields})
    return Context(manifest.served_name, manifest.key_id, engine)
