"""What the cloud saw: the frames of a session, read as the cloud reads them, without the key.

Two things are done with them. The cloud's best ids are read as if they were plain ones, which is what someone gets who
has the tokenizer and no key. And the vectors are looked up in the model's embedding table, which is what someone gets
who has that table: by their length, and by their sorted entries. SECURITY.md has the stronger attacks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from device_app.bundle import Bundle
from device_app.text import without_control
from shared.errors import WireError
from shared.wire import Append, Array, Hidden, Logits, decode

SHOWN_FEATURES = 48  # of each vector
SHOWN_GUESSES, SHOWN_TOKENS = 400, 1500  # the last ones: of what the cloud guesses, and of what attacks read
CHUNK = 1024  # rows of the embedding table that are worked on at once
# How far a vector's length may be from its token's, as a share of it: a sum in another order; a rotation, with every
# entry rounded to the dtype of so many bytes.
REORDERED = 1e-11
ROTATED = {4: 1e-7, 2: 2**-12}
MOST_ROUND_TRIPS = 64  # that are remembered as unanswered

Attack = Literal["sorted entries", "length"]
ATTACKS: tuple[Attack, ...] = ("sorted entries", "length")


class LookUp:
    """The embedding table as an attacker uses it: from a vector to the token it stands for.

    A reordering keeps a vector's length and its sorted entries, a rotation its length. Lengths alone are kept, eight
    bytes a token; entries are compared with those of the tokens of the same length.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._lengths: dict[str, tuple[Array, Array]] = {}  # by dtype: sorted lengths, and their tokens
        self._lock = threading.Lock()

    @cached_property
    def possible(self) -> bool:
        """Whether a token is the same vector at every place: where the device adds positions, it is not."""
        first, second = self._bundle.embed([0], 0), self._bundle.embed([0], 1)
        return bool(np.array_equal(first, second))

    def tokens(self, vector: Array, attack: Attack) -> list[int]:
        """Tokens that `vector`, as it was sent, may stand for. One is a find; none or several are not."""
        lengths, tokens = self._table(vector.dtype)
        length = _length(vector[None])[0]
        error = length * (REORDERED if attack == "sorted entries" else ROTATED[vector.dtype.itemsize])
        low, high = np.searchsorted(lengths, [length - error, length + error])
        near: list[int] = tokens[low:high].tolist()
        if attack == "length" or not near:
            return near
        rows = np.sort(self._bundle.embed(near).astype(vector.dtype).astype(np.float32), axis=1)
        same = (rows == np.sort(vector.astype(np.float32))).all(axis=1)
        return [token for token, is_same in zip(near, same.tolist(), strict=True) if is_same]

    def _table(self, dtype: Any) -> tuple[Array, Array]:
        with self._lock:
            if str(dtype) not in self._lengths:
                vocab = range(self._bundle.manifest.vocab_size)
                chunks = [vocab[start : start + CHUNK] for start in range(0, len(vocab), CHUNK)]
                lengths = np.concatenate([_length(self._bundle.embed(chunk).astype(dtype)) for chunk in chunks])
                order = np.argsort(lengths)
                self._lengths[str(dtype)] = lengths[order], order
            return self._lengths[str(dtype)]


def _length(rows: Array) -> Array:
    length: Array = np.sqrt(np.square(rows.astype(np.float64)).sum(axis=1))
    return length


@dataclass(frozen=True)
class RoundTrip:
    """One question to the cloud, in milliseconds: on the clock, and of those in the cloud."""

    total: float
    cloud: float


@dataclass(frozen=True)
class Sight:
    """What was seen since the last one, and what all of it amounts to.

    vectors: those that were sent, in their order, float32 [n, at most SHOWN_FEATURES].
    images: how many were sent.
    read: the cloud's best ids of this question, taken for plain ones.
    positions: of the KV cache that hold text which the witness saw.
    found: attack → how many of them it names; text: what the better of the attacks reads.
    """

    vectors: list[Array]
    images: int
    round_trips: list[RoundTrip]
    read: str
    positions: int
    found: dict[Attack, int]
    text: str


@dataclass
class _Travelled:
    """What frames brought since the last sight."""

    vectors: list[Array] = field(default_factory=list)
    images: int = 0
    round_trips: list[RoundTrip] = field(default_factory=list)


@dataclass(frozen=True)
class _Position:
    """One place of the KV cache: what attacks make of the vector there. `seen`: there was one, and it was text."""

    seen: bool = False
    tokens: tuple[int | None, ...] = (None, None)  # by attack


class Witness:
    """Sees every frame of one session. Threads may share it."""

    def __init__(self, bundle: Bundle, look_up: LookUp | None = None) -> None:
        """look_up: shared by the witnesses of a bundle, as it takes a while to make."""
        self._bundle = bundle
        self._look_up = look_up or LookUp(bundle)
        self._frames: deque[tuple[str, bytes, float] | None] = deque()  # None: a new question begins
        self._taking = threading.Lock()
        self._sent: dict[int, float] = {}  # seq to the time that it left
        self._positions: list[_Position] = []
        self._guesses: dict[int, int] = {}  # the cloud's best id behind a position
        self._since: int | None = 0  # the first position that this question changed

    def see(self, way: str, frame: bytes, at: float = 0.0) -> None:
        """Takes a frame as it travels; `at`: seconds on any clock."""
        self._frames.append((way, frame, at))

    def forget(self) -> None:
        """Starts a new question: what the cloud said before is not read again."""
        self._frames.append(None)

    def take(self) -> Sight:
        """Reads the frames that came since the last time, attacks included: some 50 µs a vector.

        The first vector waits for the table of their lengths: about a second for 50,000 tokens.
        """
        with self._taking:
            travelled = _Travelled()
            while self._frames:
                event = self._frames.popleft()
                if event is None:
                    self._since, travelled = None, _Travelled()
                else:
                    self._read_frame(*event, travelled)
            while len(self._sent) > MOST_ROUND_TRIPS:  # requests that were lost with a connection
                del self._sent[next(iter(self._sent))]
            return self._sight(travelled)

    def _read_frame(self, way: str, frame: bytes, at: float, travelled: _Travelled) -> None:
        try:
            message = decode(frame)
        except WireError:
            return  # the session refuses it, and says so
        if way == "up" and isinstance(message, Append):
            self._sent[message.seq] = at
            self._append(message)
            if message.kind == "text":
                travelled.vectors += list(message.embeddings[:, :SHOWN_FEATURES].astype(np.float32))
            else:
                travelled.images += 1
        elif way == "down" and isinstance(message, (Logits, Hidden)):
            left = self._sent.pop(message.seq, None)
            if left is not None:
                cloud = (message.queue_us + message.compute_us) / 1000
                travelled.round_trips.append(RoundTrip((at - left) * 1000, cloud))
            if isinstance(message, Logits):
                self._guess(message)

    def _sight(self, travelled: _Travelled) -> Sight:
        found: dict[Attack, int] = {
            attack: sum(position.tokens[index] is not None for position in self._positions)
            for index, attack in enumerate(ATTACKS)
        }
        better = max(range(len(ATTACKS)), key=lambda index: found[ATTACKS[index]])
        named = [token for position in self._positions if (token := position.tokens[better]) is not None]
        seen = sum(position.seen for position in self._positions)
        return Sight(
            travelled.vectors,
            travelled.images,
            travelled.round_trips,
            self._guessed(),
            seen,
            found,
            self._lines(named),
        )

    def _append(self, message: Append) -> None:
        """Keeps step with the KV cache, and attacks what is new in it."""
        if self._since is None:
            self._since = message.keep
        del self._positions[message.keep :]
        self._guesses = {at: token for at, token in self._guesses.items() if at < message.keep}
        self._positions += [_Position()] * (message.keep - len(self._positions))  # from before the witness came
        if message.kind == "image":
            image = self._bundle.manifest.image
            self._positions += [_Position()] * (image.tokens if image else 0)
        else:
            self._positions += [_Position(True, self._attacked(vector)) for vector in message.embeddings]

    def _attacked(self, vector: Array) -> tuple[int | None, ...]:
        if not self._look_up.possible:
            return (None,) * len(ATTACKS)
        candidates = [self._look_up.tokens(vector, attack) for attack in ATTACKS]
        return tuple(tokens[0] if len(tokens) == 1 else None for tokens in candidates)

    def _guess(self, message: Logits) -> None:
        best = message.ids[:, 0] if message.ids.shape[1] else message.values.argmax(axis=1)
        first = message.kv_length - len(best)
        self._guesses |= {first + row: int(token) for row, token in enumerate(best)}

    def _guessed(self) -> str:
        since = self._since or 0
        return self._text([token for at, token in sorted(self._guesses.items()) if at >= since][-SHOWN_GUESSES:])

    def _lines(self, tokens: Sequence[int]) -> str:
        """A line for each stretch between special tokens, which are not shown."""
        hidden = frozenset(self._bundle.manifest.hidden_ids)
        stretches: list[list[int]] = [[]]
        for token in tokens[-SHOWN_TOKENS:]:
            if token in hidden:
                stretches.append([])
            else:
                stretches[-1].append(token)
        return "\n".join(text for stretch in stretches if (text := self._text(stretch).strip()))

    def _text(self, ids: Sequence[int]) -> str:
        stream = self._bundle.tokenizer.detokenizer()
        known = [token for token in ids if token < self._bundle.manifest.vocab_size]
        return without_control("".join([stream.push(token) for token in known] + [stream.finish()]))
