"""The device's side of the protocol, without I/O: what it wants held in the cloud, and what it must send for that.

The one question is "give me the logits after these ids". The session knows which ids the cloud's KV cache holds, sends
what is missing, and says from where on to keep. Prefill, decoding, regenerating, editing an earlier turn, fetching a
full row and replaying after a lost connection are all this question.

    session.ask(ids, …)      sets the question
    session.outbox           frames to send, in order
    session.receive(frame)   takes a reply; sooner or later `session.rows` is the answer
    session.lost()           the connection is gone: after `connected()` the question is asked again
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from device_app.sampler import Row
from shared.errors import DishonestError, RefusedError, WireError
from shared.key import UserKey
from shared.wire import DTYPES, Append, Array, Cancel, Error, Hidden, Logits, Open, Opened, decode, encode

MOST_REPLANS = 5  # times in a row that the cloud may lose track of one question
OPEN_AGAIN = ("shutting_down", "idle", "too_many_sessions")  # the connection ends; a new one may help


@dataclass
class Counters:
    """What went over the wire and what the device did for it. Bytes are WebSocket payloads."""

    bytes_up: int = 0
    bytes_down: int = 0
    vectors_up: int = 0
    round_trips: int = 0
    full_rows: int = 0
    replays: int = 0
    queue_us: int = 0
    compute_us: int = 0
    work_ns: dict[str, int] = field(default_factory=dict)  # processor time by step: embed, hide, encode, …

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Adds the processor time spent inside to `step`: what else runs on the machine does not count."""
        started = time.thread_time_ns()
        try:
            yield
        finally:
            self.work_ns[step] = self.work_ns.get(step, 0) + time.thread_time_ns() - started


@dataclass(frozen=True)
class _Question:
    ids: list[int]
    rows: int
    top_k: int
    temperature: float


@dataclass(frozen=True)
class _Flight:
    """An Append that was sent and not yet answered."""

    seq: int
    size: int
    kv_length: int  # after it
    before: list[int]  # ids that the cloud holds before it
    question: _Question
    last: bool


class Session:
    """One KV sequence in the cloud, as the device sees it."""

    def __init__(
        self,
        key: UserKey,
        embed: Callable[[Sequence[int]], Array],
        classify: Callable[[Array], Array] | None = None,
        *,
        served_name: str,
        token: str | None = None,
        counters: Counters | None = None,
    ) -> None:
        """embed: ids → [n, hidden_size]. classify: plain hidden states → logits [rows, vocab_size], where the
        classifier is on the device; the cloud is then asked for hidden states, and every row is full."""
        self.counters = counters or Counters()
        self.outbox: deque[bytes] = deque()
        self.opened: Opened | None = None
        self.rows: list[Row] | None = None  # the answer to the question, once it is there
        self.farewell: str | None = None  # why the cloud is about to close the connection
        self._key = key
        self._embed = embed
        self._classify = classify
        self._served_name = served_name
        self._token = token
        self._question: _Question | None = None
        self._unsent: deque[tuple[int, int]] = deque()  # ranges of the question's ids still to append
        self._flights: deque[_Flight] = deque()
        self._held: list[int] = []  # ids that the cloud holds once every flight has landed well
        self._planned = False  # whether the question's pieces were worked out
        self._forgotten = False  # the cloud held ids when the connection was lost
        self._broken = False  # a flight failed, and those behind it are still in the air
        self._seq = 0
        self._replans = 0

    @property
    def vocab_size(self) -> int:
        """Width of a full row from the cloud; 0 where the classifier is on the device."""
        return self._key.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state."""
        return self._key.hidden_size

    # --- the connection ---

    def connected(self) -> None:
        """A fresh connection is there: opens the session on it."""
        self.lost()
        self.farewell = None
        self.outbox.append(
            encode(Open(model=self._served_name, key_id=self._key.key_id, dtype="auto", token=self._token))
        )

    def lost(self) -> None:
        """The connection is gone, and with it all that the cloud held."""
        self._forgotten = self._forgotten or bool(self._held)
        self.opened = None
        self.outbox.clear()
        self._unsent.clear()
        self._flights.clear()
        self._held = []
        self._planned = self._broken = False
        self._seq = 0

    # --- the question ---

    def ask(self, ids: Sequence[int], *, rows: int = 1, top_k: int, temperature: float = 1.0) -> None:
        """Asks for the logits after each of the last `rows` of `ids`, top_k of them or (0) all.

        temperature: that of the rows' log-sum-exp.
        """
        self._question = _Question(list(ids), rows, top_k, temperature)
        self.rows = None
        self._replans = 0
        self._planned = False
        self._unsent.clear()
        self._plan()

    def cancel(self) -> None:
        """Gives the question up; what the cloud has not started of it is dropped."""
        self._question, self.rows = None, None
        self._unsent.clear()
        if self._flights:
            self.outbox.append(encode(Cancel(seq=self._flights[0].seq)))

    def _plan(self) -> None:
        """Works out which of the question's ids the cloud lacks, in pieces of a frame; waits until it is sure."""
        question, opened = self._question, self.opened
        if question is None or opened is None or self._planned or self._flights:
            return
        self._planned = True
        ids, held = question.ids, self._held
        common = len(held) if ids[: len(held)] == held else _common_prefix(ids, held)
        keep = min(common, len(ids) - question.rows)  # the last rows are appended again even if they are held
        if len(ids) > opened.context:
            raise RefusedError("context_full", f"positions: seen {len(ids)}, wanted at most {opened.context}")
        width = opened.hidden_size * DTYPES[opened.dtype].itemsize
        piece = max(1, (opened.max_frame - 1024) // width)
        self._unsent = deque((start, min(start + piece, len(ids))) for start in range(keep, len(ids), piece))
        if len(self._unsent) > 1 and self._unsent[-1][1] - self._unsent[-1][0] < question.rows:
            self._unsent.pop()  # rows come from one Append: the last piece must hold them all
            start, _ = self._unsent.pop()
            split = len(ids) - question.rows
            self._unsent += [(start, split), (split, len(ids))]
        self._pump()

    def _pump(self) -> None:
        """Sends as many pieces as the window of bytes in flight allows."""
        question, opened = self._question, self.opened
        if question is None or opened is None:
            return
        while self._unsent:
            start, end = self._unsent[0]
            estimate = (end - start) * opened.hidden_size * DTYPES[opened.dtype].itemsize + 1024
            if self._flights and sum(flight.size for flight in self._flights) + estimate > opened.window:
                return
            self._unsent.popleft()
            self._append(question, start, end)

    def _append(self, question: _Question, start: int, end: int) -> None:
        assert self.opened is not None
        timed, dtype = self.counters.timed, DTYPES[self.opened.dtype]
        with timed("embed"):
            embeddings = self._embed(question.ids[start:end])
        with timed("hide"):
            hidden = self._key.hide(embeddings).astype(dtype, copy=False)
        last = end == len(question.ids)
        with timed("encode"):
            frame = encode(
                Append(
                    seq=self._seq,
                    keep=start,
                    rows=question.rows if last else 0,
                    **self._wanted(question),
                    # Pipelined: if the piece before fails, this one must not succeed on what the cache held instead.
                    after=self._flights[-1].seq if self._flights else None,
                    tensors=(hidden,),
                )
            )
        self._flights.append(_Flight(self._seq, len(frame), end, self._held, question, last))
        self._held = question.ids[:end]
        self._seq += 1
        self.counters.vectors_up += end - start
        self.counters.round_trips += last
        self.outbox.append(frame)

    def _wanted(self, question: _Question) -> dict[str, Any]:
        """What an Append says of the results. How tokens are chosen concerns the device alone where it classifies."""
        if self._classify is not None:
            return {"want": "hidden"}
        return {"want": "logits", "top_k": question.top_k, "temperature": question.temperature}

    # --- replies ---

    def receive(self, frame: bytes) -> None:
        """Takes one frame of the cloud's. Raises DishonestError for what cannot be true, RefusedError for a refusal."""
        try:
            with self.counters.timed("decode"):
                message = decode(frame)
        except WireError as error:
            raise DishonestError(f"reply: {error}") from None
        if isinstance(message, Opened):
            self._open(message)
        elif isinstance(message, Error):
            self._error(message)
        elif isinstance(message, Logits if self._classify is None else Hidden):
            self._answer(message)
        else:
            wanted = "Logits" if self._classify is None else "Hidden"
            raise DishonestError(f"reply: seen {type(message).__name__}, wanted {wanted}")

    def _open(self, message: Opened) -> None:
        seen = (message.hidden_size, message.vocab_size)
        wanted = (self._key.hidden_size, self._key.vocab_size)
        if self.opened is not None or seen != wanted or message.kv_length != 0:
            raise DishonestError(f"Opened: seen widths {seen} and KV length {message.kv_length}, wanted {wanted} and 0")
        if message.max_frame < 1024 + 4 * message.hidden_size:
            raise DishonestError(f"Opened: a frame of {message.max_frame} bytes holds no embedding")
        self.opened = message
        self.counters.replays += self._forgotten
        self._forgotten = False
        if self.rows is None:
            self._plan()

    def _land(self, seq: int | None) -> _Flight:
        if not self._flights or self._flights[0].seq != seq:
            wanted = f"seq {self._flights[0].seq}" if self._flights else "none, as nothing was asked"
            raise DishonestError(f"reply: seen seq {seq}, wanted {wanted}")
        return self._flights.popleft()

    def _error(self, message: Error) -> None:
        if message.seq is None:
            if message.code in OPEN_AGAIN:
                self.farewell = _quoted(message)  # the connection closes; whoever runs it opens another
                return
            raise RefusedError(message.code, f"the cloud refused the session: {_quoted(message)}", hint=_hint(message))
        flight = self._land(message.seq)
        # It changed nothing, nor will those behind it; only an engine's failure leaves less than there was before.
        self._held = (self._held if self._broken else flight.before)[: message.kv_length]
        self._broken = bool(self._flights)
        if flight.question is self._question and self.rows is None:
            self._unsent.clear()
            if message.code not in ("out_of_step", "window_exceeded", "cancelled"):
                self._question = None
                raise RefusedError(
                    message.code, f"the cloud refused a request: {_quoted(message)}", hint=_hint(message)
                )
            if self._planned:
                self._planned = False
                self._replans += 1
            if self._replans > MOST_REPLANS:
                raise DishonestError(f"the cloud lost its place {self._replans} times: {_quoted(message)}")
        self._plan()

    def _answer(self, message: Logits | Hidden) -> None:
        flight = self._land(message.seq)
        self.counters.queue_us += message.queue_us
        self.counters.compute_us += message.compute_us
        if self._broken:
            raise DishonestError(f"reply: seen {type(message).__name__} behind an Error, wanted out_of_step")
        if message.kv_length != flight.kv_length:
            raise DishonestError(f"KV length: seen {message.kv_length}, wanted {flight.kv_length}")
        if flight.last and flight.question is self._question:
            if isinstance(message, Hidden):
                self.rows = self._classified(message, flight.question)
            else:
                with self.counters.timed("reveal"):
                    self.rows = self._revealed(message, flight.question)
        elif not flight.last and (rows := message.tensors[0].shape[0]):
            raise DishonestError(f"rows: seen {rows}, wanted 0")
        self._pump()
        self._plan()

    def _revealed(self, message: Logits, question: _Question) -> list[Row]:
        vocab_size = self._key.vocab_size
        full = question.top_k == 0
        wanted = (question.rows, vocab_size if full else min(question.top_k, vocab_size))
        values, ids = message.values.astype(np.float32), message.ids
        assert self.opened is not None
        if message.values.dtype != DTYPES[self.opened.dtype]:
            raise DishonestError(f"logits: seen {message.values.dtype.name}, wanted {self.opened.dtype}")
        if values.shape != wanted or ids.shape != (wanted[0], 0 if full else wanted[1]):
            raise DishonestError(f"logits: seen shapes {values.shape} and {ids.shape}, wanted {wanted}")
        both = message.log_sum_exp.tolist()
        if not all(math.isfinite(at_one) and math.isfinite(at_temperature) for at_one, at_temperature in both):
            raise DishonestError("log-sum-exp: seen NaN or infinity, wanted finite values")
        masses = [pair[question.temperature != 1] for pair in both]
        if full:
            ends = [(float(row.max()), float(row.min())) for row in values]
        else:
            # Comparisons with NaN are false, so what passes is sorted, and finite if its ends are.
            if not (values[:, 1:] <= values[:, :-1]).all():
                raise DishonestError("logits: seen rows that are not sorted")
            if any(len(set(row)) < len(row) for row in ids.tolist()):
                raise DishonestError("ids: seen one twice in a row")
            ends = [(float(row[0]), float(row[-1])) for row in values]
        for row, (top, least), mass in zip(values, ends, masses, strict=True):
            _check_row(row, top, least, question.temperature, mass, vocab_size)
        try:
            plain = np.arange(vocab_size)[None].repeat(len(ids), 0) if full else self._key.reveal_ids(ids)
        except IndexError:
            raise DishonestError(f"ids: seen one that is not less than {vocab_size}") from None
        if full:
            values = self._key.reveal_rows(values)
        return [Row(values[row], plain[row], masses[row], full) for row in range(question.rows)]

    def _classified(self, message: Hidden, question: _Question) -> list[Row]:
        """Full rows, which the device computes from the hidden states."""
        assert self._classify is not None and self.opened is not None
        with self.counters.timed("reveal"):
            wanted = (question.rows, self._key.hidden_size)
            if message.hidden.dtype != DTYPES[self.opened.dtype]:
                raise DishonestError(f"hidden: seen {message.hidden.dtype.name}, wanted {self.opened.dtype}")
            if message.hidden.shape != wanted:
                raise DishonestError(f"hidden: seen shape {message.hidden.shape}, wanted {wanted}")
            hidden = message.hidden.astype(np.float32)
            if not np.isfinite(hidden).all():
                raise DishonestError("hidden: seen NaN or infinity, wanted finite values")
            plain = self._key.reveal_hidden(hidden)
        with self.counters.timed("classify"):
            return [_full_row(values, question.temperature) for values in self._classify(plain)]


def _full_row(values: Array, temperature: float) -> Row:
    """A row of all logits [vocab_size] with their log-sum-exp at `temperature`."""
    top, least = float(values.max()), float(values.min())
    if not (math.isfinite(top) and math.isfinite(least)):  # either is NaN if any value is
        raise DishonestError("hidden: seen values that no logits can be computed of, wanted a model's")
    with np.errstate(over="ignore"):  # so far below the top that it weighs nothing
        below = (values - np.float32(top)) / np.float32(temperature)
    mass = top / temperature + math.log(np.exp(below).sum(dtype=np.float64))
    return Row(values, np.arange(len(values)), mass, full=True)


def _check_row(values: Array, top: float, least: float, temperature: float, mass: float, vocab_size: int) -> None:
    """A log-sum-exp (`mass`) below that of the values [k] beside it, or above what the unseen could add, is a lie."""
    if not (math.isfinite(top) and math.isfinite(least)):
        raise DishonestError("logits: seen NaN or infinity, wanted finite values")
    seen = float(np.exp((values - np.float32(top)) / np.float32(temperature)).sum())
    unseen = (vocab_size - len(values)) * math.exp((least - top) / temperature)
    over = mass - top / temperature
    slack = 1e-3 + 1e-6 * abs(top) / temperature
    if not math.log(seen) - slack <= over <= math.log(seen + unseen) + slack:
        raise DishonestError("log-sum-exp: it does not fit the values beside it")


def _common_prefix(one: list[int], other: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _quoted(message: Error) -> str:
    # The text is the cloud's: printable characters only.
    return f"{message.code}: " + "".join(character for character in message.message[:300] if character.isprintable())


def _hint(message: Error) -> str | None:
    return {
        "unauthorized": "give the token with --token-file or STIP_TOKEN",
        "unknown_model": "is this bundle's cloud folder the one that is served? see served_name in both manifests",
        "wrong_key": "the cloud serves another export of this model; use the two halves of one export",
        "context_full": "shorten the prompt",
    }.get(message.code)
