"""What replies say of rows of logits, on a processor: their likeliest ids and log-sum-exp, in one thread, torch aside.

A vocabulary is wide, and a small model computes a row in a few milliseconds; so a row is gone over few times, and no
other thread is woken for it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cloud_backend.engine import AppendWork, HiddenRows, LogitRows, Outcome, not_finite
from shared.wire import Array

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def logit_rows(work: AppendWork, logits: Array) -> Outcome:
    """Of logits [rows, vocab] in the dtype they are sent in: the top k, or all of them; and log-sum-exp of the values
    as sent, so that a device can rely on it."""
    wide = np.asarray(logits, np.float32)
    if not all(finite(row) for row in wide):
        return not_finite()
    sums = np.array([log_sum_exp(row, work.temperature) for row in wide], np.float32).reshape(-1, 2)
    if work.top_k == 0:
        return LogitRows(logits, np.empty((work.rows, 0), np.uint32), sums)
    count = min(work.top_k, wide.shape[-1])
    ids = [top(row, count) for row in wide]
    values = [row[best] for row, best in zip(logits, ids, strict=True)]
    return LogitRows(
        np.array(values, logits.dtype).reshape(-1, count), np.array(ids, np.uint32).reshape(-1, count), sums
    )


def hidden_rows(states: Array) -> Outcome:
    """Of last hidden states [rows, hidden] in the dtype they are sent in."""
    return HiddenRows(states) if np.isfinite(states).all() else not_finite()


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
