"""What the model developer sees while an export runs: bars on stderr, and lists in sentences."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Sequence[T], what: str) -> Iterator[T]:
    """Yields `items` behind a progress bar on stderr; silent where stderr is not a terminal."""
    yield from tqdm(items, desc=f"{what:<22}", file=sys.stderr, disable=None, leave=True, dynamic_ncols=True)


def listed(names: Iterable[str], most: int = 8) -> str:
    """'a, b, c' and how many more there are."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
