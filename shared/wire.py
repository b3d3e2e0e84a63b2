"""The wire of PROTOCOL.md: messages and the binary frame that carries one.

A frame is `u32 little-endian header length | MessagePack header | tensors`. The header is a tagged msgspec struct
whose `tensors` field lists (dtype, shape) of the raw little-endian tensors that follow, each starting at a multiple
of 16 bytes from the frame's start, zero-padded. Nothing is copied on decoding: tensors are read-only views.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from shared.errors import WireError

SUBPROTOCOL = "stip.v1"
ALIGNMENT = 16  # a browser's typed arrays need it
MAX_HEADER = 64 * 1024
MAX_TENSORS = 8
MAX_DIMENSIONS = 4

Array = npt.NDArray[Any]
U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Secret = Annotated[str, msgspec.Meta(max_length=512)]
Real = Annotated[float, msgspec.Meta(gt=0, le=1e6)]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "uint32": np.dtype("<u4"),
}
FloatName = Literal["float32", "float16", "bfloat16"]
FLOATS: tuple[FloatName, ...] = ("float32", "float16", "bfloat16")
_FLOATS = tuple(DTYPES[name] for name in FLOATS)
_IDS = (DTYPES["uint32"],)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}  # numpy works a dtype's name out anew each time

ErrorCode = Literal[
    "bad_frame",  # the frame breaks the framing or names no known message (the connection closes)
    "bad_request",  # well-formed, but a field or shape does not fit this session
    "unauthorized",  # token missing or wrong (closes)
    "unknown_model",  # no context with that served name (closes)
    "wrong_key",  # the served model was exported under another key (closes)
    "unsupported",  # this cloud, or this model, does not do that
    "out_of_step",  # `keep` is beyond the KV cache, `after` names what did not succeed, or no source was stored
    "context_full",  # the KV cache would pass the context limit
    "too_large",  # a frame, a sequence, or what is asked for, pass a limit
    "window_exceeded",  # more bytes in flight than `Opened` allowed
    "not_finite",  # embeddings hold NaN or an infinity
    "cancelled",  # dropped by `Cancel`, perhaps while it ran
    "too_many_sessions",  # try again later (closes)
    "idle",  # nothing was sent for too long (closes)
    "shutting_down",  # the cloud stops; reconnect later (closes)
    "internal",  # the cloud failed; nothing was added to the KV cache
]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """Base of every message. Unknown header fields are ignored; `tensors` are in the order PROTOCOL.md gives."""

    TENSORS: ClassVar[tuple[str, ...]] = ()

    tensors: tuple[np.ndarray, ...] = ()

    def check(self) -> None:
        """Raises WireError where the tensors do not have the dtypes and dimensions of this message."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        seq = getattr(self, "seq", None)
        return [] if seq is None else [("seq", seq)]

    def __repr__(self) -> str:
        # Tokens, resume secrets and embeddings must not reach a log through a careless format string.
        seq = getattr(self, "seq", None)
        return f"{type(self).__name__}({'' if seq is None else f'seq={seq}'})"


class Open(Message, frozen=True, kw_only=True, tag="open"):
    """Device → cloud, first: which context to serve, in which dtype, who asks, and which session to take over."""

    model: Name
    key_id: Name
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # auto: what the cloud computes in
    token: Secret | None = None
    resume: Secret | None = None  # that of the session to take over


class Opened(Message, frozen=True, kw_only=True, tag="opened"):
    """Cloud → device: the session, its widths and its limits."""

    session: Name
    resume: Secret  # the same for the session's life
    kv_length: U32  # what is still there of a session that was taken over
    hidden_size: U32
    vocab_size: U32  # of an encoder: its classes
    dtype: FloatName
    context: U32  # most positions of the KV cache, or of an encoder's sequence
    max_frame: U32  # bytes
    max_rows: U32  # result rows of one Append with top_k > 0
    max_full_rows: U32  # result rows of one Append with top_k = 0
    max_top_k: U32
    window: U32  # bytes in flight: Appends sent and not yet answered
    encoder_size: U32 = 0  # width of image patches, or of a source sequence; 0 where the model takes neither
    encoder_context: U32 = 0  # rows that every image has, or that a source sequence has at most
    image_tokens: U32 = 0  # positions of the KV cache that an image takes


class Append(Message, frozen=True, kw_only=True, tag="append"):
    """Device → cloud: cut the KV cache to `keep`, append n embeddings or one image, answer for the last `rows`.

    tensors: embeddings [n, hidden_size], or an image's patches [encoder_context, encoder_size]
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("embeddings",)

    seq: U32
    keep: U32
    rows: U32 = 1
    want: Literal["logits", "hidden"] = "logits"
    top_k: U32 = 256  # 0: full rows
    temperature: Real = 1.0  # of the second log-sum-exp
    kind: Literal["text", "image"] = "text"
    after: U32 | None = None  # seq of the request that must have succeeded just before; else out_of_step

    @property
    def embeddings(self) -> Array:
        return self.tensors[0]

    def check(self) -> None:
        _expect(self.embeddings, "embeddings", _FLOATS, 2)
        if self.embeddings.shape[0] == 0:
            raise WireError("bad_request", "embeddings: seen 0 rows, wanted at least 1")
        if self.rows > self.embeddings.shape[0]:
            raise WireError("bad_request", f"rows: seen {self.rows}, wanted at most n = {self.embeddings.shape[0]}")


class Logits(Message, frozen=True, kw_only=True, tag="logits"):
    """Cloud → device: top-k of the permuted logits, or full rows, with log-sum-exp.

    tensors: values [rows, k], ids [rows, k] uint32 (permuted; k = 0 where rows are full),
    log_sum_exp [rows, 2] float32 (at temperature 1 and at the Append's temperature).
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "ids", "log_sum_exp")

    seq: U32
    kv_length: U32
    queue_us: U32 = 0
    compute_us: U32 = 0

    @property
    def values(self) -> Array:
        return self.tensors[0]

    @property
    def ids(self) -> Array:
        return self.tensors[1]

    @property
    def log_sum_exp(self) -> Array:
        return self.tensors[2]

    def check(self) -> None:
        _expect(self.values, "values", _FLOATS, 2)
        _expect(self.ids, "ids", _IDS, 2)
        _expect(self.log_sum_exp, "log_sum_exp", _FLOATS[:1], 2)
        rows, k = self.values.shape
        if self.ids.shape not in ((rows, k), (rows, 0)):
            raise WireError("bad_frame", f"ids: seen shape {self.ids.shape}, wanted {(rows, k)} or {(rows, 0)}")
        if self.log_sum_exp.shape != (rows, 2):
            raise WireError("bad_frame", f"log_sum_exp: seen shape {self.log_sum_exp.shape}, wanted {(rows, 2)}")


class Hidden(Message, frozen=True, kw_only=True, tag="hidden"):
    """Cloud → device: the last hidden state of each row asked for. tensors: hidden [rows, hidden_size]"""

    TENSORS: ClassVar[tuple[str, ...]] = ("hidden",)

    seq: U32
    kv_length: U32
    queue_us: U32 = 0
    compute_us: U32 = 0

    @property
    def hidden(self) -> Array:
        return self.tensors[0]

    def check(self) -> None:
        _expect(self.hidden, "hidden", _FLOATS, 2)


class Encode(Message, frozen=True, kw_only=True, tag="encode"):
    """Device → cloud: one forward of an encoder over ragged sequences. tensors: embeddings [sum of lengths, width]"""

    TENSORS: ClassVar[tuple[str, ...]] = ("embeddings",)

    seq: U32
    lengths: tuple[U32, ...]
    want: Literal["hidden", "pooled", "logits", "store"] = "hidden"

    @property
    def embeddings(self) -> Array:
        return self.tensors[0]

    def check(self) -> None:
        _expect(self.embeddings, "embeddings", _FLOATS, 2)
        seen, wanted = sum(self.lengths), self.embeddings.shape[0]
        if seen != wanted or not self.lengths or 0 in self.lengths:
            raise WireError("bad_request", f"lengths: seen a sum of {seen}, wanted {wanted}, at least one, none 0")


class Encoded(Message, frozen=True, kw_only=True, tag="encoded"):
    """Cloud → device: what `Encode` wanted. tensors: result [rows, width]"""

    TENSORS: ClassVar[tuple[str, ...]] = ("result",)

    seq: U32
    kv_length: U32
    queue_us: U32 = 0
    compute_us: U32 = 0

    @property
    def result(self) -> Array:
        return self.tensors[0]

    def check(self) -> None:
        _expect(self.result, "result", _FLOATS, 2)


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Device → cloud: drop every request from `seq` on; one that runs may complete. Each still gets its one reply."""

    seq: U32


class Error(Message, frozen=True, kw_only=True, tag="error"):
    """Cloud → device: `seq` failed, or the whole connection where `seq` is None."""

    code: ErrorCode
    message: Annotated[str, msgspec.Meta(max_length=2048)]
    seq: U32 | None = None
    kv_length: U32 = 0
    retryable: bool = False


AnyMessage = Open | Opened | Append | Logits | Hidden | Encode | Encoded | Cancel | Error
_TYPES: dict[str, type[Message]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (Open, Opened, Append, Logits, Hidden, Encode, Encoded, Cancel, Error)
}


def _expect(array: Array, name: str, dtypes: tuple[np.dtype[Any], ...], dimensions: int) -> None:
    if array.dtype not in dtypes:
        wanted = " or ".join(_NAMES[dtype] for dtype in dtypes)
        raise WireError("bad_frame", f"{name}: seen dtype {array.dtype.name}, wanted {wanted}")
    if array.ndim != dimensions:
        raise WireError("bad_frame", f"{name}: seen {array.ndim} dimensions, wanted {dimensions}")


def _describe(array: Any) -> Any:
    return (_NAMES[array.dtype], array.shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_describe)


def encode(message: Message) -> bytes:
    """The frame of one message. Raises WireError for a dtype that is not the wire's and a header over its limit."""
    for array in message.tensors:
        if array.dtype not in _NAMES:
            raise WireError("bad_frame", f"tensor: seen dtype {array.dtype}, wanted one of {', '.join(DTYPES)}")
    header = _encoder.encode(message)
    if len(header) > MAX_HEADER:
        raise WireError("too_large", f"header: seen {len(header)} bytes, wanted at most {MAX_HEADER}")
    parts = [struct.pack("<I", len(header)), header]
    length = 4 + len(header)
    for array in message.tensors:
        padding = -length % ALIGNMENT
        raw = np.ascontiguousarray(array).tobytes()
        parts += (bytes(padding), raw)
        length += padding + len(raw)
    return b"".join(parts)


class _Tensors:
    """Cuts a frame's tensors out of it, in the header's order, as msgspec meets their descriptions."""

    def __init__(self, frame: memoryview, offset: int) -> None:
        self.frame = frame
        self.offset = offset
        self.seen = 0

    def take(self, kind: type, description: Any) -> Any:
        if kind is not np.ndarray:
            raise WireError("bad_frame", f"header: no field of type {kind.__name__} is known")
        self.seen += 1
        if self.seen > MAX_TENSORS:
            raise WireError("bad_frame", f"tensors: seen more than {MAX_TENSORS}")
        dtype, shape = _description(description)
        start = self.offset + -self.offset % ALIGNMENT
        if any(self.frame[self.offset : start]):
            raise WireError("bad_frame", f"padding before tensor {self.seen}: seen bytes that are not zero")
        count = 1
        for size in shape:
            count *= size
        end = start + count * dtype.itemsize
        if end > len(self.frame):
            raise WireError("bad_frame", f"tensor {self.seen}: ends at byte {end}, the frame at {len(self.frame)}")
        self.offset = end
        return np.frombuffer(self.frame[start:end], dtype).reshape(shape)


def _description(description: Any) -> tuple[np.dtype[Any], list[int]]:
    if not isinstance(description, list) or len(description) != 2:
        raise WireError("bad_frame", "tensors: an entry is not [dtype, shape]")
    name, shape = description
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise WireError("bad_frame", f"tensor dtype: seen {str(name)[:32]!r}, wanted one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise WireError("bad_frame", f"tensor shape: wanted at most {MAX_DIMENSIONS} dimensions")
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**32:
            raise WireError("bad_frame", "tensor shape: a dimension is not an unsigned 32-bit integer")
    return dtype, shape


_reading = threading.local()  # .tensors: of the frame that this thread decodes; a decoder takes no context
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(
    AnyMessage, dec_hook=lambda kind, description: _reading.tensors.take(kind, description)
)


def decode(frame: bytes | bytearray | memoryview) -> AnyMessage:
    """The message in a frame, its tensors as views of it. Raises WireError; allocates nothing a header claims."""
    view = memoryview(frame).toreadonly()
    if len(view) < 4:
        raise WireError("bad_frame", f"frame: seen {len(view)} bytes, wanted at least 4")
    (header_length,) = struct.unpack_from("<I", view)
    if header_length > MAX_HEADER or 4 + header_length > len(view):
        limit = min(MAX_HEADER, len(view) - 4)
        raise WireError("bad_frame", f"header length: seen {header_length}, wanted at most {limit}")
    tensors = _reading.tensors = _Tensors(view, 4 + header_length)
    try:
        message = _decoder.decode(view[4 : 4 + header_length])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The text of a validation error names a field and a type; where it quotes a value, that is cut out, as it
        # may be a secret in the wrong field, 64 KiB, or a terminal's control characters.
        detail = str(error) if isinstance(error, msgspec.ValidationError) else "not MessagePack"
        if detail.startswith("Invalid"):
            detail = f"no such choice - at {detail.rpartition(' - at ')[2]}"
        raise WireError("bad_frame", f"header: {detail}") from None
    if tensors.offset != len(view):
        raise WireError("bad_frame", f"frame: seen {len(view)} bytes, wanted {tensors.offset}")
    if tensors.seen != len(message.TENSORS):  # counted as they were cut: `tensors` may stand in a header twice
        raise WireError("bad_frame", f"tensors: seen {tensors.seen}, wanted {len(message.TENSORS)}")
    try:
        message.check()
    except WireError as error:
        error.seq = getattr(message, "seq", None)
        raise
    return message


def messages() -> Iterator[tuple[str, type[Message]]]:
    """Every message type with its tag, in PROTOCOL.md's order."""
    return iter(_TYPES.items())
