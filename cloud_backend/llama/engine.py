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
    Outcome,
    Work,
    failed,
    not_finite,
)
from cloud_backend.kv_cache import KVCache, Last, PagePool
from cloud_backend.llama.context import DecodeError, KVDtype, LlamaContext, LlamaModel, Piece, Want
from shared.errors import RequestError
from shared.wire import DTYPES, Array, FloatName

log = logging.getLogger("stip.cloud")

MOST_SEQUENCES = 256  # llama.cpp's own limit
WANTS: tuple[Want, ...] = ("logits", "hidden")
LARGEST = 1e15  # of an embedding's values: where their squares are not finite, a norm may make NaN of them


class Sequences:
    """llama.cpp's numbers of sequences: those that no session has, and what is to be forgotten before the next step."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count - 1, -1, -1))
        self.forgotten: deque[tuple[int, int]] = deque()  # of each a number, and the positions that stay
        self.generation = 0  # how often everything was forgotten


class LlamaCache(KVCache):
    """The KV cache of one session. Everything here is counting, and may be done while a step of others runs."""

    def __init__(self, pool: PagePool, sequences: Sequences) -> None:
        super().__init__(pool)
        self._sequences = sequences
        self.sequence: int | None = None
        self.stored = 0  # positions that llama.cpp may hold, those of a step that failed too
        self.generation = sequences.generation  # when they were stored
        self.alone = False  # whether it takes no step with others: something of a step that it took was not finite

    def reserve(self, positions: int) -> bool:
        numbered = self.sequence is not None
        if not (numbered or self._sequences.free) or not super().reserve(positions):
            return False
        if not numbered:
            self.sequence = self._sequences.free.pop()
        return True

    def renew(self) -> None:
        """Forgets what is gone as everything was forgotten."""
        if self.generation != self._sequences.generation:
            self.cut(0)
            self.generation = self._sequences.generation

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
        self._poisoned = False  # whether cells may hold what is not finite
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
            # Another's text could quote tensors.
            log.error("engine failed: %s", error if isinstance(error, DecodeError) else type(error).__name__)
            return [failed()]

    def _run(self, works: Sequence[AppendWork]) -> list[Outcome]:
        outcomes = [_at_once(work) for work in works]
        for want, chosen in _together(works, [at for at, outcome in enumerate(outcomes) if outcome is None]):
            for at, outcome in zip(chosen, self._append([works[at] for at in chosen], want), strict=True):
                outcomes[at] = outcome
        done = [outcome for outcome in outcomes if outcome is not None]
        for work, outcome in zip(works, done, strict=True):
            if isinstance(outcome, RequestError):
                work.cache.cut(work.keep)
        return done

    def _append(self, works: Sequence[AppendWork], want: Want) -> list[Outcome]:
        """What comes of works that go through the model together. The caches of those that succeed have grown."""
        if self._poisoned:
            self._clear()
        caches = [_prepared(work) for work in works]
        while self._sequences.forgotten:
            self._context.remove(*self._sequences.forgotten.popleft())
        there = [at for at, work in enumerate(works) if work.keep == caches[at].length]
        outcomes: list[Outcome] = [_gone()] * len(works)
        if there:
            found = self._appended([works[at] for at in there], [caches[at] for at in there], want)
            for at, outcome in zip(there, found, strict=True):
                outcomes[at] = outcome
        return outcomes

    def _clear(self) -> None:
        """Forgets everything. llama.cpp hides a cell from other sequences by adding to scores, and NaN plus anything is
        NaN: in cells that nobody has any more it would still be in everyone's way."""
        self._context.clear()
        self._sequences.generation += 1
        self._poisoned = False

    def _appended(self, works: Sequence[AppendWork], caches: Sequence[LlamaCache], want: Want) -> list[Outcome]:
        pieces = []
        for work, cache in zip(works, caches, strict=True):
            cache.stored = work.end
            assert cache.sequence is not None
            # Of a work that asks for nothing a row is looked at, as what it stores others must be able to bear.
            pieces.append(Piece(cache.sequence, work.keep, work.embeddings, max(1, work.rows)))
        found = self._context.decode(pieces, want)
        outcomes: list[Outcome] = []
        first = 0
        for work, cache, piece in zip(works, caches, pieces, strict=True):
            own = found[first : first + piece.rows]
            first += piece.rows
            if not all(host_rows.finite(row) for row in own):
                self._poisoned = True
                outcomes.append(_spoilt(cache, alone=len(works) == 1))
                continue
            cache.length = work.end
            cache.last = None
            cache.alone = cache.alone and not work.rows  # until all of a request is through
            if work.rows and want == "logits":
                # A copy, unless it is all there is: the others' rows are not kept for it.
                row = own if len(found) == 1 else own[-1:].copy()
                cache.last = Last(np.array(work.embeddings[-1:]), row)
            width = self.hidden_size if work.want == "hidden" else own.shape[-1]
            outcomes.append(_answer(work, own if work.rows else np.empty((0, width), np.float32)))
        return outcomes


def _at_once(work: AppendWork) -> Outcome | None:
    """What comes of a work that the model cannot compute with, or that is known. None: it is to be computed."""
    if not np.abs(work.embeddings).max() < LARGEST:
        return not_finite()
    if work.want == "logits" and work.repeats_last and work.cache.last:
        return _answer(work, work.cache.last.state)
    return None


def _together(works: Sequence[AppendWork], new: Sequence[int]) -> list[tuple[Want, list[int]]]:
    """Which of the `new` works go through the model at the same time: those that want the same. What those may do that
    go alone harms none that went before."""
    wants: list[Want] = [work.want if work.rows else "logits" for work in works]  # of few tokens, unlike hidden states
    alone = [at for at in new if _cache(works[at]).alone]
    groups = [(want, [at for at in new if wants[at] == want and at not in alone]) for want in WANTS]
    return [(want, chosen) for want, chosen in groups if chosen] + [(wants[at], [at]) for at in alone]


def _cache(work: AppendWork) -> LlamaCache:
    assert isinstance(work.cache, LlamaCache)
    return work.cache


def _prepared(work: AppendWork) -> LlamaCache:
    """The cache of a work, cut and with room for it."""
    cache = _cache(work)
    cache.renew()
    cache.cut(work.keep)
    if not work.reserve():
        raise MemoryError("KV pool: nothing was reserved")
    return cache


def _spoilt(cache: LlamaCache, *, alone: bool) -> Outcome:
    """What a session is told whose rows are not finite. In company that may be another's doing, so each of them comes
    again, and goes alone."""
    if alone:
        return not_finite()
    cache.cut(0)
    cache.alone = True
    return _gone()


def _gone() -> RequestError:
    """What makes a device send everything again."""
    return RequestError("out_of_step", "the KV cache was cleared meanwhile")


def _answer(work: AppendWork, rows: Array) -> Outcome:
    """What is sent of rows of logits or hidden states."""
    sent = rows if work.dtype == "float32" else rows.astype(DTYPES[work.dtype])
    return host_rows.hidden_rows(sent) if work.want == "hidden" else host_rows.logit_rows(work, sent)
