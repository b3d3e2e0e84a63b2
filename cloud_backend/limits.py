"""What a session may ask for, and what can be said of a request before its turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cloud_backend.engine import Engine
from shared.errors import RequestError
from shared.wire import DTYPES, Append, Array, Encode, FloatName

LEAST_TEMPERATURE = 1e-30  # below it logits / temperature would not be finite in float32


@dataclass(frozen=True)
class Limits:
    """What sessions may ask for. Bytes, except where named."""

    max_frame: int = 4 * 2**20
    window: int = 16 * 2**20
    max_rows: int = 64
    max_full_rows: int = 8
    max_top_k: int = 1024
    max_sessions: int = 1024  # sessions of the whole server
    token_sessions: int = 256  # sessions of one token
    token_rate: float = 0.0  # positions a second that the sessions of one token share; 0: no limit
    max_unopened: int = 64  # connections of one client address that have not sent `Open`, where there are tokens
    idle_seconds: float = 600.0
    open_seconds: float = 10.0  # from the connection to `Open`
    send_seconds: float = 30.0  # for a device to take a reply
    grace_seconds: float = 60.0  # for a device to come back to a session whose connection was lost

    @property
    def longest_frame(self) -> int:
        """Bytes of the longest frame that gets an answer: a little beyond the limit it is an Error."""
        return 2 * self.max_frame


def check_append(message: Append, engine: Engine, limits: Limits, dtype: FloatName) -> None:
    """Raises RequestError where the engine or the limits do not allow an Append in a session of `dtype`."""
    if message.kind not in engine.appends:
        raise RequestError("unsupported", f"kind: seen an Append of {message.kind}, wanted {_wanted(engine)}")
    image = message.kind == "image"
    _check_embeddings(message.embeddings, engine.encoder_size if image else engine.hidden_size, dtype)
    if image and len(message.embeddings) != engine.encoder_context:
        raise RequestError(
            "bad_request",
            f"embeddings: seen {len(message.embeddings)} rows, wanted an image's {engine.encoder_context}",
        )
    if image and message.rows:
        raise RequestError("bad_request", f"rows: seen {message.rows}, wanted 0 of an image")
    if message.want == "logits" and engine.vocab_size == 0:
        raise RequestError("unsupported", "want: seen logits, wanted hidden: this model's classifier is on devices")
    full = message.want == "logits" and message.top_k == 0
    most = limits.max_full_rows if full else limits.max_rows
    if message.rows > most:
        raise RequestError("too_large", f"rows: seen {message.rows}, wanted at most {most}")
    if message.top_k > limits.max_top_k:
        raise RequestError("too_large", f"top_k: seen {message.top_k}, wanted 0 or at most {limits.max_top_k}")
    if message.temperature < LEAST_TEMPERATURE:
        raise RequestError(
            "bad_request", f"temperature: seen {message.temperature:g}, wanted at least {LEAST_TEMPERATURE:g}"
        )
    _check_finite(message.embeddings)


def check_encode(message: Encode, engine: Engine, limits: Limits, dtype: FloatName) -> None:
    """Raises RequestError where the engine or the limits do not allow an Encode in a session of `dtype`."""
    if message.want not in engine.encodes:
        raise RequestError("unsupported", f"want: seen an Encode of {message.want}, wanted {_wanted(engine)}")
    store = message.want == "store"
    _check_embeddings(message.embeddings, engine.encoder_size if store else engine.hidden_size, dtype)
    if store and len(message.lengths) != 1:
        raise RequestError("bad_request", f"lengths: seen {len(message.lengths)} sequences, wanted 1 to store")
    if engine.same_length and (other := next((n for n in message.lengths if n != engine.context), None)):
        raise RequestError("bad_request", f"lengths: seen {other}, wanted an image's {engine.context}")
    longest, most = max(message.lengths), engine.encoder_context if store else engine.context
    if longest > most:
        raise RequestError("too_large", f"lengths: seen {longest}, wanted at most {most}")
    # Hidden states and pooled vectors take no more than the embeddings did; classes are as many as the model has.
    if message.want == "logits":
        size = len(message.lengths) * engine.vocab_size * DTYPES[dtype].itemsize
        if size > limits.max_frame:
            raise RequestError("too_large", f"result: seen {size} bytes, wanted at most {limits.max_frame}")
    _check_finite(message.embeddings)


def _check_embeddings(embeddings: Array, width: int, dtype: FloatName) -> None:
    if embeddings.dtype.name != dtype:
        raise RequestError("bad_request", f"embeddings: seen {embeddings.dtype.name}, wanted {dtype}")
    if embeddings.shape[1] != width:
        raise RequestError("bad_request", f"embeddings: seen width {embeddings.shape[1]}, wanted {width}")


def _check_finite(embeddings: Array) -> None:
    if not np.isfinite(embeddings).all():
        raise RequestError("not_finite", "embeddings: seen NaN or infinity, wanted finite values")


def _wanted(engine: Engine) -> str:
    """What the engine takes, in words."""
    requests = (("an Append of", engine.appends), ("an Encode of", engine.encodes))
    return ", or ".join(f"{request} {' or '.join(kinds)}" for request, kinds in requests if kinds)
