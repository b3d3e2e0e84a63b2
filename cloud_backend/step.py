"""A step: what one forward appends to which sequences, and how attention reads them.

Sequences of few new tokens are read side by side, padded to the longest; prompts are read alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cloud_backend.grouping import groups
from cloud_backend.kv_cache import Pages, Rows
from cloud_backend.tensor_pool import TensorPool
from cloud_backend.tensors import to_device

MOST_TOGETHER = 16  # tokens of a sequence that is read beside others


@dataclass(frozen=True)
class Span:
    """Tokens that a step appends to one sequence: `tokens` of them behind the first `start` positions."""

    pages: Pages
    start: int
    tokens: int
    source: Pages | None = None  # what cross-attention reads
    source_length: int = 0

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass
class Group:
    """Sequences that are read in one call: rows [first, first + count × tokens) of the packed tokens."""

    first: int
    count: int
    tokens: int  # of each sequence
    lengths: torch.Tensor  # [count], of what each reads, new tokens included
    longest: int
    rows: slice | torch.Tensor  # of the pool, [count × longest]
    causal: bool  # False: every token sees all
    padded: bool  # whether one of them is shorter than the longest
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to scores [count, tokens, longest], or None where everything is seen."""
        if window is not None and window >= self.longest:
            window = None
        if window not in self._masks:
            all_seen = not self.padded and (not self.causal or (self.tokens == 1 and window is None))
            self._masks[window] = None if all_seen else self._mask(window, dtype)
        return self._masks[window]

    def forget_masks(self) -> None:
        """Makes them anew: a captured step computes its own."""
        self._masks.clear()

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        device = self.lengths.device
        at = torch.arange(self.longest, device=device)
        if self.causal:
            last = self.lengths[:, None] - self.tokens + torch.arange(self.tokens, device=device)
            seen = at <= last[:, :, None]  # [count, tokens, longest]
            if window is not None:
                seen = seen & (at > last[:, :, None] - window)
        else:
            seen = (at < self.lengths[:, None, None]).expand(-1, self.tokens, -1)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)

    def read(self, memory: torch.Tensor) -> torch.Tensor:
        """Keys or values [heads, count, longest, size] out of [heads, rows, size]."""
        if isinstance(self.rows, slice):
            return memory[:, None, self.rows]
        heads, _, size = memory.shape
        return memory.index_select(1, self.rows).view(heads, self.count, self.longest, size)


@dataclass(frozen=True)
class Step:
    """What one forward appends to which sequences, and where each reads."""

    pool: TensorPool
    written: torch.Tensor  # [tokens], rows of the pool
    positions: torch.Tensor  # [1, tokens]
    groups: Sequence[Group]
    sources: Sequence[Group] = ()  # what cross-attention reads


def step_of(pool: TensorPool, spans: Sequence[Span]) -> Step:
    """The step that appends `spans`, in the order of their tokens; see `order`."""
    device = pool.device
    written = to_device(np.concatenate([span.pages.rows[span.start : span.end] for span in spans]), device)
    positions = to_device(np.concatenate([np.arange(span.start, span.end) for span in spans]), device)
    reads, sources, first = [], [], 0
    for together in _together(spans):
        tokens = together[0].tokens
        pages, ends = [span.pages for span in together], [span.end for span in together]
        reads.append(_group(first, pages, ends, tokens, device, causal=True))
        read = [span.source for span in together if span.source is not None]
        if read:
            lengths = [span.source_length for span in together]
            sources.append(_group(first, read, lengths, tokens, device, causal=False))
        first += len(together) * tokens
    return Step(pool, written, positions[None], reads, sources)


def order(spans: Sequence[Span]) -> list[int]:
    """Indices of spans in the order that reads fewest of them apart."""
    return sorted(range(len(spans)), key=lambda at: (spans[at].tokens, spans[at].end))


def padded_rows(pages: Sequence[Pages], lengths: Sequence[int], longest: int) -> Rows:
    """Rows [count, longest] of the first positions of each sequence; behind them row 0, which is zero."""
    rows: Rows = np.zeros((len(pages), longest), np.int64)
    for at, (one, length) in enumerate(zip(pages, lengths, strict=True)):
        rows[at, :length] = one.rows[:length]
    return rows


def _together(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Neighbours that are read in one call: few tokens, as many in each, and similar lengths."""
    start = 0
    while start < len(spans):
        tokens = spans[start].tokens
        end = start + 1
        while tokens <= MOST_TOGETHER and end < len(spans) and spans[end].tokens == tokens:
            end += 1
        # In ascending order of length already, so that groups are neighbours too.
        for group in groups([span.end for span in spans[start:end]]):
            yield [spans[start + at] for at in group]
        start = end


def _group(
    first: int, pages: Sequence[Pages], lengths: Sequence[int], tokens: int, device: torch.device, *, causal: bool
) -> Group:
    longest = max(lengths)
    rows: slice | torch.Tensor | None = pages[0].span(longest) if len(pages) == 1 else None
    if rows is None:
        rows = to_device(padded_rows(pages, lengths, longest).ravel(), device)
    padded = min(lengths) < longest
    return Group(first, len(pages), tokens, to_device(np.array(lengths), device), longest, rows, causal, padded)
