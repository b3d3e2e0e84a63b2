"""The first forward of a model: proves that it computes before any device relies on it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cloud_backend.engine import AppendWork, EncodeWork, Engine, Work
from cloud_backend.kv_cache import KVCache
from cloud_backend.scheduler import Scheduler
from shared.errors import BundleError, RequestError
from shared.wire import DTYPES, Array


async def warm_up(scheduler: Scheduler, engine: Engine, served_name: str) -> None:
    """Runs one of each kind of request, on random embeddings. Raises BundleError where one fails."""
    cache = engine.new_cache()
    for work in _requests(engine, cache):
        timed = await scheduler.submit(engine, work)
        if isinstance(timed.result, RequestError):
            raise BundleError(
                f"{served_name}: its first forward failed",
                hint="the log says how; do its weights fit the dtype? is there memory?",
            )
    scheduler.release(engine, cache)


def _requests(engine: Engine, cache: KVCache) -> Iterator[Work]:
    if "store" in engine.encodes:
        yield EncodeWork(cache, _random(1, engine.encoder_size, engine), (1,), "store", engine.dtype)
    elif engine.encodes:
        length = engine.context if engine.same_length else 1
        embeddings = _random(length, engine.hidden_size, engine)
        yield EncodeWork(cache, embeddings, (length,), engine.encodes[0], engine.dtype)
    for kind in engine.appends:
        image = kind == "image"
        count, width = (engine.encoder_context, engine.encoder_size) if image else (1, engine.hidden_size)
        want, rows = ("logits" if engine.vocab_size else "hidden"), 0 if image else 1
        embeddings = _random(count, width, engine)
        yield AppendWork(cache, 0, embeddings, rows, want, 1, 1.0, engine.dtype, kind)  # type: ignore[arg-type]


def _random(rows: int, width: int, engine: Engine) -> Array:
    return np.random.default_rng(0).standard_normal((rows, width)).astype(DTYPES[engine.dtype])
