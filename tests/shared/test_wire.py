"""The wire: decode∘encode is the identity, and no frame does anything but decode or raise WireError."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import wire
from shared.errors import WireError
from tests.thorough import examples

CODES = get_args(wire.ErrorCode)
APPEND = wire.Append(seq=7, keep=3, tensors=(np.array([[1, 2]], "<f4"),))
APPEND_FRAME = (
    b"\x2d\x00\x00\x00"
    b"\x84\xa4type\xa6append\xa7tensors\x91\x92\xa7float32\x92\x01\x02\xa3seq\x07\xa4keep\x03"
    b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    b"\x00\x00\x80\x3f\x00\x00\x00\x40"
)

u32 = st.integers(0, 2**32 - 1)
size = st.integers(1, 6)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
floats = st.sampled_from(wire.FLOATS)
unit = st.sampled_from(["float32"])
integers = st.sampled_from(["uint32"])


@st.composite
def tensor(draw: st.DrawFn, dtype: st.SearchStrategy[str], *shape: int) -> np.ndarray:
    """Any bits at all, NaN among them."""
    kind = wire.DTYPES[draw(dtype)]
    length = math.prod(shape) * kind.itemsize
    return np.frombuffer(draw(st.binary(min_size=length, max_size=length)), kind).reshape(shape)


@st.composite
def open_(draw: st.DrawFn) -> wire.Message:
    dtype = draw(st.sampled_from(["auto", *wire.FLOATS]))
    secret = st.none() | text
    return wire.Open(model=draw(text), key_id=draw(text), dtype=dtype, token=draw(secret), resume=draw(secret))


@st.composite
def opened(draw: st.DrawFn) -> wire.Message:
    numbers = ("kv_length", "hidden_size", "vocab_size", "context")
    limits = ("max_frame", "max_rows", "max_full_rows", "max_top_k", "window")
    return wire.Opened(
        session=draw(text), resume=draw(text), dtype=draw(floats), **{name: draw(u32) for name in numbers + limits}
    )


@st.composite
def append(draw: st.DrawFn) -> wire.Message:
    n = draw(size)
    return wire.Append(
        seq=draw(u32),
        keep=draw(u32),
        rows=draw(st.integers(0, n)),
        want=draw(st.sampled_from(["logits", "hidden"])),
        top_k=draw(u32),
        temperature=draw(st.floats(0, 1e6, exclude_min=True)),
        kind=draw(st.sampled_from(["text", "image"])),
        after=draw(st.none() | u32),
        tensors=(draw(tensor(floats, n, draw(size))),),
    )


def reply(draw: st.DrawFn) -> dict[str, Any]:
    return {name: draw(u32) for name in ("seq", "kv_length", "queue_us", "compute_us")}


@st.composite
def logits(draw: st.DrawFn) -> wire.Message:
    rows, k, full = draw(st.integers(0, 4)), draw(size), draw(st.booleans())
    ids = tensor(integers, rows, 0 if full else k)
    return wire.Logits(**reply(draw), tensors=(draw(tensor(floats, rows, k)), draw(ids), draw(tensor(unit, rows, 2))))


@st.composite
def states(draw: st.DrawFn) -> wire.Message:
    kind = draw(st.sampled_from([wire.Hidden, wire.Encoded]))
    return kind(**reply(draw), tensors=(draw(tensor(floats, draw(st.integers(0, 4)), draw(size))),))


@st.composite
def encode_(draw: st.DrawFn) -> wire.Message:
    lengths = tuple(draw(st.lists(size, min_size=1, max_size=4)))
    want = draw(st.sampled_from(["hidden", "pooled", "logits", "store"]))
    embeddings = draw(tensor(floats, sum(lengths), draw(size)))
    return wire.Encode(seq=draw(u32), lengths=lengths, want=want, tensors=(embeddings,))


cancel = st.builds(wire.Cancel, seq=u32)
error = st.builds(
    wire.Error,
    code=st.sampled_from(CODES),
    message=text,
    seq=st.none() | u32,
    kv_length=u32,
    retryable=st.booleans(),
)
messages = st.one_of(open_(), opened(), append(), logits(), states(), encode_(), cancel, error)


def same(one: wire.Message, other: wire.Message) -> bool:
    def content(message: wire.Message) -> Any:
        fields = {name: getattr(message, name) for name in message.__struct_fields__ if name != "tensors"}
        return type(message), fields, [(tensor.dtype, tensor.shape, tensor.tobytes()) for tensor in message.tensors]

    return content(one) == content(other)


def decodes_or_raises_wire_error(frame: bytes) -> None:
    try:
        message = wire.decode(frame)
    except WireError as error:
        assert error.code in CODES
    else:
        assert same(wire.decode(wire.encode(message)), message)


# --- what is right ---


@settings(max_examples=examples(300), deadline=None)
@given(messages)
def test_decode_of_encode_is_the_identity(message: wire.Message) -> None:
    assert same(wire.decode(wire.encode(message)), message)


def test_every_message_of_the_union_has_a_tag() -> None:
    assert {kind for _, kind in wire.messages()} == set(get_args(wire.AnyMessage))


def test_one_frame_has_these_very_bytes() -> None:
    assert wire.encode(APPEND) == APPEND_FRAME


@settings(max_examples=examples(100), deadline=None)
@given(messages)
def test_every_tensor_starts_at_a_multiple_of_16_bytes(message: wire.Message) -> None:
    frame = wire.encode(message)
    start = np.frombuffer(frame, np.uint8).ctypes.data
    starts = [tensor.ctypes.data - start for tensor in wire.decode(frame).tensors if tensor.size]
    assert all(at % wire.ALIGNMENT == 0 for at in starts)


@pytest.mark.parametrize("dtype", wire.FLOATS)
def test_decoding_copies_no_tensor(dtype: str) -> None:
    frame = wire.encode(wire.Append(seq=1, keep=0, tensors=(np.ones((5, 3), wire.DTYPES[dtype]),)))
    assert np.shares_memory(np.frombuffer(frame, np.uint8), wire.decode(frame).tensors[0].view(np.uint8))


def test_decoding_a_writable_buffer_gives_tensors_that_cannot_be_written() -> None:
    assert not wire.decode(bytearray(APPEND_FRAME)).tensors[0].flags.writeable


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_frame_may_come_in_any_buffer(kind: Any) -> None:
    assert same(wire.decode(kind(APPEND_FRAME)), APPEND)


def test_encoding_a_strided_tensor_writes_its_values_in_order() -> None:
    embeddings = np.arange(12, dtype="<f4").reshape(3, 4)[::2, ::-1]
    decoded = wire.decode(wire.encode(wire.Append(seq=1, keep=0, tensors=(embeddings,))))
    assert np.array_equal(decoded.tensors[0], embeddings)


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<i4", "O"])
def test_encoding_a_dtype_that_the_wire_lacks_is_refused(dtype: str) -> None:
    with pytest.raises(WireError):
        wire.encode(wire.Append(seq=1, keep=0, tensors=(np.zeros((1, 2), dtype),)))


# --- what is wrong ---

VECTORS = [json.loads(path.read_bytes()) for path in (Path(wire.__file__).parent / "vectors").glob("*.json")]
VALID = [bytes.fromhex(case["frame"]) for case in VECTORS if "message" in case.get("expect", {})]
SHORT = sorted((frame for frame in VALID if len(frame) < 1000), key=len)

edit = st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(min_size=1, max_size=8))


def edited(frame: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Bytes replaced, inserted or cut out."""
    for at, what, data in edits:
        at %= len(frame) + 1
        frame = frame[:at] + (b"" if what == 2 else data) + frame[at + (0 if what == 1 else len(data)) :]
    return frame


@settings(max_examples=examples(3000), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SHORT), st.lists(edit, min_size=1, max_size=3))
def test_an_edited_frame_decodes_or_raises_wire_error(frame: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    decodes_or_raises_wire_error(edited(frame, edits))


@settings(max_examples=examples(300), deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_decode_or_raise_wire_error(data: bytes, framed: bool) -> None:
    decodes_or_raises_wire_error(len(data).to_bytes(4, "little") + data if framed else data)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | text | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text | st.integers(-9, 9), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(["type", "tensors", "seq", "rows", "lengths", "temperature", "token", "want", "unknown"])


@settings(max_examples=examples(500), deadline=None)
@given(st.sampled_from(SHORT), st.dictionaries(names, values, min_size=1, max_size=2))
def test_a_header_with_any_values_decodes_or_raises_wire_error(frame: bytes, fields: dict[str, Any]) -> None:
    end = 4 + int.from_bytes(frame[:4], "little")
    header = msgspec.msgpack.encode(msgspec.msgpack.decode(frame[4:end]) | fields)
    start = 4 + len(header)
    decodes_or_raises_wire_error(
        len(header).to_bytes(4, "little") + header + bytes(-start % 16) + frame[end + -end % 16 :]
    )


def test_a_frame_cut_anywhere_is_refused() -> None:
    for frame in SHORT:
        for length in range(len(frame)):
            with pytest.raises(WireError):
                wire.decode(frame[:length])


def test_a_frame_with_anything_behind_it_is_refused() -> None:
    for frame in SHORT:
        for more in (b"\x00", bytes(16)):
            with pytest.raises(WireError):
                wire.decode(frame + more)


def test_a_request_that_does_not_fit_names_its_seq() -> None:
    with pytest.raises(WireError) as caught:
        wire.decode(wire.encode(wire.Append(seq=7, keep=3, rows=2, tensors=APPEND.tensors)))
    assert (caught.value.code, caught.value.seq) == ("bad_request", 7)


def test_encoding_a_header_over_the_limit_is_refused() -> None:
    with pytest.raises(WireError):
        wire.encode(wire.Encode(seq=1, lengths=(1,) * 70_000, tensors=(np.ones((70_000, 1), "<f4"),)))


# --- what is secret ---


@pytest.mark.parametrize("field", ["type", "dtype"])
def test_an_error_shows_no_value_of_the_header(field: str) -> None:
    header = msgspec.msgpack.encode({"type": "open", "model": "m", "key_id": "k", field: "hunter2\x1b[31m" * 400})
    with pytest.raises(WireError) as caught:
        wire.decode(len(header).to_bytes(4, "little") + header)
    assert "hunter2" not in str(caught.value)


def test_rich_shows_no_token_either() -> None:
    assert "hunter2" not in str(list(wire.Open(model="m", key_id="k", token="hunter2").__rich_repr__()))


SECRETS = [
    wire.Open(model="m", key_id="k", token="hunter2", resume="hunter2"),
    wire.Opened(
        session="s",
        resume="hunter2",
        dtype="float32",
        **dict.fromkeys(("kv_length", "hidden_size", "vocab_size", "context", "max_frame"), 1),
        **dict.fromkeys(("max_rows", "max_full_rows", "max_top_k", "window"), 1),
    ),
]


@pytest.mark.parametrize("message", SECRETS, ids=lambda message: type(message).__name__)
def test_no_token_and_no_resume_secret_shows(message: wire.Message) -> None:
    assert "hunter2" not in f"{message!r} {message!s} {[message]}"


@pytest.mark.parametrize("frame", SHORT)
def test_a_message_shows_its_type_and_seq_alone(frame: bytes) -> None:
    message = wire.decode(frame)
    seq = getattr(message, "seq", None)
    assert repr(message) == f"{type(message).__name__}({'' if seq is None else f'seq={seq}'})"
