"""KV memory as it is counted: a fixed budget in pages that sessions take and give back, and the cache of one session.

All sessions of a model share one pool. A position of a sequence is a row of it, the same row in every layer, so a
sequence is a list of rows wherever its pages lie, and what is cut, evicted or given back costs no copy. Where keys and
values are stored is each engine's own matter: `tensor_pool` has torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import UsageError
from shared.wire import Array

PAGE = 32  # positions

Rows = npt.NDArray[np.int64]


class PagePool:
    """The pages of all sessions of a model: how many there are, and which are free."""

    def __init__(self, page_bytes: int, budget: int, *, first: int = 0) -> None:
        """page_bytes: the keys and values of a page's positions. budget: bytes. first: the number of the first page.

        Raises UsageError for a budget that holds no page.
        """
        if budget < page_bytes:
            raise UsageError(
                f"KV memory: seen {budget} bytes, wanted at least {page_bytes}, a page of {PAGE} positions",
                hint="give it more with --kv-bytes",
            )
        self.page_bytes = page_bytes
        self.pages = budget // page_bytes if page_bytes else 0
        self._given: list[int] = []  # back: the last is taken first
        self._new = range(first, first + self.pages)  # that nobody had yet: taken once there are no others

    @property
    def positions(self) -> int:
        """That the longest sequence can have, with nobody else there."""
        return self.pages * PAGE

    @property
    def budget(self) -> int:
        """Bytes of all pages."""
        return self.pages * self.page_bytes

    @property
    def used(self) -> int:
        """Bytes of the pages that sessions hold."""
        return (self.pages - self.free) * self.page_bytes

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._given) + len(self._new)

    def take(self, after: int | None = None) -> int:
        """A page; the one behind `after` if that is free, as neighbours are read without a copy."""
        given = self._given
        if after is not None:
            for at in range(-1, -min(8, len(given)) - 1, -1):  # to look through all would cost more than it brings
                if given[at] == after + 1:
                    return given.pop(at)
        if given and (after is None or after + 1 not in self._new[:1]):
            return given.pop()
        page, self._new = self._new[0], self._new[1:]
        return page

    def give(self, pages: Sequence[int]) -> None:
        """Takes pages back."""
        self._given.extend(reversed(pages))


def cannot_be_allocated(budget: int) -> UsageError:
    """For KV memory that the machine does not give."""
    return UsageError(
        f"KV memory: seen {budget} bytes, which cannot be allocated", hint="a smaller --kv-bytes or --context"
    )


class Pages:
    """The pages of one sequence."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._held: list[int] = []
        self.rows: Rows = np.empty(0, np.int64)  # of every position that fits

    def __len__(self) -> int:
        return len(self._held)

    @classmethod
    def of(cls, pool: PagePool, numbers: Sequence[int]) -> Pages:
        """Those of these numbers, in a pool of which another process keeps the accounts."""
        pages = cls(pool)
        pages._held = list(numbers)
        pages._number()
        return pages

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the pages, in the order of what they hold."""
        return tuple(self._held)

    def lacking(self, positions: int) -> int:
        """Pages to take before so many positions fit."""
        return max(0, -(-positions // PAGE) - len(self._held))

    def reserve(self, positions: int) -> bool:
        """Makes room for so many positions. False, and nothing changed, where too few pages are free."""
        lacking = self.lacking(positions)
        if lacking > self._pool.free:
            return False
        for _ in range(lacking):
            self._held.append(self._pool.take(self._held[-1] if self._held else None))
        if lacking:
            self._number()
        return True

    def trim(self, positions: int) -> None:
        """Gives back what lies behind so many positions."""
        kept = -(-positions // PAGE)
        if kept < len(self._held):
            self._pool.give(self._held[kept:])
            del self._held[kept:]
            self._number()

    def _number(self) -> None:
        self.rows = (np.array(self._held, np.int64)[:, None] * PAGE + np.arange(PAGE)).ravel()

    def span(self, positions: int) -> slice | None:
        """The rows of the first positions where they lie side by side."""
        if not positions or self.rows[positions - 1] - self.rows[0] != positions - 1:
            return None
        start = int(self.rows[0])
        # Pages are distinct, but may lie in any order between the first and the last.
        pages = self._held[: -(-positions // PAGE)]
        in_order = all(page == pages[0] + at for at, page in enumerate(pages))
        return slice(start, start + positions) if in_order else None


@dataclass(frozen=True)
class Last:
    """The last position of a sequence: what went in [1, width], as it came, and what came out: the last hidden state
    [1, hidden], or the row of logits [1, vocab] where that is what an engine has, as its own kind of array."""

    embedding: Array
    state: Any


class KVCache:
    """The KV cache of one session: one sequence, cut back and appended to. Without a pool it stays empty."""

    def __init__(self, pool: PagePool | None) -> None:
        self.length = 0  # positions held
        self.owner = ""  # whose session it is, in any words
        self.last: Last | None = None
        self.pages = Pages(pool) if pool is not None else None

    @property
    def ready(self) -> bool:
        """Whether a decoder can go on from here: one that reads a source sequence needs it first."""
        return True

    @property
    def held(self) -> int:
        """Pages that it holds."""
        return len(self.pages) if self.pages is not None else 0

    def reserve(self, positions: int) -> bool:
        """Makes room for so many positions. False, and nothing changed, where too little is free."""
        return self.pages is None or self.pages.reserve(positions)

    def repeats(self, keep: int, embeddings: Array) -> bool:
        """Whether these [n, width] behind `keep` positions are the last one again, as a device sends it to see its full
        row. What came out of it is known then."""
        return self.last is not None and keep == self.length - 1 and np.array_equal(self.last.embedding, embeddings)

    def reserve_source(self, length: int) -> bool:
        """Makes room for a source sequence, where the model reads one. False where too few pages are free."""
        return True

    def cut(self, keep: int) -> None:
        """Forgets every position from `keep` on."""
        if keep < self.length:
            self.last = None
            self.length = keep

    def trim(self) -> None:
        """Gives back the pages that hold nothing."""
        if self.pages is not None:
            self.pages.trim(self.length)

    def clear(self) -> None:
        """Forgets everything and gives every page back."""
        self.cut(0)
        self.trim()
