"""Positions cancel out: tokens are told apart from where they stand by who has nothing but the vectors."""

from __future__ import annotations

import numpy as np

from shared.key import Index
from shared.wire import Array

MOST = 1_000  # different vectors at a place that are compared


def without_positions(vectors: Array, places: Index, near: float) -> Array:
    """Vectors [n, hidden] as if every token stood at place 0; `places` [n] is where each one stood in its prompt.

    What travels is token + position, in whatever basis. Between two places every token makes the same step, so among
    the differences of all vectors at the one and all at the other, that step comes up again and again: once for each
    token that was seen at both. near: what rounding leaves of a difference, as a share of lengths.
    """
    first = _distinct(vectors[places == 0])
    size = near * float(np.median(np.linalg.norm(first, axis=1)))
    moved = vectors.copy()
    for place in np.unique(places[places > 0]):
        here = places == place
        moved[here] -= common_step(first, _distinct(vectors[here]), size)
    return moved


def _distinct(vectors: Array) -> Array:
    """The different vectors of traffic, those that came most often first."""
    distinct, counts = np.unique(vectors, axis=0, return_counts=True)
    often: Array = distinct[np.argsort(-counts, kind="stable")[:MOST]]
    return often


def common_step(before: Array, after: Array, size: float) -> Array:
    """The difference [hidden] between rows of `after` [m, hidden] and `before` [n, hidden] that most pairs have.

    size: how far two differences may be from each other and still be the same.
    """
    looks = np.random.default_rng(0).standard_normal((before.shape[1], 3))  # which keep lengths, on average
    steps = (after @ looks)[:, None] - (before @ looks)[None]  # [m, n, 3]
    cells = np.floor(steps / (4 * size)).astype(np.int64).reshape(-1, 3)
    keys = cells @ np.array([1, 1_000_003, 1_000_003**2])
    _, where, counts = np.unique(keys, return_inverse=True, return_counts=True)
    in_cell = np.argwhere((where == counts.argmax()).reshape(len(after), len(before)))
    return _centre(after[in_cell[:, 0]] - before[in_cell[:, 1]], size)


def _centre(steps: Array, size: float) -> Array:
    """The mean of those steps [n, hidden] that agree with most others: chance brings some into the same cell."""
    middle: Array = np.median(steps, axis=0)
    agreeing = np.linalg.norm(steps - middle, axis=1) <= 4 * size
    centre: Array = steps[agreeing].mean(axis=0) if agreeing.any() else middle
    return centre
