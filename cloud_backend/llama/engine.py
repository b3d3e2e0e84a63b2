"""The engine of decoders on llama.cpp: the same sessions, on any processor or graphics card that it runs on.

llama.cpp keeps the keys and values, each position in a cell of its own, and knows sequences by small numbers. Pages
are counted as elsewhere, so whoever has room in them has room there: a session gets a number with its first page and
gives it back with its last, and before each step llama.cpp forgets what was cut or cleared since the step before.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from cloud_backend import host_rows
from cloud_backend.engine import (
    AppendKind,
    AppendWork,
    EncodeWant,
    HiddenRows,
    LogitRows,
    Outcome,
    Work,
    failed,
    not_finite,
)
from cloud_backend.kv_cache import KVCache, Last, PagePool
from cloud_backend.llama.context import KVDtype, LlamaContext, LlamaModel, Piece, Want
from cloud_backend.llama.library import Floats
from shared.wire import DTYPES, Array, FloatName

log = logging.getLogger("stip.cloud")

MOST_SEQUENCES = 256  # llama.cpp's own limit
WANTS: tuple[Want, ...] = ("logits", "hidden")
# Of an embedding's values. Where their squares are not finite, a norm may make NaN of them. These would lie in cells
# beside other sessions', which llama.cpp masks by adding to scores; and NaN plus anything is NaN.
LARGEST = 1e15


class Sequences:
    """llama.cpp's numbers of sequences: those that no session has, and what is to be forgotten before the next step."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count - 1, -1, -1))
        self.forgotten: deque[tuple[int, int]] = deque()  # of each a number, and the positions that stay


class LlamaCache(KVCache):
    """The KV cache of one session. Everything here is counting, and may be done while a step of others runs."""

    def __init__(self, pool: PagePool, sequences: Sequences) -> None:
        super().__init__(pool)
        self._sequences = sequences
        self.sequence: int | None = None
        self.stored = 0  # positions that llama.cpp may hold, those of a step that failed too

    def reserve(self, positions: int) -> bool:
        numbered = self.sequence is not None
        if not (numbered or self._sequences.free) or not super().reserve(positions):
            return False
        if not numbered:
            self.sequence = self._sequences.free.pop()
        return True

    def cut(self, keep: int) -> None:
        super().cut(keep)
        if keep < self.stored:
            assert self.sequence is not None
            self._sequences.forgotten.append((self.sequence, keep))
            self.stored = keep

    def trim(self) -> None:
        super().trim()
        if not self.held and self.sequence is not None:
            self.cut(0)
            self._sequences.free.append(self.sequence)
            self.sequence = None


class LlamaEngine:
    """A decoder in a GGUF file."""

    appends: tuple[AppendKind, ...] = ("text",)
    encodes: tuple[EncodeWant, ...] = ()
    same_length = False
    encoder_size = encoder_context = image_tokens = 0
    dtype: FloatName = "float32"  # of results; weights and products are what the file has

    def __init__(
        self,
        model: LlamaModel,
        pool: PagePool,
        *,
        context: int,
        vocab_size: int,
        kv_dtype: KVDtype = "float16",
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        """pool: the memory that is allocated, at once. vocab_size: 0 where the classifier is on devices.

        It takes as many threads as torch has in the thread that makes it.
        """
        gpu = device == "cuda"
        count = min(MOST_SEQUENCES, pool.pages)  # a session has a page at least
        threads = torch.get_num_threads()
        self._context = LlamaContext(model, pool.positions, count, kv_dtype=kv_dtype, threads=threads, gpu=gpu)
        self._sequences = Sequences(count)
        self.pool = pool
        self.hidden_size = model.width
        self.vocab_size = vocab_size
        self.context = min(context, pool.positions)
        self.device = device

    def new_cache(self) -> LlamaCache:
        return LlamaCache(self.pool, self._sequences)

    def run(self, batch: Sequence[Work]) -> list[Outcome]:
        try:
            return self._run([work for work in batch if isinstance(work, AppendWork)])
        except Exception as error:  # any failure of a model: the server and other sessions go on
            for work in batch:
                work.cache.cut(work.keep if isinstance(work, AppendWork) else work.cache.length)
            if len(batch) > 1:  # one of them may be the reason
                return [outcome for work in batch for outcome in self.run([work])]
            log.error("engine failed: %s", type(error).__name__)  # its text could quote tensors
            return [failed()]

    def _run(self, works: Sequence[AppendWork]) -> list[Outcome]:
        bounded = [bool(np.abs(work.embeddings).max() < LARGEST) for work in works]
        outcomes = iter(self._answers([work for work, fits in zip(works, bounded, strict=True) if fits]))
        return [next(outcomes) if fits else _refused(work) for work, fits in zip(works, bounded, strict=True)]

    def _answers(self, works: Sequence[AppendWork]) -> list[Outcome]:
        rows: list[Array | None] = [_known(work) for work in works]
        for want in WANTS:
            new = [at for at, found in enumerate(rows) if found is None and works[at].want == want]
            if new:
                for at, found in zip(new, self._append([works[at] for at in new], want), strict=True):
                    rows[at] = found
        outcomes = [_answer(work, found) for work, found in zip(works, rows, strict=True) if found is not None]
        for work, outcome in zip(works, outcomes, strict=True):
            if not isinstance(outcome, (LogitRows, HiddenRows)):
                work.cache.cut(work.keep)
        return outcomes

    def _append(self, works: Sequence[AppendWork], want: Want) -> list[Floats]:
        """The rows that each work asks for; its cache has grown by it."""
        caches = [_prepared(work) for work in works]
        while self._sequences.forgotten:
            self._context.remove(*self._sequences.forgotten.popleft())
        pieces = []
        for work, cache in zip(works, caches, strict=True):
            cache.stored = work.end
            assert cache.sequence is not None
            pieces.append(Piece(cache.sequence, work.keep, work.embeddings, work.rows))
        found = self._context.decode(pieces, want)
        rows: list[Floats] = []
        first = 0
        for work, cache in zip(works, caches, strict=True):
            own = found[first : first + work.rows]
            rows.append(own)
            first += work.rows
            cache.length = work.end
            cache.last = None
            if work.rows and want == "logits":
                # A copy, unless it is all there is: the others' rows are not kept for it.
                row = own if len(found) == 1 else own[-1:].copy()
                cache.last = Last(np.array(work.embeddings[-1:]), row)
        return rows


def _refused(work: AppendWork) -> Outcome:
    """What the model could not compute with."""
    work.cache.cut(work.keep)
    return not_finite()


def _prepared(work: AppendWork) -> LlamaCache:
    """The cache of a work, cut and with room for it."""
    cache = work.cache
    assert isinstance(cache, LlamaCache)
    cache.cut(work.keep)
    if not work.reserve():
        raise MemoryError("KV pool: nothing was reserved")
    return cache


def _known(work: AppendWork) -> Array | None:
    """The last position's logits where it alone is appended again."""
    return work.cache.last.state if work.want == "logits" and work.repeats_last and work.cache.last else None


def _answer(work: AppendWork, rows: Array) -> Outcome:
    """What is sent of rows of logits or hidden states."""
    sent = rows if work.dtype == "float32" else rows.astype(DTYPES[work.dtype])
    return host_rows.hidden_rows(sent) if work.want == "hidden" else host_rows.logit_rows(work, sent)
