"""Quantised columns change places: the values are the ones that were there, and nothing is rounded."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from export.gguf.blocks import FLOATS, LEVELS, Bytes, levels, merged, move_columns
from export.scheme import random_permutation
from shared.errors import FamilyError, SourceError
from shared.key import Index
from shared.wire import Array

ROWS, BLOCKS = 5, 6
KINDS = [*FLOATS, *LEVELS]


def random_rows(kind: Kind, rows: int = ROWS, blocks: int = BLOCKS) -> Bytes:
    """Rows of random bytes: every code, scale and minimum that a type can hold."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(0).integers(0, 256, (rows, blocks * size), np.uint8)


def columns(kind: Kind, blocks: int = BLOCKS) -> int:
    return blocks * gguf.GGML_QUANT_SIZES[kind][0]


def values(raw: Bytes, kind: Kind) -> Array:
    """The bits of the values that rows stand for: a NaN among random scales is equal to itself."""
    if kind == Kind.F32:
        return raw.view(np.uint32)
    with np.errstate(invalid="ignore", over="ignore"):
        numbers = gguf.quants.dequantize(raw, kind)
    return np.where(np.isnan(numbers), np.float32(np.nan), numbers).view(np.uint32)


def order(kind: Kind, blocks: int = BLOCKS) -> Index:
    return random_permutation(columns(kind, blocks), levels=levels(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_move_and_every_value_stays_what_it_was(kind: Kind) -> None:
    raw, index = random_rows(kind), order(kind)
    assert np.array_equal(values(move_columns(raw, kind, index), kind), values(raw, kind)[:, index])


@pytest.mark.parametrize("kind", KINDS)
def test_moved_back_the_bytes_are_the_same(kind: Kind) -> None:
    raw, index = random_rows(kind), order(kind)
    assert np.array_equal(move_columns(move_columns(raw, kind, index), kind, np.argsort(index)), raw)


@pytest.mark.parametrize("kind", LEVELS)
def test_every_byte_of_a_block_belongs_to_some_part_of_it(kind: Kind) -> None:
    raw = random_rows(kind, rows=1, blocks=2)
    halves = np.roll(np.arange(columns(kind, 2)), columns(kind, 2) // 2)
    assert np.array_equal(move_columns(raw, kind, halves), np.roll(raw, raw.shape[1] // 2, 1))


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("far", [False, True])
def test_an_order_that_takes_a_block_apart_is_refused(kind: Kind, far: bool) -> None:
    for level in levels(kind):
        index = np.arange(columns(kind))
        other = columns(kind) - 1 if far else level
        index[[level - 1, other]] = index[[other, level - 1]]
        with pytest.raises(FamilyError, match=rf"type {kind.name}: .* takes blocks of \d+ apart"):
            move_columns(random_rows(kind), kind, index)


def test_an_order_that_names_a_column_twice_is_refused() -> None:
    with pytest.raises(FamilyError, match="each of them once"):
        move_columns(random_rows(Kind.Q8_0), Kind.Q8_0, np.zeros(columns(Kind.Q8_0), np.int64))


def test_an_order_of_another_number_of_columns_is_refused() -> None:
    with pytest.raises(FamilyError, match="seen an order of 160 columns, wanted 192"):
        move_columns(random_rows(Kind.Q4_1), Kind.Q4_1, order(Kind.Q4_1, BLOCKS - 1))


@pytest.mark.parametrize("kind", [Kind.IQ2_XXS, Kind.IQ4_XS, Kind.TQ1_0, Kind.I32])
def test_a_type_that_cannot_be_moved_is_named(kind: Kind) -> None:
    with pytest.raises(SourceError, match=f"type {kind.name}: .* wanted one of: F32, .*Q6_K"):
        levels(kind)
    with pytest.raises(SourceError, match=kind.name):
        move_columns(random_rows(kind), kind, np.arange(columns(kind)))


def test_rows_of_many_slices_move_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, index = random_rows(Kind.Q4_K, rows=50), order(Kind.Q4_K)
    whole = move_columns(raw, Kind.Q4_K, index)
    monkeypatch.setattr("export.gguf.blocks.SLICE_BYTES", 7 * raw.shape[1] + 1)
    assert np.array_equal(move_columns(raw, Kind.Q4_K, index), whole)


def test_nestings_of_several_types_on_one_axis_are_one() -> None:
    assert merged(levels(Kind.Q4_K), levels(Kind.Q6_K), levels(Kind.Q8_0), levels(Kind.F16)) == (256, 32, 16)
    assert merged() == merged(()) == ()


def test_nestings_that_do_not_nest_are_refused() -> None:
    with pytest.raises(FamilyError, match="sizes of 48 and 32, wanted one to divide the other"):
        merged((48,), (32,))


def test_an_order_for_several_types_suits_each() -> None:
    index = random_permutation(columns(Kind.Q4_K), levels=merged(levels(Kind.Q4_K), levels(Kind.Q6_K)))
    for kind in (Kind.Q4_K, Kind.Q6_K):
        raw = random_rows(kind)
        assert np.array_equal(values(move_columns(raw, kind, index), kind), values(raw, kind)[:, index])
