"""A cloud without sockets or a model, for tests of the device's session. It keeps PROTOCOL.md to the letter.

Its embeddings say which id they are, so it knows what its KV cache holds, and its logits are a function of those ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from device_app.session import Session
from shared.key import UserKey
from shared.wire import Append, Array, Cancel, Error, ErrorCode, Hidden, Logits, Message, Open, Opened, decode, encode

HIDDEN, VOCAB = 8, 1000
EMBEDDING = 4 * HIDDEN  # bytes
_random = np.random.default_rng(20)
KEY = UserKey("0f" * 16, _random.permutation(HIDDEN), _random.permutation(VOCAB))

NO_VOCAB = UserKey(KEY.key_id, KEY.residual, None)  # of an export with the classifier on the device
TABLE = _random.normal(size=(VOCAB, HIDDEN)).astype(np.float32)  # that classifier


def embed(ids: Sequence[int]) -> Array:
    """[n, HIDDEN]: feature j of id i is i + j / 16, which float32 holds exactly."""
    return np.asarray(ids, np.float32)[:, None] + np.arange(HIDDEN, dtype=np.float32) / 16


def plain_logits(ids: Sequence[int]) -> Array:
    """[VOCAB] float32, of exactly these ids."""
    return np.random.default_rng(list(ids)).normal(0, 3, VOCAB).astype(np.float32)


def plain_hidden(ids: Sequence[int]) -> Array:
    """[HIDDEN] float32, of exactly these ids."""
    return np.random.default_rng(list(ids)).normal(0, 3, HIDDEN).astype(np.float32)


def classify(hidden: Array) -> Array:
    """[rows, HIDDEN] → [rows, VOCAB]"""
    return hidden @ TABLE.T


def new_session() -> Session:
    return Session(KEY, embed, served_name="tiny")


def classifying_session() -> Session:
    """A session with the classifier on the device."""
    return Session(NO_VOCAB, embed, classify, served_name="tiny")


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


class HonestCloud:
    """Takes what a session has to say, and answers one request a `step`."""

    def __init__(self, **fields: object) -> None:
        self.opened = opened(**fields)
        self.appends: list[Append] = []  # all that came
        self.cache: list[int] = []
        self.failures: list[ErrorCode] = []  # codes for the next requests, which it then does not carry out
        self._changed_by: int | None = None
        self._waiting: deque[tuple[Append, int]] = deque()
        self._cancelled: set[int] = set()
        self._in_flight = 0

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self._waiting)

    def connect(self, session: Session) -> None:
        """A fresh connection: what was held for the one before is gone."""
        session.connected()
        self.cache, self._changed_by, self._in_flight = [], None, 0
        self._waiting.clear()
        self._cancelled.clear()
        assert isinstance(decode(session.outbox.popleft()), Open)
        session.receive(encode(self.opened))
        self.take(session)

    def take(self, session: Session) -> None:
        """Takes all frames from the session's outbox."""
        while session.outbox:
            self.receive(session.outbox.popleft())

    def receive(self, frame: bytes) -> None:
        """Takes one frame of a device that keeps the limits."""
        message = decode(frame)
        if isinstance(message, Cancel):
            self._cancelled |= {append.seq for append, _ in self._waiting if append.seq >= message.seq}
            return
        assert isinstance(message, Append)
        assert len(frame) <= self.opened.max_frame
        assert not self._waiting or message.seq > self._waiting[-1][0].seq
        self._in_flight += len(frame)
        assert self._in_flight <= self.opened.window
        self.appends.append(message)
        self._waiting.append((message, len(frame)))

    def forget(self, length: int) -> None:
        """Evicts all but the first `length` positions of the cache."""
        del self.cache[length:]
        self._changed_by = None

    def reply(self) -> Message:
        """Works on the oldest request and gives the answer to it."""
        append, size = self._waiting.popleft()
        self._in_flight -= size
        if append.seq in self._cancelled:
            return self._error("cancelled", append)
        if append.after not in (None, self._changed_by) or append.keep > len(self.cache):
            return self._error("out_of_step", append)
        if self.failures:
            return self._error(self.failures.pop(0), append)
        self.cache, self._changed_by = self.cache[: append.keep] + ids_of(append), append.seq
        length = len(self.cache)
        sequences = [self.cache[: length - back] for back in reversed(range(append.rows))]
        if append.want == "hidden":
            return hidden(append, [plain_hidden(ids) for ids in sequences], length)
        return logits(append, [plain_logits(ids) for ids in sequences], length)

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

    def _error(self, code: ErrorCode, append: Append) -> Error:
        return Error(code=code, message=code, seq=append.seq, kv_length=len(self.cache))


def ids_of(append: Append) -> list[int]:
    """The plain ids of an Append's embeddings."""
    plain = KEY.reveal_hidden(append.embeddings)
    ids: list[int] = plain[:, 0].astype(int).tolist()
    assert np.array_equal(plain, embed(ids)), "an embedding is not of any id"
    return ids


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
