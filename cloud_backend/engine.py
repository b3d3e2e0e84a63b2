"""The seam between sessions and models: what is asked of an engine, and what it answers.

torch is the reference: `decoder`, `encoder`, `vision` and `translation` hold the engines of each kind of model.
`llama` runs decoders on llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cloud_backend.kv_cache import KVCache, PagePool
from shared.errors import RequestError
from shared.wire import Array, FloatName

AppendKind = Literal["text", "image"]
EncodeWant = Literal["hidden", "pooled", "logits", "store"]


@dataclass(frozen=True)
class AppendWork:
    """One Append: cut `cache` to `keep`, append `embeddings` [n, width], answer for the last `rows`."""

    cache: KVCache
    keep: int
    embeddings: Array
    rows: int
    want: Literal["logits", "hidden"]
    top_k: int  # 0: full rows
    temperature: float
    dtype: FloatName  # of the values that are sent
    kind: AppendKind = "text"  # image: the embeddings are the patches of one

    @property
    def end(self) -> int:
        """KV length after it, where it is text."""
        return self.keep + len(self.embeddings)

    @property
    def repeats_last(self) -> bool:
        """Whether its answer is known, as it appends the last position alone again."""
        return self.rows == 1 and self.cache.repeats(self.keep, self.embeddings)

    def reserve(self) -> bool:
        """Takes the KV memory that it needs. False where too little is free."""
        return self.kind == "image" or self.cache.reserve(self.end)


@dataclass(frozen=True)
class EncodeWork:
    """One Encode: sequences of these `lengths`, one behind the other in `embeddings` [sum of lengths, width]."""

    cache: KVCache  # that `store` empties, and leaves its sequence with
    embeddings: Array
    lengths: tuple[int, ...]
    want: EncodeWant
    dtype: FloatName  # of the values that are sent

    def reserve(self) -> bool:
        """Takes the KV memory that it needs. False where too little is free."""
        return self.want != "store" or self.cache.reserve_source(self.lengths[0])


Work = AppendWork | EncodeWork


@dataclass(frozen=True)
class LogitRows:
    """values [rows, k], ids [rows, k] uint32 (k = 0 where rows are full), log_sum_exp [rows, 2] float32"""

    values: Array
    ids: Array
    log_sum_exp: Array


@dataclass(frozen=True)
class HiddenRows:
    """hidden [rows, hidden_size]"""

    hidden: Array


@dataclass(frozen=True)
class EncodedRows:
    """result [rows, width], by what the Encode wanted"""

    result: Array


Result = LogitRows | HiddenRows | EncodedRows
# What comes of a Work. Of an image it is the Append of what the model made of it, which is to be run next.
Outcome = Result | RequestError | AppendWork


class Engine(Protocol):
    """Runs batches of work. Every Work of a batch belongs to another session."""

    appends: tuple[AppendKind, ...]  # the kinds of Append it takes
    encodes: tuple[EncodeWant, ...]  # what an Encode may want of it
    hidden_size: int
    vocab_size: int  # 0 where the classifier is on devices, and no Work wants logits; of an encoder, its classes
    context: int  # most positions of a KV cache, or of a sequence to encode
    same_length: bool  # whether every sequence to encode has `context` positions, as images have
    encoder_size: int  # width of an image or a source sequence, 0 where it takes neither
    encoder_context: int  # rows of every image, most rows of a source sequence
    image_tokens: int  # positions that an image takes in the KV cache
    dtype: FloatName  # what it computes in, and the dtype of results
    device: Literal["cpu", "cuda"]

    @property
    def pool(self) -> PagePool | None:
        """Its KV memory, where it has any."""

    def new_cache(self) -> KVCache:
        """The cache of a new session."""

    def run(self, batch: Sequence[Work]) -> list[Outcome]:
        """One outcome a Work, in order. Works fit what is said above, and have reserved what they need.

        A Work that failed leaves its cache cut to `keep`, or as it was where it is an Encode, and the others as if it
        had not been there.
        """


def failed() -> RequestError:
    """What a session is told of a failure that is the engine's."""
    return RequestError("internal", "the engine failed; see the cloud's log")


def not_finite() -> RequestError:
    """What a session is told whose embeddings the model could not compute with."""
    return RequestError("internal", "the model computed values that are not finite")
