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
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cloud_backend.engine import AppendWork, EncodeWork, Engine, HiddenRows, LogitRows, Result, Work
from cloud_backend.leases import Lease, Leases
from cloud_backend.limits import Limits, check_append, check_encode
from shared.errors import RequestError, WireError
from shared.wire import (
    Append,
    Cancel,
    Encode,
    Encoded,
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


@dataclass
class _Request:
    """An Append or Encode that still owes its reply; `error` is the reply if it is already known."""

    seq: int
    size: int
    message: Append | Encode | None = None
    error: RequestError | WireError | None = None
    arrived: float = field(default_factory=time.perf_counter)


class Session:
    """The cloud's side of PROTOCOL.md for one connection."""

    def __init__(
        self,
        contexts: Mapping[tuple[str, str], Context],
        limits: Limits,
        identify: Callable[[Open], str | None],
        leases: Leases,
    ) -> None:
        """identify: whose the token of an Open is, in any words; None where it is not known. Raises RequestError where
        its owner may not have a session more. leases: of all sessions."""
        self.public_id = ""  # what logs call the session
        self.on_error: Callable[[str, int], None] = lambda code, kv_length: None  # of each Error that is sent
        self.outbox: deque[bytes] = deque()
        self.closing: tuple[int, str] | None = None
        self.context: Context | None = None
        self._contexts = contexts
        self._limits = limits
        self._identify = identify
        self._leases = leases
        self._lease: Lease | None = None
        self.on_displaced: Callable[[], None] = lambda: None  # called when another connection took the session over
        self._pending: deque[_Request] = deque()
        self._running: _Request | None = None
        self._cancelled = False  # the running one
        self._length_before = 0  # KV length when it started
        self._length_taken: int | None = 0  # KV length that it came to; None: a request of its own has been done since
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

    @property
    def arrived(self) -> float:
        """perf_counter() when the request that runs was received."""
        assert self._running is not None
        return self._running.arrived

    def dropped(self) -> bool:
        """Whether nobody wants the running work any more."""
        return self._cancelled or self.closing is not None

    def receive(self, frame: bytes) -> None:
        """Takes one binary frame of the device's."""
        if self.closing is not None:
            return  # it was on its way before the connection ended
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
            self.on_error(code, self._kv_length())

    def _open(self, message: Open) -> None:
        try:
            owner = self._identify(message)
        except RequestError as error:
            self.fail(error.code, str(error))  # type: ignore[arg-type]  # one of PROTOCOL.md's codes
            return
        if owner is None:
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
        bound_to = (message.model, message.key_id, owner)
        lease = None if message.resume is None else self._leases.take(message.resume, bound_to, self._displaced)
        self._lease = lease or self._leases.new(bound_to, engine, self._displaced)
        kv_length = min(self._lease.length, self._lease.cache.length)  # which others may have been given meanwhile
        self._cache, self._length_taken = self._lease.cache, kv_length
        self._dtype = engine.dtype if message.dtype == "auto" else message.dtype
        self.public_id = secrets.token_hex(4)
        limits = self._limits
        self.outbox.append(
            encode(
                Opened(
                    session=self.public_id,
                    resume=self._lease.secret,
                    kv_length=kv_length,
                    hidden_size=engine.hidden_size,
                    vocab_size=engine.vocab_size,
                    dtype=self._dtype,
                    context=engine.context,
                    max_frame=limits.max_frame,
                    max_rows=limits.max_rows,
                    max_full_rows=limits.max_full_rows,
                    max_top_k=limits.max_top_k,
                    window=limits.window,
                    encoder_size=engine.encoder_size,
                    encoder_context=engine.encoder_context,
                    image_tokens=engine.image_tokens,
                )
            )
        )

    def _displaced(self) -> None:
        """Another connection has taken the session over."""
        self._let_go()
        self._lease = None
        self._pending.clear()
        self.closing = self.closing or (1008, "taken over by a newer connection")
        self.on_displaced()

    def leave(self, *, keep: bool) -> None:
        """The connection has ended. keep: the session may come back."""
        if self._lease is not None:
            self._let_go()
            self._leases.leave(self._lease, self._displaced, keep=keep)

    def _let_go(self) -> None:
        """Notes what KV length the session has for whoever comes next: a step that still runs may add to it first."""
        assert self._lease is not None
        running = None if self._running is None else self._running.message
        keep = running.keep if isinstance(running, Append) else 0 if running is not None else self._cache.length
        if self._length_taken is not None:  # that step may be of the connection before this one
            keep = min(keep, self._length_taken)
        self._lease.length = min(keep, self._cache.length)

    def _request(self, seq: int, size: int, message: Append | Encode | WireError) -> None:
        if seq <= self._last_seq:
            self.fail("bad_request", f"seq: seen {seq}, wanted more than {self._last_seq}")
            return
        self._last_seq = seq
        request = _Request(seq, size)
        try:
            if isinstance(message, WireError):
                raise message
            self._check(message, size)
            request.message = message
            self._in_flight += size
        except (RequestError, WireError) as error:
            # Without its traceback, which would keep the frame that was refused.
            request.error, request.size = error.with_traceback(None), 0
        self._pending.append(request)

    def _check(self, message: Append | Encode, size: int) -> None:
        """What can be said of a request before its turn. Raises RequestError."""
        limits = self._limits
        if self._in_flight + size > limits.window:
            raise RequestError(
                "window_exceeded", f"bytes in flight: seen {self._in_flight + size}, wanted at most {limits.window}"
            )
        if size > limits.max_frame:
            raise RequestError("too_large", f"frame: seen {size} bytes, wanted at most {limits.max_frame}")
        assert self.context is not None
        if isinstance(message, Append):
            check_append(message, self.context.engine, limits, self._dtype)
        else:
            check_encode(message, self.context.engine, limits, self._dtype)

    def _cancel(self, seq: int) -> None:
        self._cancelled = self._cancelled or (self._running is not None and self._running.seq >= seq)
        for request in self._pending:
            if request.seq >= seq and request.error is None:
                self._in_flight -= request.size
                request.size = 0
                request.message, request.error = None, RequestError("cancelled", "dropped by Cancel")

    def start(self) -> Work | None:
        """The next work for the engine, or None if there is none or one is running."""
        while self._running is None and self._pending and self.closing is None:
            self._flush_errors()
            if not self._pending:
                break
            request = self._pending.popleft()
            assert request.message is not None
            self._running, self._cancelled, self._length_before = request, False, self._cache.length
            try:
                return self._work(request.message)
            except RequestError as error:
                self.finish(error)
        return None

    def _work(self, message: Append | Encode) -> Work:
        """What depends on the KV cache, checked at the request's turn."""
        if isinstance(message, Encode):
            return EncodeWork(self._cache, message.embeddings, message.lengths, message.want, self._dtype)
        assert self.context is not None
        length, engine = self._cache.length, self.context.engine
        if message.after is not None and message.after != self._changed_by:
            raise RequestError("out_of_step", f"after: seen {message.after}, which is not what the KV cache rests on")
        if not self._cache.ready:
            raise RequestError("out_of_step", "Append: seen no source sequence yet, wanted an Encode of store before")
        if message.keep > length:
            raise RequestError("out_of_step", f"keep: seen {message.keep}, wanted at most the KV length {length}")
        end = message.keep + (engine.image_tokens if message.kind == "image" else len(message.embeddings))
        if end > engine.context:
            raise RequestError("context_full", f"positions: seen {end}, wanted at most the context of {engine.context}")
        return AppendWork(
            self._cache,
            message.keep,
            message.embeddings,
            message.rows,
            message.want,
            message.top_k,
            message.temperature,
            self._dtype,
            message.kind,
        )

    def finish(self, result: Result | RequestError, *, queue_us: int = 0, compute_us: int = 0) -> None:
        """Takes the result of the work that `start` gave."""
        request = self._running
        assert request is not None and request.message is not None
        self._running = None
        self._in_flight -= request.size
        if not isinstance(result, RequestError):
            self._length_taken = None
        if self.closing is not None:
            return
        if isinstance(result, RequestError):
            failed = result.code == "internal" and isinstance(request.message, Append)
            if failed or self._cache.length != self._length_before:  # the engine may have cut the cache
                self._changed_by = None
            self._reply_error(request.seq, result)
        else:
            if isinstance(request.message, Append) or request.message.want == "store":
                self._changed_by = request.seq
            self.outbox.append(encode(self._reply(request.seq, result, queue_us, compute_us)))
        self._flush_errors()

    def _reply(self, seq: int, result: Result, queue_us: int, compute_us: int) -> Logits | Hidden | Encoded:
        common = {"seq": seq, "kv_length": self._kv_length(), "queue_us": queue_us, "compute_us": compute_us}
        if isinstance(result, LogitRows):
            return Logits(**common, tensors=(result.values, result.ids, result.log_sum_exp))
        if isinstance(result, HiddenRows):
            return Hidden(**common, tensors=(result.hidden,))
        return Encoded(**common, tensors=(result.result,))

    def _flush_errors(self) -> None:
        """Answers the requests at the head of the queue that are known to fail."""
        while self._running is None and self._pending and (error := self._pending[0].error) is not None:
            self._reply_error(self._pending.popleft().seq, error)

    def _reply_error(self, seq: int, error: RequestError | WireError) -> None:
        self.on_error(error.code, self._kv_length())
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
