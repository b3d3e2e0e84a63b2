"""What replies say of one row of logits, on a processor: its likeliest ids and its log-sum-exp, in one thread.

A vocabulary is wide, and a small model computes a row in a few milliseconds; so a row is gone over few times, and no
other thread is woken for it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def finite(row: Row) -> bool:
    """Whether every value is."""
    return math.isfinite(row.max()) and math.isfinite(row.min())


def top(row: Row, count: int) -> Ids:
    """The ids of the greatest values, by descending value, then ascending id.

    Values are dealt out to columns, at least twice as many as ids are wanted. The greatest of each column are as many
    values, so what is below the `count`-th of them is none of those wanted, and few are left to be sorted.
    """
    columns = 2 * count
    rows = len(row) // columns if count else 0
    if rows > 1:
        greatest = row[: rows * columns].reshape(rows, columns).max(0)
        ids = np.flatnonzero(row >= np.partition(greatest, -count)[-count])
    else:
        ids = np.arange(len(row))
    found: Ids = ids[np.argsort(-row[ids], kind="stable")[:count]]
    return found


def log_sum_exp(row: Row, temperature: float) -> tuple[float, float]:
    """At temperature 1, and at another."""
    greatest = row.max()
    below = row - greatest
    at_one = float(greatest) + math.log(np.exp(below).sum())
    if temperature == 1.0:
        return at_one, at_one
    return at_one, float(greatest) / temperature + math.log(np.exp(below / np.float32(temperature)).sum())
