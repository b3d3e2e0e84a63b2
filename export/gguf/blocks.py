"""Columns of quantised GGUF matrices change places bit by bit, and no value is computed anew.

A row of a quantised matrix is a row of *blocks*: so many values, a short code for each, and what they share, a scale
and perhaps a minimum. The K types nest: a block of 256 has a scale of its own and one for each sub-block. So whole
blocks may change places, sub-blocks inside a block, and values inside a sub-block; each takes along the bits that are
its own. What comes out stands for exactly the values that went in, in another order.

The layouts are those of llama.cpp (ggml/src/ggml-common.h), as the gguf package reads them (gguf/quants.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind

from shared.errors import FamilyError, SourceError
from shared.key import Index

Bytes = npt.NDArray[np.uint8]

SLICE_BYTES = 2**20  # of rows that are moved at once: what is taken apart stays in the processor's cache or near it
FLOATS: Mapping[Kind, type[np.generic]] = {Kind.F32: np.uint32, Kind.F16: np.uint16, Kind.BF16: np.uint16}


def _field(first_byte: int, shift: int, width: int) -> list[int]:
    """The bits, counted from the start of a block, of a field of `width` bits, `shift` bits into a byte."""
    return [8 * first_byte + shift + bit for bit in range(width)]


def _codes(size: int, first_byte: int, width: int, stride: int) -> list[list[int]]:
    """The bits of `size` codes of `width` bits each: the first ones lie in the lowest bits of `stride` bytes, the next
    ones above them, and when these bytes are full, in the next `stride`."""
    a_byte = 8 // width
    return [
        _field(first_byte + stride * (at // stride // a_byte) + at % stride, width * (at // stride % a_byte), width)
        for at in range(size)
    ]


def _both(*parts: list[list[int]]) -> list[list[int]]:
    """Fields of several parts each: what lies in one place, then what lies in the next."""
    return [[bit for field in fields for bit in field] for fields in zip(*parts, strict=True)]


def _six_bit_scales(first_byte: int) -> list[list[int]]:
    """The scale and the minimum, 6 bits each, of the 8 sub-blocks of Q4_K and Q5_K, in 12 bytes: four of each lie in
    the low bits of the first eight; of the others 4 bits lie in the last four, and 2 above the former."""
    scale, minimum, last = first_byte, first_byte + 4, first_byte + 8
    low = [_field(scale + s, 0, 6) + _field(minimum + s, 0, 6) for s in range(4)]
    high = [
        _field(last + s, 0, 4) + _field(scale + s, 6, 2) + _field(last + s, 4, 4) + _field(minimum + s, 6, 2)
        for s in range(4)
    ]
    return low + high


# type → size of a part → where the bits lie that each such part of a block has for itself.
_LAYOUTS: Mapping[Kind, Mapping[int, list[list[int]]]] = {
    Kind.Q4_0: {32: [_field(0, 0, 16)], 1: _codes(32, 2, 4, 16)},
    Kind.Q4_1: {32: [_field(0, 0, 32)], 1: _codes(32, 4, 4, 16)},
    Kind.Q5_0: {32: [_field(0, 0, 16)], 1: _both(_codes(32, 6, 4, 16), [_field(2, bit, 1) for bit in range(32)])},
    Kind.Q5_1: {32: [_field(0, 0, 32)], 1: _both(_codes(32, 8, 4, 16), [_field(4, bit, 1) for bit in range(32)])},
    Kind.Q8_0: {32: [_field(0, 0, 16)], 1: _codes(32, 2, 8, 32)},
    Kind.Q2_K: {256: [_field(80, 0, 32)], 16: _codes(16, 0, 8, 16), 1: _codes(256, 16, 2, 32)},
    Kind.Q3_K: {
        256: [_field(108, 0, 16)],
        16: _both(_codes(16, 96, 4, 8), _codes(16, 104, 2, 4)),
        1: _both(_codes(256, 32, 2, 32), _codes(256, 0, 1, 32)),
    },
    Kind.Q4_K: {256: [_field(0, 0, 32)], 32: _six_bit_scales(4), 1: _codes(256, 16, 4, 32)},
    Kind.Q5_K: {
        256: [_field(0, 0, 32)],
        32: _six_bit_scales(4),
        1: _both(_codes(256, 48, 4, 32), _codes(256, 16, 1, 32)),
    },
    Kind.Q6_K: {
        256: [_field(208, 0, 16)],
        16: _codes(16, 192, 8, 16),
        1: _both(_codes(256, 0, 4, 64), _codes(256, 128, 2, 32)),
    },
}

LEVELS: Mapping[Kind, tuple[int, ...]] = {
    kind: tuple(size for size in layout if size > 1) for kind, layout in _LAYOUTS.items()
}
"""Sizes of the parts that an order of the columns must keep together, the largest first; floats are absent."""


def levels(kind: Kind) -> tuple[int, ...]:
    """Sizes of the nested blocks of a type; none for floats. Raises SourceError for a type that cannot be moved."""
    if kind in FLOATS:
        return ()
    if kind not in LEVELS:
        movable = ", ".join(one.name for one in (*FLOATS, *LEVELS))
        raise SourceError(
            f"a tensor of type {kind.name}: its values cannot change places as they are stored; wanted one of: "
            f"{movable}",
            hint="give the model in another quantisation, or the unquantised one",
        )
    return LEVELS[kind]


def merged(*nestings: tuple[int, ...]) -> tuple[int, ...]:
    """The nesting that suits all of several: every size that occurs, the largest first.

    Raises FamilyError where a size does not divide the next larger one.
    """
    sizes = sorted({size for nesting in nestings for size in nesting}, reverse=True)
    for larger, smaller in pairwise(sizes):
        if larger % smaller:
            raise FamilyError(
                f"blocks on one axis: seen sizes of {larger} and {smaller}, wanted one to divide the other"
            )
    return tuple(sizes)


def move_columns(raw: Bytes, kind: Kind, index: Index) -> Bytes:
    """The rows [rows, row bytes] of a matrix of type `kind` with column index[j] in the place of column j, exactly.

    Raises FamilyError for an index that is no order of the columns or takes a block apart, and SourceError for a type
    that cannot be moved.
    """
    _check(raw, kind, index)
    if kind in FLOATS:
        moved: Bytes = np.take(np.ascontiguousarray(raw).view(FLOATS[kind]), index, 1).view(np.uint8)
        return moved
    layout = _layout(kind)
    order = layout.order(index)
    result = np.empty(raw.shape, np.uint8)
    rows = max(1, SLICE_BYTES // raw.shape[1])
    for start in range(0, len(raw), rows):
        part = raw[start : start + rows]
        result[start : start + rows] = _joined(_apart(part, layout.width)[:, order], layout.width)
    return result


def _check(raw: Bytes, kind: Kind, index: Index) -> None:
    sizes = levels(kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if index.size % block or raw.shape[1] != index.size // block * size:
        raise FamilyError(
            f"rows of {raw.shape[1]} bytes of type {kind.name}: seen an order of {index.size} columns, wanted "
            f"{raw.shape[1] / size * block:g}"
        )
    if not np.array_equal(np.bincount(index, minlength=index.size), np.ones(index.size)):
        raise FamilyError(f"order of {index.size} columns: wanted each of them once")
    for level in sizes:
        if (index.reshape(-1, level) // level != index[::level, None] // level).any():
            raise FamilyError(f"type {kind.name}: the order of its columns takes blocks of {level} apart")


@dataclass(frozen=True, eq=False)
class _Layout:
    """A block cut into units of `width` bits, none of which parts share.

    units: size of a part → numbers [parts of a block, units] of the units that are its own.
    """

    width: int
    block: int
    units: Mapping[int, Index]

    def order(self, index: Index) -> Index:
        """Which unit of a row comes into the place of each."""
        in_block = sum(units.size for units in self.units.values())
        order = np.empty(index.size // self.block * in_block, np.int64)
        for size, units in self.units.items():
            places = (np.arange(index.size // self.block)[:, None, None] * in_block + units).reshape(-1, units.shape[1])
            order[places] = places[index[::size] // size]
        return order


@cache
def _layout(kind: Kind) -> _Layout:
    bits = {size: np.array(fields) for size, fields in _LAYOUTS[kind].items()}
    width = next(width for width in (8, 4, 2, 1) if all(_in_units(one, width) for one in bits.values()))
    return _Layout(width, max(bits), {size: one[:, ::width] // width for size, one in bits.items()})


def _in_units(bits: Index, width: int) -> bool:
    """Whether the bits [parts, bits] are whole units of `width` bits."""
    if bits.shape[1] % width:
        return False
    units = bits.reshape(-1, width)
    return bool((units[:, 0] % width == 0).all() and (units == units[:, :1] + np.arange(width)).all())


def _shifts(width: int) -> Iterator[int]:
    return iter(range(0, 8, width))


def _apart(raw: Bytes, width: int) -> Bytes:
    """Units [rows, units] of bytes [rows, bytes], the lowest bits first."""
    units = np.empty((*raw.shape, 8 // width), np.uint8)
    for place, shift in enumerate(_shifts(width)):
        np.right_shift(raw, shift, out=units[..., place])
    units &= (1 << width) - 1
    return units.reshape(len(raw), -1)


def _joined(units: Bytes, width: int) -> Bytes:
    """Bytes [rows, bytes] of units [rows, units]."""
    parts = units.reshape(len(units), -1, 8 // width)
    raw = parts[..., 0].copy()
    for place, shift in enumerate(_shifts(width)):
        if place:
            raw |= parts[..., place] << np.uint8(shift)
    return raw
