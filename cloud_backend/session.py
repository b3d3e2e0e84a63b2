"""One device's session, without I/O: frames in, work for the engine out, results in, frames out.

    session.receive(frame)   → may add to `outbox`, may make `start()` give work
    session.start()          → the next Work, or None
    session.finish(result)   → adds the reply to `outbox`
    session.outbox           → frames to send, in order
    session.closing          → (WebSocket close code, reason) once the connection is to end

Replies leave in the order of their requests, whatever failed in between.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cloud_backend.engine import Engine, LogitRows, Result, Work
from shared.errors import RequestError, WireError
from shared.wire import (
    Append,
    Cancel,
    Encode,
    Error,
    ErrorCode,
    FloatName,
    Hidden,
    Logits,
    Open,
    Opened,
    decode,
    encode,
)

CLOSE_CODES: dict[str, int] = {
    "bad_frame": 1002,
    "unauthorized": 1008,
    "unknown_model": 1008,
    "wrong_key": 1008,
    "bad_request": 1008,
    "idle": 1008,
    "too_many_sessions": 1013,
    "shutting_down": 1001,
}
RETRYABLE = ("too_many_sessions", "idle", "shutting_down", "window_exceeded")
MOST_PENDING = 256  # requests; beyond it the socket is not read


@dataclass(frozen=True)
class Context:
    """A served model under one key."""

    served_name: str
    key_id: str
    engine: Engine


@dataclass(frozen=True)
class Limits:
    """What one session may ask for. Bytes, except where named."""

    max_frame: int = 4 * 2**20
    window: int = 16 * 2**20
    max_rows: int = 64
    max_full_rows: int = 8
    max_top_k: int = 1024
    max_sessions: int = 64  # sessions of the whole server
    idle_seconds: float = 600.0
    open_seconds: float = 10.0  # from the connection to `Open`


@dataclass
class _Request:
    """An Append or Encode that still owes its reply; `error` is the reply if it is already known."""

    seq: int
    size: int
    append: Append | None = None
    error: RequestError | WireError | None = None


class Session:
    """The cloud's side of PROTOCOL.md for one connection."""

    def __init__(
        self, contexts: Mapping[tuple[str, str], Context], limits: Limits, accept_token: Callable[[str | None], bool]
    ) -> None:
        self.outbox: deque[bytes] = deque()
        self.closing: tuple[int, str] | None = None
        self.context: Context | None = None
        self._contexts = contexts
        self._limits = limits
        self._accept_token = accept_token
        self._pending: deque[_Request] = deque()
        self._running: _Request | None = None
        self._in_flight = 0
        self._last_seq = -1
        self._changed_by: int | None = None  # seq of the request that last changed the KV cache
        self._dtype: FloatName = "float32"

    @property
    def full(self) -> bool:
        """Whether so many requests wait that the socket should not be read for now."""
        return len(self._pending) >= MOST_PENDING

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._pending) or self._running is not None

    def receive(self, frame: bytes) -> None:
        """Takes one binary frame of the device's."""
        try:
            message = decode(frame)
        except WireError as error:
            if error.code != "bad_frame" and error.seq is not None and self.context is not None:
                self._request(error.seq, len(frame), error)
                self._flush_errors()
            else:  # no reply could be matched to it, so the connection ends
                self.fail("bad_frame", str(error))
            return
        if self.context is None:
            if isinstance(message, Open):
                self._open(message)
            else:
                self.fail("bad_request", f"first message: seen {type(message).__name__}, wanted Open")
        elif isinstance(message, Append | Encode):
            self._request(message.seq, len(frame), message)
        elif isinstance(message, Cancel):
            self._cancel(message.seq)
        else:
            self.fail("bad_request", f"message: seen {type(message).__name__}, wanted Append, Encode or Cancel")
        self._flush_errors()

    def fail(self, code: ErrorCode, text: str) -> None:
        """Ends the connection with an Error that concerns all of it."""
        if self.closing is None:
            retryable = code in RETRYABLE
            self.outbox.append(encode(Error(code=code, message=text, kv_length=self._kv_length(), retryable=retryable)))
            self.closing = (CLOSE_CODES[code], code)
            self._pending.clear()

    def _open(self, message: Open) -> None:
        if not self._accept_token(message.token):
            self.fail("unauthorized", "token: missing or not known here")
            return
        context = self._contexts.get((message.model, message.key_id))
        if context is None:
            if any(name == message.model for name, _ in self._contexts):
                self.fail("wrong_key", "key_id: the served model was exported under another key")
            else:
                self.fail("unknown_model", "model: not served here")
            return
        engine = context.engine
        self.context = context
        self._cache = engine.new_cache()
        self._dtype = engine.dtype if message.dtype == "auto" else message.dtype
        limits = self._limits
        self.outbox.append(
            encode(
                Opened(
                    session=secrets.token_hex(4),
                    resume=secrets.token_urlsafe(16),
                    kv_length=0,
                    hidden_size=engine.hidden_size,
                    vocab_size=engine.vocab_size,
                    dtype=self._dtype,
                    context=engine.context,
                    max_frame=limits.max_frame,
                    max_rows=limits.max_rows,
                    max_full_rows=limits.max_full_rows,
                    max_top_k=limits.max_top_k,
                    window=limits.window,
                )
            )
        )

    def _request(self, seq: int, size: int, message: Append | Encode | WireError) -> None:
        if seq <= self._last_seq:
            self.fail("bad_request", f"seq: seen {seq}, wanted more than {self._last_seq}")
            return
        self._last_seq = seq
        request = _Request(seq, size)
        try:
            if isinstance(message, WireError):
                raise message
            request.append = self._checked(message, size)
            self._in_flight += size
        except (RequestError, WireError) as error:
            request.error, request.size = error, 0
        self._pending.append(request)

    def _checked(self, message: Append | Encode, size: int) -> Append:
        """What can be said of a request before its turn. Raises RequestError."""
        limits = self._limits
        if self._in_flight + size > limits.window:
            raise RequestError(
                "window_exceeded", f"bytes in flight: seen {self._in_flight + size}, wanted at most {limits.window}"
            )
        if size > limits.max_frame:
            raise RequestError("too_large", f"frame: seen {size} bytes, wanted at most {limits.max_frame}")
        if isinstance(message, Encode) or message.kind != "text":
            raise RequestError("unsupported", "this model is a decoder of text: it takes Append of kind text")
        assert self.context is not None
        engine = self.context.engine
        embeddings = message.embeddings
        if embeddings.dtype.name != self._dtype:
            raise RequestError("bad_request", f"embeddings: seen {embeddings.dtype.name}, wanted {self._dtype}")
        if embeddings.shape[1] != engine.hidden_size:
            raise RequestError(
                "bad_request", f"embeddings: seen width {embeddings.shape[1]}, wanted {engine.hidden_size}"
            )
        if message.want == "logits" and engine.vocab_size == 0:
            raise RequestError("unsupported", "want: seen logits, wanted hidden: this model's classifier is on devices")
        full = message.want == "logits" and message.top_k == 0
        most = limits.max_full_rows if full else limits.max_rows
        if message.rows > most:
            raise RequestError("too_large", f"rows: seen {message.rows}, wanted at most {most}")
        if message.top_k > limits.max_top_k:
            raise RequestError("too_large", f"top_k: seen {message.top_k}, wanted 0 or at most {limits.max_top_k}")
        if not np.isfinite(embeddings).all():
            raise RequestError("not_finite", "embeddings: seen NaN or infinity, wanted finite values")
        return message

    def _cancel(self, seq: int) -> None:
        for request in self._pending:
            if request.seq >= seq and request.error is None:
                self._in_flight -= request.size
                request.size = 0
                request.append, request.error = None, RequestError("cancelled", "dropped by Cancel")

    def start(self) -> Work | None:
        """The next work for the engine, or None if there is none or one is running."""
        while self._running is None and self._pending and self.closing is None:
            self._flush_errors()
            if not self._pending:
                break
            request = self._pending.popleft()
            assert request.append is not None
            self._running = request
            try:
                return self._work(request.append)
            except RequestError as error:
                self.finish(error)
        return None

    def _work(self, message: Append) -> Work:
        """What depends on the KV cache, checked at the request's turn."""
        assert self.context is not None
        length, context = self._cache.length, self.context.engine.context
        if message.after is not None and message.after != self._changed_by:
            raise RequestError("out_of_step", f"after: seen {message.after}, which is not what the KV cache rests on")
        if message.keep > length:
            raise RequestError("out_of_step", f"keep: seen {message.keep}, wanted at most the KV length {length}")
        end = message.keep + len(message.embeddings)
        if end > context:
            raise RequestError("context_full", f"positions: seen {end}, wanted at most the context of {context}")
        return Work(
            self._cache,
            message.keep,
            message.embeddings,
            message.rows,
            message.want,
            message.top_k,
            message.temperature,
            self._dtype,
        )

    def finish(self, result: Result | RequestError, *, queue_us: int = 0, compute_us: int = 0) -> None:
        """Takes the result of the work that `start` gave."""
        request = self._running
        assert request is not None
        self._running = None
        self._in_flight -= request.size
        if self.closing is not None:
            return
        if isinstance(result, RequestError):
            if result.code == "internal":  # the engine may have cut the cache
                self._changed_by = None
            self._reply_error(request.seq, result)
        else:
            self._changed_by = request.seq
            length = self._kv_length()
            common = {"seq": request.seq, "kv_length": length, "queue_us": queue_us, "compute_us": compute_us}
            if isinstance(result, LogitRows):
                reply: Logits | Hidden = Logits(**common, tensors=(result.values, result.ids, result.log_sum_exp))
            else:
                reply = Hidden(**common, tensors=(result.hidden,))
            self.outbox.append(encode(reply))
        self._flush_errors()

    def _flush_errors(self) -> None:
        """Answers the requests at the head of the queue that are known to fail."""
        while self._running is None and self._pending and (error := self._pending[0].error) is not None:
            self._reply_error(self._pending.popleft().seq, error)

    def _reply_error(self, seq: int, error: RequestError | WireError) -> None:
        self.outbox.append(
            encode(
                Error(
                    code=error.code,  # type: ignore[arg-type]  # one of PROTOCOL.md's codes
                    message=str(error),
                    seq=seq,
                    kv_length=self._kv_length(),
                    retryable=error.code in RETRYABLE,
                )
            )
        )

    def _kv_length(self) -> int:
        return 0 if self.context is None else self._cache.length
