"""At least 20,000 wrong frames against a real server, while another session decodes.

What each frame must lead to is known beforehand: one reply with its seq, an Error that ends the connection, or nothing
(a Cancel). So any frame that is swallowed, answered twice, answered out of order or that makes the server fail is seen.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from shared import wire
from shared.errors import WireError
from tests.cloud_backend.device import PATIENCE, Device, decode_greedily, open_of, table
from tests.conftest import run_cloud_process

FRAMES = 20_000
POOL = 8  # connections at a time
SESSIONS = 3 * POOL  # the most the server takes: the pool, the steady one, and some that are still closing
MAX_FRAME = 4096
TOKENS = 24  # that the steady session decodes before it begins again
WIDTH = 48
EMBEDDINGS = table()
HANG = 8.0  # seconds without an answer
LONGEST_PAUSE = 8.0  # seconds without a token of the steady session; one takes milliseconds

# --- frames ---

Maker = Callable[[int], bytes]  # gives the frame for a seq


def append(n: int = 2, **fields: Any) -> wire.Append:
    return wire.Append(**{"seq": 0, "keep": 0, "top_k": 4, "tensors": (EMBEDDINGS[:n],)} | fields)


def logits(rows: int = 1) -> wire.Logits:
    tensors = (np.ones((rows, 3), np.float32), np.ones((rows, 3), np.uint32), np.ones((rows, 2), np.float32))
    return wire.Logits(seq=0, kv_length=1, tensors=tensors)


VALID: list[wire.Message] = [
    append(1),
    append(3, rows=3, top_k=0),
    append(2, keep=1, rows=0),
    append(1, want="hidden", temperature=0.5),
    append(2, after=7),
    wire.Encode(seq=0, lengths=(1, 2), tensors=(EMBEDDINGS[:3],)),
    wire.Cancel(seq=0),
    wire.Cancel(seq=2**32 - 1),
]
UNEXPECTED: list[wire.Message] = [wire.Open(model="llama", key_id="0"), wire.Error(code="idle", message=""), logits()]
# They fit the frame, and not the session: each is answered, and the connection goes on.
UNFIT: list[wire.Message] = [
    append(tensors=(np.full((1, WIDTH), np.nan, np.float32),)),
    append(tensors=(np.full((2, WIDTH), -np.inf, np.float32),)),
    append(tensors=(EMBEDDINGS[:2, :47],)),
    append(tensors=(np.ones((2, 0), np.float32),), rows=0),
    append(tensors=(np.ones((0, WIDTH), np.float32),), rows=0),
    append(tensors=(EMBEDDINGS[:2].astype(np.float16),)),
    append(tensors=(EMBEDDINGS[:2].astype(wire.DTYPES["bfloat16"]),)),
    append(rows=3),
    append(rows=2**32 - 1),
    append(9, rows=9, top_k=0),
    append(keep=2**32 - 1),
    append(keep=300),
    append(after=2**32 - 1),
    append(top_k=2**32 - 1),
    append(top_k=1025),
    append(kind="image"),
    append(20 * MAX_FRAME // 3840),  # just over max_frame
    wire.Encode(seq=0, lengths=(), tensors=(np.ones((0, WIDTH), np.float32),)),
    wire.Encode(seq=0, lengths=(2**32 - 1, 2), tensors=(EMBEDDINGS[:3],)),
    wire.Encode(seq=0, lengths=(3, 0), want="store", tensors=(EMBEDDINGS[:3],)),
]


def numbered(message: wire.Message, seq: int) -> wire.Message:
    """With this seq, if it is a request; the seq of a Cancel is another's."""
    return msgspec.structs.replace(message, seq=seq) if isinstance(message, wire.Append | wire.Encode) else message


def parts(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """The header's fields, and the bytes behind the header's padding."""
    end = 4 + int.from_bytes(frame[:4], "little")
    return msgspec.msgpack.decode(frame[4:end]), frame[end + -end % wire.ALIGNMENT :]


def joined(fields: Any, body: bytes, padding: bytes | None = None) -> bytes:
    header = msgspec.msgpack.encode(fields)
    if padding is None:
        padding = bytes(-(4 + len(header)) % wire.ALIGNMENT)
    return len(header).to_bytes(4, "little") + header + padding + body


def well_formed(message: wire.Message) -> Maker:
    return lambda seq: wire.encode(numbered(message, seq))


def edited(message: wire.Message, edits: list[tuple[int, int, bytes]]) -> Maker:
    """Bytes replaced, inserted or cut out."""

    def make(seq: int) -> bytes:
        frame = wire.encode(numbered(message, seq))
        for at, what, data in edits:
            at %= len(frame) + 1
            frame = frame[:at] + (b"" if what == 2 else data) + frame[at + (0 if what == 1 else len(data)) :]
        return frame

    return make


def flipped(message: wire.Message, bits: list[int]) -> Maker:
    """Bits of the tensors flipped, and none of the header's: any floats at all."""

    def make(seq: int) -> bytes:
        frame = bytearray(wire.encode(numbered(message, seq)))
        start = 4 + int.from_bytes(frame[:4], "little")
        for bit in bits:
            if start < len(frame):
                frame[start + bit // 8 % (len(frame) - start)] ^= 1 << bit % 8
        return bytes(frame)

    return make


def cut(message: wire.Message, length: int) -> Maker:
    return lambda seq: (frame := wire.encode(numbered(message, seq)))[: length % len(frame)]


def wrong_length(message: wire.Message, length: int) -> Maker:
    return lambda seq: length.to_bytes(4, "little") + wire.encode(numbered(message, seq))[4:]


def headed(message: wire.Message, fields: dict[str, Any]) -> Maker:
    def make(seq: int) -> bytes:
        header, body = parts(wire.encode(numbered(message, seq)))
        return joined(header | fields, body)

    return make


def reshaped(message: wire.Message, dtype: Any, shape: Any) -> Maker:
    """The same bytes, described as another tensor."""
    return headed(message, {"tensors": [[dtype, shape]]})


def retyped(message: wire.Message, dtype: str, dimensions: int) -> Maker:
    """The same bytes, as a tensor of another dtype or number of dimensions that fits them to the last byte."""

    def make(seq: int) -> bytes:
        header, body = parts(wire.encode(numbered(message, seq)))
        count = len(body) // wire.DTYPES[dtype].itemsize
        return joined(header | {"tensors": [[dtype, [1] * (dimensions - 1) + [count]]]}, body)

    return make


def misaligned(message: wire.Message, padding: bytes) -> Maker:
    def make(seq: int) -> bytes:
        header, body = parts(wire.encode(numbered(message, seq)))
        return joined(header, body, padding)

    return make


any_valid = st.sampled_from(VALID)
with_tensor = st.sampled_from([message for message in VALID if message.tensors])
u32 = st.integers(0, 2**32 - 1)
edits = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3
)
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**32, 2**63, 7.0, math.nan, math.inf, "", "x" * 600, b"\0", []]),
)
names = st.sampled_from(
    ["type", "seq", "keep", "rows", "want", "top_k", "temperature", "kind", "after", "lengths", "x"]
)
dtypes = st.sampled_from([*wire.DTYPES, "float64", "int8", "", 7, None])
sizes = st.sampled_from([0, 1, 2, 3, 47, 48, 49, 96, 144, 2**32 - 1, 2**32, -1, 1.0, None])
ends_it = st.one_of(
    st.builds(edited, any_valid, edits),
    st.builds(edited, any_valid, edits),
    st.builds(cut, any_valid, st.integers(0, 1000)),
    st.builds(wrong_length, any_valid, st.integers(0, 100) | u32),
    st.builds(headed, any_valid, st.dictionaries(names, odd_values, min_size=1, max_size=2)),
    st.builds(reshaped, with_tensor, dtypes, st.lists(sizes, max_size=5)),
    st.builds(retyped, with_tensor, st.sampled_from(sorted(wire.DTYPES)), st.integers(1, 5)),
    st.builds(misaligned, with_tensor, st.binary(max_size=20)),
    st.builds(well_formed, st.sampled_from(UNEXPECTED)),
    st.builds(lambda garbage: lambda _: garbage, st.binary(max_size=80)),
    st.builds(lambda size: lambda _: bytes(size), st.integers(2 * MAX_FRAME - 2, 2 * MAX_FRAME + 2)),
)
# Most of them are answered, so that many fit one connection.
goes_on = st.one_of(
    st.builds(well_formed, st.sampled_from(UNFIT)),
    st.builds(well_formed, st.sampled_from(UNFIT)),
    st.builds(flipped, with_tensor, st.lists(st.integers(0, 6000), min_size=1, max_size=4)),
    st.builds(
        reshaped, with_tensor, st.just("float32"), st.sampled_from([[144, 1], [1, 48], [3, 48], [48, 3], [1, 144]])
    ),
    st.builds(headed, with_tensor, st.dictionaries(st.sampled_from(["x", "tensorz", ""]), odd_values, max_size=2)),
)


@dataclass
class Conversation:
    """What one connection sends: an Open, right or edited, then frames."""

    opening: list[tuple[int, int, bytes]]  # edits; mostly none
    makers: list[Maker]
    as_text: bool  # the last frame as a text message
    fragment: int | None  # bytes; None: every message whole
    drops: bool  # ends without a closing handshake, if the server did not close


conversations = st.lists(
    st.builds(
        Conversation,
        st.just([]) | st.just([]) | st.just([]) | edits,
        st.builds(lambda first, last: [*first, last], st.lists(goes_on, min_size=8, max_size=14), ends_it),
        st.integers(0, 19).map(lambda value: value == 0),
        st.sampled_from([None, None, None, 7, 100]),
        st.booleans(),
    ),
    min_size=POOL,
    max_size=POOL,
)

# --- what they must lead to ---


@dataclass
class Expected:
    """frames: what to send, up to the one that ends the connection; seqs: of the requests, in order."""

    frames: list[bytes] = field(default_factory=list)
    seqs: list[int] = field(default_factory=list)
    opened: bool = False
    end: tuple[str, int] | None = None  # Error code ("" for none) and close code; None: the server leaves it open


def foretell(conversation: Conversation, opening: wire.Open) -> Expected:
    expected, last = Expected(), -1
    makers = [edited(opening, conversation.opening), *conversation.makers]
    for number, make in enumerate(makers):
        frame = make(1000 + number)
        expected.frames.append(frame)
        text = conversation.as_text and number == len(makers) - 1
        code, seq = outcome(frame, opening, opened=expected.opened, text=text)
        if seq is not None and seq <= last:
            code, seq = "bad_request", None
        if code:
            closes = {"bad_frame": 1002, "": 1009}.get(code, 1008)
            expected.end = ("" if code == "too big" else code, 1009 if code == "too big" else closes)
            break
        expected.opened = True
        if seq is not None:
            last = seq
            expected.seqs.append(seq)
    return expected


def outcome(frame: bytes, opening: wire.Open, *, opened: bool, text: bool) -> tuple[str, int | None]:
    """The code that ends the connection, or none and the seq of the request to be answered, if it is one."""
    if len(frame) > 2 * MAX_FRAME:
        return "too big", None
    if text:
        return "bad_frame", None
    try:
        message = wire.decode(frame)
    except WireError as error:
        return ("", error.seq) if opened and error.code == "bad_request" else ("bad_frame", None)
    if isinstance(message, wire.Open) and not opened:
        if message.model != opening.model:
            return "unknown_model", None
        return ("", None) if message.key_id == opening.key_id else ("wrong_key", None)
    if opened and isinstance(message, wire.Append | wire.Encode):
        return "", message.seq
    return ("", None) if opened and isinstance(message, wire.Cancel) else ("bad_request", None)


# --- the lines ---


class Line:
    """A WebSocket connection that sends what it is told and collects what comes."""

    def __init__(self, url: str) -> None:
        self.protocol = ClientProtocol(parse_uri(url), subprotocols=[Subprotocol(wire.SUBPROTOCOL)], max_size=None)
        self.frames: list[bytes] = []
        where = urlsplit(url)
        self.socket = socket.create_connection((where.hostname, where.port), HANG)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.protocol.send_request(self.protocol.connect())
        self.flush()

    def flush(self) -> None:
        data = self.protocol.data_to_send()
        self.socket.sendall(b"".join(data))

    def read(self) -> bool:
        """Reads once; whether there may be more. A server that says nothing for HANG seconds hangs: TimeoutError."""
        data = self.socket.recv(65536)
        if data:
            self.protocol.receive_data(data)
        else:
            self.protocol.receive_eof()
        for event in self.protocol.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.BINARY:
                self.frames.append(bytes(event.data))
        self.flush() if data else None
        return bool(data)

    def until_open(self) -> None:
        while self.protocol.state is State.CONNECTING and self.read():
            pass
        assert self.protocol.state is OPEN, self.protocol.handshake_exc

    def send(self, frames: list[bytes], conversation: Conversation) -> None:
        for number, frame in enumerate(frames):
            text = conversation.as_text and number == len(conversation.makers)
            size = max(conversation.fragment or len(frame), len(frame) // 100, 1)
            pieces = [frame[at : at + size] for at in range(0, len(frame), size)] or [b""]
            # The text is ASCII: what is no UTF-8 ends a connection before it is a message.
            start = self.protocol.send_text if text else self.protocol.send_binary
            pieces = [piece.hex().encode()[: len(piece)] for piece in pieces] if text else pieces
            start(pieces[0], fin=len(pieces) == 1)
            for at, piece in enumerate(pieces[1:], 2):
                self.protocol.send_continuation(piece, fin=at == len(pieces))
        self.flush()

    def shake_hands(self) -> None:
        self.protocol.send_close(1000)
        self.flush()
        while self.read():
            pass

    def close(self) -> None:
        self.socket.close()


def converse(url: str, talk: list[Conversation], opening: wire.Open) -> int:
    """Has all the conversations at once, and gives the number of wrong frames that the server had to judge."""
    expected = [foretell(conversation, opening) for conversation in talk]
    with ExitStack() as stack:
        lines = [stack.enter_context(closing(Line(url))) for _ in talk]
        for line in lines:
            line.until_open()
        for line, conversation, due in zip(lines, talk, expected, strict=True):
            with what_ends_may_be_cut_off(due):
                line.send(due.frames, conversation)
        for line, due in zip(lines, expected, strict=True):
            replies = due.opened + len(due.seqs)
            with what_ends_may_be_cut_off(due):
                while (due.end or len(line.frames) < replies) and line.read():
                    pass
                check(line, due)
        for line, conversation, due in zip(lines, talk, expected, strict=True):
            if due.end is None and not conversation.drops:
                line.shake_hands()
    return sum(len(due.frames) - (not conversation.opening) for due, conversation in zip(expected, talk, strict=True))


@contextmanager
def what_ends_may_be_cut_off(due: Expected) -> Iterator[None]:
    """A server that ends a connection need not read what is still coming, nor wait long for a slow peer: TCP then
    resets, and frames under way are lost. One that is to go on must not."""
    try:
        yield
    except ConnectionError:
        assert due.end is not None


def check(line: Line, due: Expected) -> None:
    received = [wire.decode(frame) for frame in line.frames]
    if due.end is not None:
        code, close = due.end
        if line.protocol.close_code in (None, 1006):
            return  # cut off before its close frame: see what_ends_may_be_cut_off
        assert line.protocol.close_code == close
        if code:
            last = received.pop()
            assert isinstance(last, wire.Error) and (last.code, last.seq) == (code, None)
    if due.opened and (received or due.end is None):
        assert isinstance(received.pop(0), wire.Opened)
    seqs = [getattr(reply, "seq", None) for reply in received]
    assert seqs == due.seqs[: len(seqs)] and (due.end or len(seqs) == len(due.seqs))
    for reply in received:
        assert isinstance(reply, wire.Logits | wire.Hidden | wire.Error) and reply.kv_length <= 256
        assert not isinstance(reply, wire.Error) or reply.message.isprintable()


# --- the steady session ---


class Steady(threading.Thread):
    """A session that decodes the same tokens over and over, and compares."""

    def __init__(self, url: str, opening: wire.Open) -> None:
        super().__init__(daemon=True)
        self.device = Device(url, opening)
        self.rows = decode_greedily(self.device.rows, TOKENS)  # undisturbed
        self.times: list[float] = []
        self.different = 0
        self.failure: BaseException | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        try:
            while not self.stopped.is_set():
                for seen, wanted in zip(decode_greedily(self.step, TOKENS), self.rows, strict=True):
                    self.different += not np.allclose(seen, wanted, rtol=0, atol=1e-4)
                    self.different += int(seen.argmax() != wanted.argmax())
        except BaseException as error:
            self.failure = error

    def step(self, keep: int, embeddings: np.ndarray) -> np.ndarray:
        row = self.device.rows(keep, embeddings)
        self.times.append(time.monotonic())
        time.sleep(0.01)  # leaves the server to the others as well
        return row


@dataclass
class Outcome:
    """What the fuzz left."""

    frames: int
    seconds: float
    failure: BaseException | None
    pauses: list[float]  # of the steady session, in seconds
    steady: Steady
    left_over: int
    status: int


@pytest.fixture(scope="module")
def fuzzed(tiny: Path) -> Iterator[Outcome]:
    opening = open_of(tiny)
    limits = ("--max-sessions", str(SESSIONS), "--max-frame", str(MAX_FRAME), "--window", "65536")
    with run_cloud_process(tiny / "cloud", *limits) as (url, process):
        steady = Steady(url, opening)
        judged = [0]

        @settings(
            max_examples=600,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
            report_multiple_bugs=False,
        )
        @given(conversations)
        def fuzz(talk: list[Conversation]) -> None:
            if judged[0] < FRAMES:
                judged[0] += converse(url, talk, opening)

        failure = None
        began = time.monotonic()
        steady.start()
        try:
            fuzz()
        except BaseException as error:
            failure = error
        ended = time.monotonic()
        steady.stopped.set()
        steady.join(PATIENCE)
        steady.device.socket.close()
        left_over = left_over_sessions(url, opening)
        process.terminate()
        moments = [began, *(moment for moment in steady.times if moment < ended), ended]
        pauses = np.diff(moments).tolist()
        yield Outcome(judged[0], ended - began, failure, pauses, steady, left_over, process.wait(PATIENCE))


def left_over_sessions(url: str, opening: wire.Open) -> int:
    """How many of the server's places are not free; those of sessions that have just ended get some time."""
    deadline, free = time.monotonic() + PATIENCE, 0
    while free < SESSIONS and time.monotonic() < deadline:
        with ExitStack() as stack, suppress(AssertionError, ConnectionClosed):  # too_many_sessions
            for free in range(SESSIONS + 1):  # noqa: B007
                stack.enter_context(Device(url, opening))
        time.sleep(0.2)
    return SESSIONS - free


def test_every_frame_is_answered_or_ends_its_connection_as_foretold(fuzzed: Outcome) -> None:
    if fuzzed.failure:
        raise fuzzed.failure


def test_it_was_20_000_frames(fuzzed: Outcome) -> None:
    assert fuzzed.frames >= FRAMES


def test_another_session_decodes_without_an_error_meanwhile(fuzzed: Outcome) -> None:
    if fuzzed.steady.failure:
        raise fuzzed.steady.failure


def test_another_session_gets_the_logits_of_an_undisturbed_run(fuzzed: Outcome) -> None:
    assert fuzzed.steady.different == 0


def test_another_session_makes_progress_throughout(fuzzed: Outcome) -> None:
    assert max(fuzzed.pauses) < LONGEST_PAUSE


def test_no_session_is_left_over(fuzzed: Outcome) -> None:
    assert fuzzed.left_over == 0


def test_the_server_then_stops_cleanly(fuzzed: Outcome) -> None:
    assert fuzzed.status == 0
