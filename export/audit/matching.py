"""What several attacks share: nearest rows, and the orthogonal map that takes one set of rows to another."""

from __future__ import annotations

import numpy as np
import torch

from shared.key import Index
from shared.wire import Array

BLOCK = 256  # rows compared at a time


def nearest(queries: Array, rows: Array) -> Index:
    """For each query [n, width] the index of the row [m, width] at the least Euclidean distance."""
    known = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
    half_squares = known.square().sum(1) / 2
    asked = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
    found = [(half_squares - block @ known.T).argmin(1) for block in torch.split(asked, BLOCK)]
    return torch.cat(found).numpy()


def turn(hidden: Array, basis: Array) -> Array:
    """hidden·basisᵀ: rows in the cloud's basis, brought back to the public one."""
    turned: Array = (torch.from_numpy(hidden) @ torch.from_numpy(basis).T).numpy()
    return turned


def procrustes(rows: Array, turned: Array) -> Array:
    """The orthogonal Q [width, width] that brings rows·Q nearest to `turned`, both [n, width] (Schönemann 1966)."""
    left, _, right = torch.linalg.svd(torch.from_numpy(rows).T @ torch.from_numpy(turned))
    basis: Array = (left @ right).numpy()
    return basis


def nearest_number(queries: Array, numbers: Array) -> Index:
    """For each query the index of the nearest number."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    right = np.clip(np.searchsorted(ordered, queries), 1, len(ordered) - 1)
    left = right - 1
    chosen = np.where(queries - ordered[left] <= ordered[right] - queries, left, right)
    return order[chosen]
