"""A step: what one forward appends to which sequences, and how attention reads them.

Sequences of few new tokens are read side by side, padded to the longest; prompts are read alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cloud_backend.grouping import groups
from cloud_backend.kv_cache import PagePool, Pages, Rows

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
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to scores [count, tokens, longest], or None where everything is seen."""
        if window is not None and window >= self.longest:
            window = None
        if window not in self._masks:
            self._masks[window] = self._mask(window, dtype)
        return self._masks[window]

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        at = torch.arange(self.longest, device=self.lengths.device)
        seen = at < self.lengths[:, None, None]  # [count, 1, longest]
        if self.causal:
            last = self.lengths[:, None] - self.tokens + torch.arange(self.tokens, device=self.lengths.device)
            seen = at <= last[:, :, None]  # [count, tokens, longest]
            if window is not None:
                seen = seen & (at > last[:, :, None] - window)
        if bool(seen.all()):
            return None
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

    def read(self, memory: torch.Tensor) -> torch.Tensor:
        """Keys or values [heads, count, longest, size] out of [heads, rows, size]."""
        if isinstance(self.rows, slice):
            return memory[:, None, self.rows]
        heads, _, size = memory.shape
        return memory.index_select(1, self.rows).view(heads, self.count, self.longest, size)


class Step:
    """What one forward appends to which sequences, and where each reads."""

    def __init__(self, pool: PagePool, spans: Sequence[Span]) -> None:
        """spans: in the order of their tokens; see `order`."""
        self.pool = pool
        device = pool.keys[0].device
        written = [span.pages.rows[span.start : span.end] for span in spans]
        positions = [np.arange(span.start, span.end) for span in spans]
        self.written = torch.from_numpy(np.concatenate(written)).to(device)  # [tokens], rows of the pool
        self.positions = torch.from_numpy(np.concatenate(positions)).to(device)[None]  # [1, tokens]
        self.groups: list[Group] = []
        self.sources: list[Group] = []
        first = 0
        for together in _together(spans):
            self.groups.append(_group(first, [span.pages for span in together], [span.end for span in together],
                                      together[0].tokens, device, causal=True))  # fmt: skip
            if together[0].source is not None:
                sources = [span.source for span in together if span.source is not None]
                lengths = [span.source_length for span in together]
                self.sources.append(_group(first, sources, lengths, together[0].tokens, device, causal=False))
            first += len(together) * together[0].tokens

    @staticmethod
    def order(spans: Sequence[Span]) -> list[int]:
        """Indices of spans in the order that reads fewest of them apart."""
        return sorted(range(len(spans)), key=lambda at: (spans[at].tokens, spans[at].end))


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
        padded: Rows = np.zeros((len(pages), longest), np.int64)
        for at, (one, length) in enumerate(zip(pages, lengths, strict=True)):
            padded[at, :length] = one.rows[:length]
        rows = torch.from_numpy(padded.ravel()).to(device)
    return Group(first, len(pages), tokens, torch.tensor(lengths, device=device), longest, rows, causal)
