"""Nearest rows and numbers, and the orthogonal map between two sets of rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from export.audit.matching import nearest, nearest_number, procrustes, turn
from export.rotation import random_orthogonal

numbers = st.lists(st.integers(-1000, 1000), min_size=1, max_size=30)


def rows_of(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


def test_the_nearest_row_is_the_one_at_the_least_distance() -> None:
    queries, rows = rows_of(600, 7), rows_of(50, 7)[::-1]  # more queries than are compared at a time
    expected = np.linalg.norm(queries[:, None] - rows[None], axis=-1).argmin(1)
    assert (nearest(queries, rows) == expected).all()


def test_a_long_row_is_not_nearer_for_being_long() -> None:
    assert list(nearest(np.array([[1.0, 0.0]]), np.array([[9.0, 0.0], [0.9, 0.1]]))) == [1]


@given(queries=numbers, values=numbers)
def test_the_nearest_number_is_at_the_least_distance(queries: list[int], values: list[int]) -> None:
    asked, known = np.array(queries, float), np.array(values, float)
    found = nearest_number(asked, known)
    assert (np.abs(asked - known[found]) == np.abs(asked[:, None] - known).min(1)).all()


def test_procrustes_finds_the_basis_and_turning_undoes_it() -> None:
    rows, basis = rows_of(40, 12), random_orthogonal(1, 12)[0].astype(np.float32)
    found = procrustes(rows, rows @ basis)
    assert np.abs(found - basis).max() < 1e-5
    assert np.abs(turn(rows @ basis, found) - rows).max() < 1e-5


def test_procrustes_of_noisy_rows_is_still_orthogonal() -> None:
    rows, basis = rows_of(400, 12), random_orthogonal(1, 12)[0].astype(np.float32)
    found = procrustes(rows, rows @ basis + 0.1 * rows_of(400, 12)[::-1])
    assert np.abs(found @ found.T - np.eye(12)).max() < 1e-5
    assert np.abs(found - basis).max() < 0.1
