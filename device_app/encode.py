"""The device's side of an encoder's session, without I/O: sequences of embeddings up, one result for each down.

session.ask(sequences, want)   sets the question
session.outbox                 frames to send, in order
session.receive(frame)         takes a reply; sooner or later `session.results` is the answer
session.lost()                 the connection is gone: after `connected()` what is not answered is asked again
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from device_app.counters import Counters
from device_app.opening import (
    HEADER,
    NO_ENCODER,
    REPLY_HEADER,
    TRY_AGAIN,
    Opening,
    oldest,
)
from device_app.replies import states
from shared.errors import DishonestError, RefusedError
from shared.key import UserKey
from shared.wire import Array, Cancel, Encode, Encoded, Error, Message, Opened, encode

Want = Literal["hidden", "pooled", "logits"]

LENGTH = 5  # bytes of a length in the header, at most
MOST_VECTORS = 4096  # of a request with several sequences: bounds the reply, and what the cloud pads


@dataclass(frozen=True)
class _Question:
    sequences: list[Array]
    want: Want
    results: list[Array | None]  # as they come


@dataclass(frozen=True)
class _Flight:
    """An Encode that was sent and not yet answered."""

    seq: int
    size: int
    question: _Question
    start: int  # sequences [start, end)
    end: int


class EncoderSession(Opening):
    """Encodes sequences, several in a request. The cloud holds nothing between requests."""

    def __init__(
        self,
        key: UserKey,
        *,
        served_name: str,
        context: int,
        token: str | None = None,
        counters: Counters | None = None,
    ) -> None:
        """context: embeddings of the longest sequence that the bundle is made for."""
        super().__init__(key, NO_ENCODER, served_name=served_name, context=context, token=token, counters=counters)
        self._most_values = max(MOST_VECTORS, context) * key.hidden_size  # of a reply
        self._question: _Question | None = None
        self._unsent: deque[tuple[int, int]] = deque()  # ranges of sequences
        self._flights: deque[_Flight] = deque()
        self._forgotten = False  # requests were in the air when the connection was lost

    @property
    def results(self) -> list[Array] | None:
        """The answer to the question, once all of it is there: for each sequence its hidden states [n, hidden_size],
        its pooled vector [hidden_size] or its class logits [classes], plain and in float32."""
        if self._question is None:
            return None
        there = [result for result in self._question.results if result is not None]
        return there if len(there) == len(self._question.results) else None

    @property
    def longest_reply(self) -> int:
        """The hidden states of the largest request, or the logits of one sequence."""
        return REPLY_HEADER + 4 * max(self._most_values, self._key.vocab_size)

    @property
    def longest_sequence(self) -> int:
        """Embeddings of the longest sequence that the cloud takes: its frames may be shorter than its context."""
        assert self.opened is not None
        return min(self.opened.context, self._vectors_of_frame(self._key.hidden_size))

    def lost(self) -> None:
        self._forgotten = self._forgotten or bool(self._flights)
        super().lost()
        self._unsent.clear()
        self._flights.clear()

    def _take_over(self, message: Opened) -> None:
        # Nothing is: an encoder's session holds nothing, so there is none to resume.
        self.counters.replays += self._forgotten
        self._forgotten = False

    # --- the question ---

    def ask(self, sequences: Sequence[Array], want: Want) -> None:
        """Asks for one result for each of `sequences`, plain embeddings [n, hidden_size]."""
        self._question = _Question(list(sequences), want, [None] * len(sequences))
        self._replans = 0
        self._planned = False
        self._unsent.clear()
        self._plan()

    def cancel(self) -> None:
        self._question = None
        self._unsent.clear()
        if self._flights:
            self.outbox.append(encode(Cancel(seq=self._flights[0].seq)))

    def _plan(self) -> None:
        """Puts what is neither answered nor in the air into requests that fit a frame; waits until that is sure."""
        question, opened = self._question, self.opened
        if question is None or opened is None or self._planned or self._flights:
            return
        self._planned = True
        room = opened.max_frame - HEADER
        most = self._most_sequences(question.want)
        size = vectors = 0  # of the request that is being filled
        for at, sequence in enumerate(question.sequences):
            if question.results[at] is not None:
                continue
            if len(sequence) > opened.context:
                raise RefusedError(
                    "context_full", f"sequence: it takes {len(sequence)} positions, wanted at most {opened.context}"
                )
            self._fits("sequence", len(sequence), self._key.hidden_size)
            size, vectors = size + self._size(sequence), vectors + len(sequence)
            start, end = self._unsent[-1] if self._unsent else (at, at)
            if end == at > start and size <= room and vectors <= MOST_VECTORS and end - start < most:
                self._unsent[-1] = (start, at + 1)
            else:
                self._unsent.append((at, at + 1))
                size, vectors = self._size(sequence), len(sequence)
        self._pump()

    def _most_sequences(self, want: Want) -> int:
        """How many a request may hold, for the reply's sake. Classes alone can take more than the embeddings did."""
        assert self.opened is not None
        if want != "logits":
            return MOST_VECTORS
        classes = max(1, self._key.vocab_size)
        return min(self._most_values // classes, self.opened.max_frame // (classes * self._dtype().itemsize))

    def _pump(self) -> None:
        """Sends as many requests as the window of bytes in flight allows."""
        question, opened = self._question, self.opened
        if question is None or opened is None:
            return
        while self._unsent:
            start, end = self._unsent[0]
            estimate = HEADER + sum(map(self._size, question.sequences[start:end]))
            if self._flights and sum(flight.size for flight in self._flights) + estimate > opened.window:
                return
            self._unsent.popleft()
            self._send(question, start, end)

    def _size(self, sequence: Array) -> int:
        """Bytes that a sequence takes of a frame: its embeddings, and its length in the header."""
        return len(sequence) * self._key.hidden_size * self._dtype().itemsize + LENGTH

    def _send(self, question: _Question, start: int, end: int) -> None:
        sequences = question.sequences[start:end]
        with self.counters.timed("hide"):
            # Each by itself: a sequence then has the same bits whatever is asked beside it.
            hidden = [self._key.hide(sequence).astype(self._dtype(), copy=False) for sequence in sequences]
        with self.counters.timed("encode"):
            embeddings = np.concatenate(hidden)
            lengths = tuple(map(len, sequences))
            frame = encode(Encode(seq=self._seq, lengths=lengths, want=question.want, tensors=(embeddings,)))
        self._flights.append(_Flight(self._seq, len(frame), question, start, end))
        self._seq += 1
        self.counters.vectors_up += len(embeddings)
        self.counters.round_trips += 1
        self.outbox.append(frame)

    # --- replies ---

    def _failed(self, message: Error) -> None:
        flight = oldest(self._flights, message.seq)
        self._flights.popleft()
        if flight.question is self._question:
            self._unsent.clear()
            if message.code not in TRY_AGAIN:
                self._question = None
            self._plan_again(message)
        self._plan()

    def _reply(self, message: Message) -> None:
        if not isinstance(message, Encoded):
            raise DishonestError(f"reply: seen {type(message).__name__}, wanted Encoded")
        flight = oldest(self._flights, message.seq)
        self._flights.popleft()
        self.counters.queue_us += message.queue_us
        self.counters.compute_us += message.compute_us
        if message.kv_length:
            raise DishonestError(f"KV length: seen {message.kv_length}, wanted 0, as an encoder has none")
        with self.counters.timed("reveal"):
            flight.question.results[flight.start : flight.end] = self._revealed(message.result, flight)
        if flight.question is self._question:
            self._replans = 0  # progress; as many times as there are sequences, at most
        self._pump()
        self._plan()

    def _revealed(self, result: Array, flight: _Flight) -> list[Array]:
        """One plain result for each sequence of a request."""
        want, sequences = flight.question.want, flight.question.sequences[flight.start : flight.end]
        lengths = [len(sequence) if want == "hidden" else 1 for sequence in sequences]
        width = self._key.vocab_size if want == "logits" else self._key.hidden_size
        values = states(want, result, (sum(lengths), width), self._dtype())
        plain = self._key.reveal_rows(values) if want == "logits" else self._key.reveal_hidden(values)
        if want != "hidden":
            return list(plain)
        return np.split(plain, np.cumsum(lengths)[:-1])
