"""A table of successors is checked before it is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from device_app.successors import SUCCESSORS, Successors
from shared.errors import BundleError

ROWS = np.array([[3, 255], [2, 51], [1, 0]], np.uint32)


def test_a_token_has_its_successor_and_its_chance(tmp_path: Path) -> None:
    np.save(tmp_path / SUCCESSORS, ROWS)
    table = Successors.load(tmp_path / SUCCESSORS, 4)
    one = table.after(1)
    assert one is not None
    assert (one.token, one.chance) == (2, pytest.approx(0.2))


@pytest.mark.parametrize("token", [-1, 3, 10**30, -(10**30)])
def test_other_tokens_have_none(token: int, tmp_path: Path) -> None:
    np.save(tmp_path / SUCCESSORS, ROWS)
    assert Successors.load(tmp_path / SUCCESSORS, 4).after(token) is None


@pytest.mark.parametrize(
    "rows",
    [
        ROWS.astype(np.int32),
        ROWS.astype(np.float32),
        ROWS[:, 0],
        ROWS[:, :1],
        ROWS[None],
        np.array([[4, 0]], np.uint32),
        np.array([[0, 256]], np.uint32),
        np.zeros((5, 2), np.uint32),
    ],
)
def test_a_table_of_another_form_is_refused(rows: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / SUCCESSORS, rows)
    with pytest.raises(BundleError, match=SUCCESSORS):
        Successors.load(tmp_path / SUCCESSORS, 4)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"PK\x03\x04", b"\x80\x04N."])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SUCCESSORS).write_bytes(content)
    with pytest.raises(BundleError, match=SUCCESSORS):
        Successors.load(tmp_path / SUCCESSORS, 4)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=SUCCESSORS):
        Successors.load(tmp_path / SUCCESSORS, 4)
