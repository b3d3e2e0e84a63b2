"""The device's side of a decoder's session, without I/O: what it wants held in the cloud, and what it sends for that.

The one question is "give me the logits after these ids". The session knows which ids the cloud's KV cache holds, sends
what is missing, and says from where on to keep. Prefill, decoding, regenerating, editing an earlier turn, fetching a
full row and replaying after a lost connection are all this question.

    session.ask(ids, …)      sets the question
    session.outbox           frames to send, in order
    session.receive(frame)   takes a reply; sooner or later `session.rows` is the answer
    session.lost()           the connection is gone: after `connected()` the question is asked again, of which the
                             cloud may still hold what it held

An image that `add_image` has taken stands among the ids as a negative number, once for each position that it takes.
A decoder that reads an encoder is asked about `source` ids too, which the cloud holds beside its KV cache.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from device_app.counters import Counters
from device_app.held import Held, common_prefix, in_common
from device_app.opening import (
    HEADER,
    NO_ENCODER,
    REPLY_HEADER,
    TRY_AGAIN,
    Opening,
    Widths,
    oldest,
)
from device_app.replies import classified_rows, revealed_rows, states
from device_app.sampler import Row
from shared.errors import BundleError, DishonestError, RefusedError, UsageError
from shared.key import UserKey
from shared.wire import Append, Array, Cancel, Encode, Encoded, Error, Hidden, Logits, Message, Opened, encode

MOST_ROWS = 16  # that are asked for at once: so many hidden states, or tops of rows, a reply may hold
BYTES_A_VALUE = 8  # a logit and its id
MOST_IMAGE_BYTES = 16 * 2**20  # of embeddings that are kept beside the question's own: prompts bring theirs again


@dataclass(frozen=True)
class _Question:
    ids: list[int]
    source: list[int] | None
    rows: int
    top_k: int
    temperature: float


@dataclass(frozen=True)
class _Piece:
    """What one request sends: ids [start, end) of the question, all text or all one image; or the source."""

    start: int
    end: int
    image: int | None = None
    source: bool = False


@dataclass(frozen=True)
class _Flight:
    """A request that was sent and not yet answered."""

    seq: int
    size: int
    kv_length: int  # after it
    before: Held  # what the cloud holds before it
    question: _Question
    answer: type[Message]
    last: bool


class Session(Opening):
    """One KV sequence in the cloud, as the device sees it."""

    def __init__(
        self,
        key: UserKey,
        embed: Callable[[Sequence[int], int], Array],
        classify: Callable[[Array], Array] | None = None,
        *,
        served_name: str,
        context: int,
        widths: Widths = NO_ENCODER,
        token: str | None = None,
        counters: Counters | None = None,
    ) -> None:
        """embed: ids and the position of the first → [n, hidden_size]; of a source sequence [n, encoder_size].
        classify: plain hidden states → logits [rows, vocab_size], where the classifier is on the device; the cloud is
        then asked for hidden states, and every row is full. context: positions that the bundle is made for, at most.
        widths: of the encoder that the decoder reads."""
        super().__init__(key, widths, served_name=served_name, context=context, token=token, counters=counters)
        self.rows: list[Row] | None = None  # the answer to the question, once it is there
        self._embed = embed
        self._classify = classify
        self._images: dict[int, Array] = {}  # embeddings [patches, encoder_size], the last used at the end
        self._question: _Question | None = None
        self._unsent: deque[_Piece] = deque()
        self._flights: deque[_Flight] = deque()
        self._held = Held()  # once every flight has landed well; after a failure: now
        self._broken = False  # a flight failed, and those behind it, still in the air, will
        self._reached = -1  # KV length after the furthest request of the question that was answered

    @property
    def longest_reply(self) -> int:
        """One full row, or a few hidden states."""
        return REPLY_HEADER + 4 * max(self._key.vocab_size, MOST_ROWS * self._key.hidden_size)

    def most_rows(self, top_k: int) -> int:
        """How many rows may be asked for at once."""
        assert self.opened is not None
        most = min(MOST_ROWS, self._vectors_of_frame(self._key.hidden_size))  # rows come from one Append
        if self._classify is not None:
            return most
        if not top_k:
            return 1
        return max(1, min(most, self.opened.max_rows, self.longest_reply // (BYTES_A_VALUE * top_k)))

    def lost(self) -> None:
        # Nobody knows how many of the flights the cloud has answered. Those behind a failure change nothing.
        befores = [] if self._broken else [flight.before for flight in self._flights]
        self._held = in_common([*befores, self._held])
        super().lost()
        self._unsent.clear()
        self._flights.clear()
        self._broken = False

    def end(self) -> None:
        super().end()
        self._held = Held()

    @property
    def _longest_held(self) -> int:
        return self._held.length

    def _take_over(self, message: Opened) -> None:
        before, there = self._held, self._held.left(message.kv_length)
        self._resume, self._held = message.resume, there
        self._count_replay(before, there)
        self.counters.resumes += before.known == there.known != Held().known

    def _count_replay(self, before: Held, there: Held) -> None:
        self.counters.replays += before.known != there.known

    # --- the question ---

    def add_image(self, embeddings: Array) -> int:
        """Keeps an image's embeddings [patches, encoder_size] and gives the negative number that stands for it.

        The same image has the same number. Raises BundleError where it does not have the model's shape.
        """
        wanted = (self._widths.encoder_context, self._widths.encoder_size)
        if not self._widths.image_tokens or embeddings.shape != wanted:
            raise BundleError(f"image: seen embeddings of shape {embeddings.shape}, wanted {wanted} (0: no images)")
        content = np.ascontiguousarray(embeddings, np.float32)
        number = image_number(content)
        self._images.pop(number, None)
        self._images[number] = content
        return number

    def shared_prefix(self, ids: Sequence[int]) -> int:
        """How many of `ids`, from the first on, the cloud holds."""
        return common_prefix(list(ids), self._held.ids)

    def ask(
        self,
        ids: Sequence[int],
        *,
        source: Sequence[int] | None = None,
        rows: int = 1,
        top_k: int,
        temperature: float = 1.0,
    ) -> None:
        """Asks for the logits after each of the last `rows` of `ids`, top_k of them or (0) all.

        temperature: that of the rows' log-sum-exp. Images that no longer fit the store are dropped, the oldest first,
        but none of this question's. Raises UsageError for an image that is not there or not whole, rows that end in
        one, and a source that the model does not read or lacks.
        """
        reads = self._widths.encoder_size > 0 and not self._widths.image_tokens
        if reads != (source is not None):
            seen, wanted = ("none", "one") if reads else ("one", "none, as this model reads none")
            raise UsageError(f"source sequence: seen {seen}, wanted {wanted}")
        question = _Question(list(ids), None if source is None else list(source), rows, top_k, temperature)
        self._check_images(question)
        self._question = question
        self.rows = None
        self._replans = 0
        self._reached = -1
        self._planned = False
        self._unsent.clear()
        self._plan()

    def cancel(self) -> None:
        self._question, self.rows = None, None
        self._unsent.clear()
        if self._flights:
            self.outbox.append(encode(Cancel(seq=self._flights[0].seq)))

    def _check_images(self, question: _Question) -> None:
        tokens = self._widths.image_tokens
        if min(question.ids, default=0) >= 0:
            return
        if not tokens:
            raise UsageError("image: seen one among the ids, wanted none, as this model takes none")
        used = {}
        for start, end, image in _runs(question.ids, 0, tokens):
            if image is None:
                continue
            if image not in self._images or question.ids[start:end] != [image] * tokens:
                raise UsageError(f"image at position {start}: not added, dropped since, or not of {tokens} positions")
            used[image] = self._images[image]
        if min(question.ids[-question.rows :]) < 0:
            raise UsageError(f"rows: wanted text at the last {question.rows} positions, seen an image")
        self._images = {number: kept for number, kept in self._images.items() if number not in used} | used
        size = sum(kept.nbytes for kept in self._images.values())
        for number in list(self._images)[: len(self._images) - len(used)]:
            if size > MOST_IMAGE_BYTES:
                size -= self._images.pop(number).nbytes

    def _plan(self) -> None:
        """Works out what the cloud lacks of the question, in pieces of a frame; waits until it is sure."""
        question, opened = self._question, self.opened
        if question is None or opened is None or self._planned or self._flights or self.rows is not None:
            return
        self._planned = True
        ids, source = question.ids, question.source
        if len(ids) > opened.context:
            raise RefusedError("context_full", f"positions: seen {len(ids)}, wanted at most {opened.context}")
        if source is not None and len(source) > opened.encoder_context:
            seen, most = len(source), opened.encoder_context
            raise RefusedError("context_full", f"source: it takes {seen} tokens, wanted at most {most}")
        self._unsent.clear()
        keep = self._keep(question)
        if source != self._held.source:
            self._fits("source", len(source or ()), opened.encoder_size)
            self._unsent.append(_Piece(0, 0, source=True))
            keep = 0
        piece = self._vectors_of_frame(opened.hidden_size)
        for start, end, image in _runs(ids, keep, opened.image_tokens):
            if image is not None:
                self._fits("image", opened.encoder_context, opened.encoder_size)
                self._unsent.append(_Piece(start, end, image))
            else:
                self._unsent += [_Piece(at, min(at + piece, end)) for at in range(start, end, piece)]
        if len(self._unsent) > 1 and self._unsent[-1].end - self._unsent[-1].start < question.rows:
            self._unsent.pop()  # rows come from one Append: the last piece must hold them all
            start, split = self._unsent.pop().start, len(ids) - question.rows
            self._unsent += [_Piece(start, split), _Piece(split, len(ids))]
        self._pump()

    def _keep(self, question: _Question) -> int:
        """How much of what is held is the question's; the last rows are appended again even if they are held."""
        ids = question.ids
        keep = min(common_prefix(ids, self._held.ids), len(ids) - question.rows)
        if ids[keep] < 0:  # perhaps inside an image, which is never cut
            start = keep
            while start and ids[start - 1] == ids[keep]:
                start -= 1
            keep -= (keep - start) % self._widths.image_tokens
        return keep

    def _pump(self) -> None:
        """Sends as many pieces as the window of bytes in flight allows."""
        question, opened = self._question, self.opened
        if question is None or opened is None:
            return
        while self._unsent:
            vectors, width = self._extent(question, self._unsent[0])
            estimate = vectors * width * self._dtype().itemsize + HEADER
            if self._flights and sum(flight.size for flight in self._flights) + estimate > opened.window:
                return
            self._send(question, self._unsent.popleft())

    def _extent(self, question: _Question, piece: _Piece) -> tuple[int, int]:
        """How many vectors a piece sends, and how wide they are."""
        if piece.source:
            return len(question.source or ()), self._widths.encoder_size
        if piece.image is not None:
            return self._widths.encoder_context, self._widths.encoder_size
        return piece.end - piece.start, self._key.hidden_size

    def _send(self, question: _Question, piece: _Piece) -> None:
        last = piece.end == len(question.ids)
        vectors = self._hidden(question, piece)
        answer: type[Message] = Logits if self._classify is None else Hidden
        # Pipelined: if the request before fails, this one must not succeed on what the cache held instead.
        after = self._flights[-1].seq if self._flights else None
        message: Message
        if piece.source:
            answer = Encoded
            message = Encode(seq=self._seq, lengths=(len(vectors),), want="store", tensors=(vectors,))
        else:
            message = Append(
                seq=self._seq,
                keep=piece.start,
                rows=question.rows if last else 0,
                **self._wanted(question),
                kind="text" if piece.image is None else "image",
                after=after,
                tensors=(vectors,),
            )
        with self.counters.timed("encode"):
            frame = encode(message)
        # In an order that an interrupt may end anywhere: a flight is known before it can leave.
        self._flights.append(_Flight(self._seq, len(frame), piece.end, self._held, question, answer, last))
        self._held = Held(question.ids[: piece.end], question.source, piece.end)
        self._seq += 1
        self.counters.vectors_up += len(vectors)
        self.counters.round_trips += last
        self.outbox.append(frame)

    def _hidden(self, question: _Question, piece: _Piece) -> Array:
        """The vectors of a piece as they leave the device."""
        timed, hide = self.counters.timed, self._key.hide_encoder
        with timed("embed"):
            if piece.image is not None:
                plain = self._images[piece.image]
            elif piece.source:
                plain = self._embed(question.source or (), 0)
            else:
                plain, hide = self._embed(question.ids[piece.start : piece.end], piece.start), self._key.hide
        with timed("hide"):
            return hide(plain).astype(self._dtype(), copy=False)

    def _wanted(self, question: _Question) -> dict[str, Any]:
        """What an Append says of the results. How tokens are chosen concerns the device alone where it classifies."""
        if self._classify is not None:
            return {"want": "hidden"}
        return {"want": "logits", "top_k": question.top_k, "temperature": question.temperature}

    # --- replies ---

    def _failed(self, message: Error) -> None:
        flight = oldest(self._flights, message.seq)
        # It added nothing, nor will those behind it.
        before = self._held if self._broken else flight.before
        if message.code == "out_of_step":  # perhaps because what was there was evicted
            there = before.left(message.kv_length)
            if not self._broken:
                self._count_replay(before, there)
        else:  # cut to `keep`, where it had begun
            there = before.cut(message.kv_length)
        # In an order that an interrupt may end anywhere: what is there is among the states that `lost` looks at.
        self._held = there
        self._broken = True
        self._flights.popleft()
        self._broken = bool(self._flights)
        if flight.question is self._question and self.rows is None:
            self._unsent.clear()
            if message.code not in TRY_AGAIN:
                self._question = None
            self._plan_again(message)
        self._plan()

    def _reply(self, message: Message) -> None:
        kind = type(message).__name__
        if not isinstance(message, (Logits, Hidden, Encoded)):
            raise DishonestError(f"reply: seen {kind}, wanted an answer")
        flight = oldest(self._flights, message.seq)
        self.counters.queue_us += message.queue_us
        self.counters.compute_us += message.compute_us
        if not isinstance(message, flight.answer):
            raise DishonestError(f"reply: seen {kind}, wanted {flight.answer.__name__}")
        if self._broken:
            raise DishonestError(f"reply: seen {kind} behind an Error, wanted out_of_step")
        if message.kv_length != flight.kv_length:
            raise DishonestError(f"KV length: seen {message.kv_length}, wanted {flight.kv_length}")
        if isinstance(message, Encoded):
            states("stored source", message.result, (0, self._key.hidden_size), self._dtype())
        elif not flight.last and (rows := message.tensors[0].shape[0]):
            raise DishonestError(f"rows: seen {rows}, wanted 0")
        elif flight.last and flight.question is self._question:
            self.rows = self._revealed(message, flight.question)
        self._flights.popleft()
        if flight.question is self._question and flight.kv_length > self._reached:
            self._reached, self._replans = flight.kv_length, 0  # progress, of which a question has an end
        self._pump()
        self._plan()

    def _revealed(self, message: Logits | Hidden, question: _Question) -> list[Row]:
        timed, dtype, rows = self.counters.timed, self._dtype(), question.rows
        if isinstance(message, Logits):
            top_k, temperature = question.top_k, question.temperature
            with timed("reveal"):
                return revealed_rows(message, self._key, rows=rows, top_k=top_k, temperature=temperature, dtype=dtype)
        assert self._classify is not None
        with timed("reveal"):
            hidden = states("hidden", message.hidden, (rows, self._key.hidden_size), dtype)
            plain = self._key.reveal_hidden(hidden)
        with timed("classify"):
            return classified_rows(plain, self._classify, question.temperature)


def image_number(embeddings: Array) -> int:
    """The number below 0 that stands for an image of these embeddings, float32, among ids."""
    return -1 - int.from_bytes(hashlib.blake2b(embeddings.tobytes(), digest_size=16).digest(), "big")


def _runs(ids: list[int], start: int, image_tokens: int) -> Iterator[tuple[int, int, int | None]]:
    """Start and end of each text and of each image (with its number) in `ids` from `start` on."""
    while start < len(ids):
        if ids[start] < 0:
            end, image = start + image_tokens, ids[start]
        elif image_tokens:
            end, image = next((at for at in range(start, len(ids)) if ids[at] < 0), len(ids)), None
        else:
            end, image = len(ids), None
        yield start, end, image
        start = end
