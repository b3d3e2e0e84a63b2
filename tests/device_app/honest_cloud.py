"""A cloud without sockets or a model, for tests of the device's session. It keeps PROTOCOL.md to the letter.

Its embeddings say which id they are, so it knows what its KV cache holds, and its logits are a function of those ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from device_app.opening import Widths
from device_app.session import Session
from shared.key import UserKey
from shared.wire import (
    Append,
    Array,
    Cancel,
    Encode,
    Encoded,
    Error,
    ErrorCode,
    Hidden,
    Logits,
    Message,
    Open,
    Opened,
    decode,
    encode,
)

HIDDEN, VOCAB = 8, 1000
EMBEDDING = 4 * HIDDEN  # bytes
BUNDLE_CONTEXT = 1000  # more than the clouds take: theirs counts
_random = np.random.default_rng(20)
KEY = UserKey("0f" * 16, _random.permutation(HIDDEN), _random.permutation(VOCAB))

# Of models whose decoder reads an encoder: images, wider than an embedding, or a source text of the same width.
PATCHES, PATCH_SIZE, IMAGE_TOKENS = 5, 12, 3
LONGEST_SOURCE = 6
IMAGES = Widths(PATCH_SIZE, PATCHES, IMAGE_TOKENS)
SOURCES = Widths(HIDDEN, LONGEST_SOURCE, 0)
LOOKING = UserKey(KEY.key_id, KEY.residual, KEY.vocab, _random.permutation(PATCH_SIZE))
READING = UserKey(KEY.key_id, KEY.residual, KEY.vocab, _random.permutation(HIDDEN))

ENDED_HALFWAY = ("internal", "cancelled")  # the cache is cut to the request's `keep`, as its computation had begun

NO_VOCAB = UserKey(KEY.key_id, KEY.residual, None)  # of an export with the classifier on the device
TABLE = _random.normal(size=(VOCAB, HIDDEN)).astype(np.float32)  # that classifier


def embed(ids: Sequence[int], start: int = 0) -> Array:
    """[n, HIDDEN]: feature j of id i is i + j / 16, which float32 holds exactly."""
    return np.asarray(ids, np.float32)[:, None] + np.arange(HIDDEN, dtype=np.float32) / 16


def image(number: int) -> Array:
    """[PATCHES, PATCH_SIZE]: the embeddings of one of many images."""
    return number + np.arange(PATCHES * PATCH_SIZE, dtype=np.float32).reshape(PATCHES, PATCH_SIZE) / 64


def plain_logits(ids: Sequence[int], source: Sequence[int] | None = None) -> Array:
    """[VOCAB] float32, of exactly these ids (-1 - n stands for image n) after this source."""
    seen = [*(source or ()), 2**30, *(token if token >= 0 else 2**31 - token for token in ids)]
    return np.random.default_rng(seen).normal(0, 3, VOCAB).astype(np.float32)


def plain_hidden(ids: Sequence[int]) -> Array:
    """[HIDDEN] float32, of exactly these ids."""
    return np.random.default_rng(list(ids)).normal(0, 3, HIDDEN).astype(np.float32)


def classify(hidden: Array) -> Array:
    """[rows, HIDDEN] → [rows, VOCAB]"""
    return hidden @ TABLE.T


def new_session() -> Session:
    return Session(KEY, embed, served_name="tiny", context=BUNDLE_CONTEXT)


def classifying_session() -> Session:
    """A session with the classifier on the device."""
    return Session(NO_VOCAB, embed, classify, served_name="tiny", context=BUNDLE_CONTEXT)


def looking_session() -> Session:
    """A session whose model takes images."""
    return Session(LOOKING, embed, served_name="tiny", context=BUNDLE_CONTEXT, widths=IMAGES)


def reading_session() -> Session:
    """A session whose decoder reads a source text."""
    return Session(READING, embed, served_name="tiny", context=BUNDLE_CONTEXT, widths=SOURCES)


def opened(**fields: object) -> Opened:
    """An Opened with room for a few embeddings a frame."""
    usual = {
        "session": "s",
        "resume": "r",
        "kv_length": 0,
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "dtype": "float32",
        "context": 64,
        "max_frame": 1024 + 4 * EMBEDDING,
        "max_rows": 64,
        "max_full_rows": 8,
        "max_top_k": 1000,
        "window": 1_000_000,
    }
    return Opened(**usual | fields)  # type: ignore[arg-type]


def of_widths(widths: Widths) -> dict[str, int]:
    """What Opened says of them."""
    names = ("encoder_size", "encoder_context", "image_tokens")
    return {name: getattr(widths, name) for name in names}


class HonestCloud:
    """Takes what a session has to say, and answers one request a `step`."""

    def __init__(self, **fields: object) -> None:
        self.opened = opened(**fields)
        self.appends: list[Append] = []  # all that came
        self.stores: list[Encode] = []  # all that came
        self.cache: list[int] = []  # -1 - n stands for image n
        self.source: list[int] | None = None
        self.failures: list[ErrorCode] = []  # codes for the next requests, which it then does not carry out, or half
        self._changed_by: int | None = None
        self._waiting: deque[tuple[Append | Encode, int]] = deque()
        self._cancelled: set[int] = set()
        self._in_flight = 0

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self._waiting)

    def connect(self, session: Session) -> None:
        """A fresh connection: what was held for the one before is gone."""
        self.cache, self.source = [], None
        self.take_over(session)

    def take_over(self, session: Session) -> None:
        """A fresh connection, which gets what was held for the one before if it asks for that."""
        session.connected()
        opening = decode(session.outbox.popleft())
        assert isinstance(opening, Open)
        if opening.resume != self.opened.resume:
            self.cache, self.source = [], None
        self._changed_by, self._in_flight = None, 0
        self._waiting.clear()
        self._cancelled.clear()
        session.receive(encode(msgspec.structs.replace(self.opened, kv_length=len(self.cache))))
        self.take(session)

    def cut(self, session: Session, arrived: int) -> None:
        """The line breaks: so many requests were carried out whose answers are lost. The session resumes."""
        for _ in range(min(arrived, self.waiting)):
            self.reply()
        session.lost()
        self.take_over(session)

    def take(self, session: Session) -> None:
        """Takes all frames from the session's outbox."""
        while session.outbox:
            self.receive(session.outbox.popleft())

    def receive(self, frame: bytes) -> None:
        """Takes one frame of a device that keeps the limits."""
        message = decode(frame)
        if isinstance(message, Cancel):
            self._cancelled |= {request.seq for request, _ in self._waiting if request.seq >= message.seq}
            return
        assert isinstance(message, (Append, Encode))
        assert len(frame) <= self.opened.max_frame
        assert not self._waiting or message.seq > self._waiting[-1][0].seq
        self._in_flight += len(frame)
        assert self._in_flight <= self.opened.window
        if isinstance(message, Append):
            self.appends.append(message)
        else:
            self.stores.append(message)
        self._waiting.append((message, len(frame)))

    def forget(self, length: int) -> None:
        """Evicts all but the first `length` positions of the cache."""
        del self.cache[length:]
        self._changed_by = None

    def reply(self) -> Message:
        """Works on the oldest request and gives the answer to it."""
        request, size = self._waiting.popleft()
        self._in_flight -= size
        if request.seq in self._cancelled and self.failures[:1] != ["cancelled"]:
            return self._error("cancelled", request)
        if isinstance(request, Append) and self._misplaced(request):
            return self._error("out_of_step", request)
        if self.failures:
            code = self.failures.pop(0)
            if code in ENDED_HALFWAY and isinstance(request, Append):
                self.cache, self._changed_by = self.cache[: request.keep], None
            return self._error(code, request)
        self._changed_by = request.seq
        if isinstance(request, Encode):
            self.cache, self.source = [], source_of(request)
            return stored(request)
        self.cache = self.cache[: request.keep] + (ids_of(request) if request.kind == "text" else image_of(request))
        length = len(self.cache)
        sequences = [self.cache[: length - back] for back in reversed(range(request.rows))]
        if request.want == "hidden":
            return hidden(request, [plain_hidden(ids) for ids in sequences], length)
        return logits(request, [plain_logits(ids, self.source) for ids in sequences], length)

    def _misplaced(self, append: Append) -> bool:
        if append.after not in (None, self._changed_by) or append.keep > len(self.cache):
            return True
        assert not 0 < append.keep < len(self.cache) or not self._image_is_cut(append.keep), "keep is inside an image"
        reads = self.opened.encoder_size > 0 and not self.opened.image_tokens
        return reads and self.source is None

    def _image_is_cut(self, length: int) -> bool:
        before = self.cache[:length]
        run = len(before) - next((at for at in range(len(before), 0, -1) if before[at - 1] != before[-1]), 0)
        return before[-1] < 0 and run % IMAGE_TOKENS != 0

    def step(self, session: Session) -> None:
        """Answers one request, and takes what the session says to that."""
        session.receive(encode(self.reply()))
        self.take(session)

    def settle(self, session: Session) -> None:
        """Answers until the session has its rows."""
        self.take(session)
        while session.rows is None:
            assert self._waiting, "the session waits, but has asked for nothing"
            self.step(session)

    def _error(self, code: ErrorCode, request: Append | Encode) -> Error:
        return Error(code=code, message=code, seq=request.seq, kv_length=len(self.cache))


def ids_of(append: Append) -> list[int]:
    """The plain ids of an Append's embeddings."""
    plain = KEY.reveal_hidden(append.embeddings)
    ids: list[int] = plain[:, 0].astype(int).tolist()
    assert np.array_equal(plain, embed(ids)), "an embedding is not of any id"
    return ids


def image_of(append: Append) -> list[int]:
    """What the cache holds of an Append's image."""
    assert append.rows == 0 and append.embeddings.shape == (PATCHES, PATCH_SIZE), "an image is not whole"
    plain = np.empty_like(append.embeddings)
    plain[:, LOOKING.encoder] = append.embeddings
    number = int(plain[0, 0])
    assert np.array_equal(plain, image(number)), "it is not of any image"
    return [-1 - number] * IMAGE_TOKENS


def source_of(request: Encode) -> list[int]:
    """The plain ids of a source sequence."""
    assert request.want == "store" and len(request.lengths) == 1 and request.lengths[0] <= LONGEST_SOURCE
    plain = np.empty_like(request.embeddings)
    plain[:, READING.encoder] = request.embeddings
    ids: list[int] = plain[:, 0].astype(int).tolist()
    assert np.array_equal(plain, embed(ids)), "an embedding is not of any id"
    return ids


def stored(request: Encode) -> Encoded:
    """The answer to a source sequence."""
    return Encoded(seq=request.seq, kv_length=0, tensors=(np.empty((0, HIDDEN), np.float32),))


def hidden(append: Append, rows: Sequence[Array], kv_length: int) -> Hidden:
    """The answer to an Append that wants hidden states, of plain ones [HIDDEN]."""
    permuted = KEY.hide(np.array(rows, np.float32).reshape(len(rows), HIDDEN))
    return Hidden(seq=append.seq, kv_length=kv_length, tensors=(permuted,))


def logits(append: Append, rows: Sequence[Array], kv_length: int) -> Logits:
    """The answer to an Append, of plain rows [VOCAB]."""
    permuted = np.array([row[KEY.vocab] for row in rows], np.float32).reshape(len(rows), VOCAB)
    scaled = [permuted.astype(float), permuted.astype(float) / append.temperature]
    sums = np.stack([np.log(np.exp(one).sum(-1)) for one in scaled], -1).astype(np.float32)
    if append.top_k == 0 or not rows:
        values, ids = permuted, np.empty((len(rows), 0), np.uint32)
    else:
        order = np.argsort(-permuted, -1, kind="stable")[:, : append.top_k]
        values, ids = np.take_along_axis(permuted, order, -1), order.astype(np.uint32)
    return Logits(seq=append.seq, kv_length=kv_length, tensors=(values, ids, sums))
