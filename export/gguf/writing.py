"""Writes model.gguf: floats go through the scheme, quantised values change places, rows whole and columns in blocks.

No quantised value is computed anew. A block of columns shares a scale, so whole blocks change places, and columns
inside each: the scheme drew its orders so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from export.cloud_half import CloudPlan
from export.gguf.blocks import move_columns
from export.gguf.file import FLOATS, Bytes, Tensor, encoded, write_gguf
from export.gguf.half import GGUF_FILE, GgufPlan
from export.gguf.layout import TOKEN_TABLE, Form, layout_of
from export.permutation import Permutation
from export.progress import bar
from export.scheme import Scheme
from export.source import Source
from export.spaces import Axis, Each, of_each, spaces_of
from shared.key import Index


def write_gguf_half(source: Source, scheme: Scheme, plan: CloudPlan, made: GgufPlan, folder: Path) -> None:
    """Writes model.gguf, one tensor of the stock model at a time."""

    def rows() -> Iterator[tuple[str, Bytes]]:
        for name in made.tensors:
            if name in made.computed:
                yield name, encoded(made.computed[name][None], Kind.F32)
            elif name == TOKEN_TABLE:
                yield name, _zeros(made.tensors[name])
        for name in bar(list(made.forms), "transforming"):
            yield from _written(source, scheme, plan, made, name)

    architecture = layout_of(source.config.model_type).name
    write_gguf(folder / GGUF_FILE, architecture, made.metadata, made.tensors, rows())


def _zeros(tensor: Tensor) -> Bytes:
    return np.zeros((torch.Size(tensor.shape[:-1]).numel(), tensor.row_bytes), np.uint8)


def _written(source: Source, scheme: Scheme, plan: CloudPlan, made: GgufPlan, name: str) -> Iterator[tuple[str, Bytes]]:
    """The tensors of the file that hold one of the stock model."""
    form = made.forms[name]
    tensors = [made.tensors[part] for part in form.names]
    if name in plan.zeros:
        yield from ((part, _zeros(tensor)) for part, tensor in zip(form.names, tensors, strict=True))
        return
    axes, stored = plan.axes[name], plan.stored[name]
    if all(tensor.kind in FLOATS for tensor in tensors):
        values = form.stored(scheme.act(name, source.read(stored), axes, source.read))
        for part, one, tensor in zip(form.names, values, tensors, strict=True):
            yield part, encoded(one if one.ndim > 1 else one[None], tensor.kind)
        return
    assert isinstance(scheme, Permutation)
    moves = _moves(scheme, axes, form, made.stock_shapes[name])
    for number, (part, tensor) in enumerate(zip(form.names, tensors, strict=True)):
        if made.source is not None:
            raw = made.source.raw(made.origins[part])
        else:
            raw = encoded(form.stored(source.read(stored))[number], tensor.kind)
        yield part, _moved(raw, tensor, moves, number, len(form.names))


@dataclass(frozen=True, eq=False)
class _Move:
    """Where the rows and columns of one matrix go, in llama.cpp's form: row j is that of row rows[j] of matrix
    `matrix` before."""

    matrix: int
    rows: Index
    columns: Index


def _moves(scheme: Permutation, axes: tuple[Axis, ...], form: Form, shape: tuple[int, ...]) -> list[_Move]:
    """What the scheme does to a tensor, matrix by matrix of a stack."""
    if isinstance(axes[0], Each):
        each = list(of_each(axes, shape[0]))
        return [_move(scheme, each[one], form, shape[1:], int(one)) for one in scheme.index(axes[0].space)]
    return [_move(scheme, axes, form, shape, 0)]


def _move(scheme: Permutation, axes: tuple[Axis, ...], form: Form, shape: tuple[int, ...], matrix: int) -> _Move:
    first, second = (_index(scheme, axis, size) for axis, size in zip(axes, shape, strict=True))
    outputs, inputs = (second, first) if form.transposed else (first, second)
    if form.heads:
        order = _interleaved(form, outputs.size)
        outputs = np.argsort(order)[outputs[order]]
    return _Move(matrix, outputs, inputs)


def _interleaved(form: Form, rows: int) -> Index:
    """Row j of llama.cpp's form is row [j] of the stock model's."""
    [order] = Form(form.names, heads=form.heads).stored(torch.arange(rows))
    index: Index = order.numpy()
    return index


def _index(scheme: Permutation, axis: Axis, size: int) -> Index:
    """The order of an axis: of its spaces side by side, or everything where it was."""
    parts, start = [], 0
    for space in spaces_of(axis):
        parts.append(start + scheme.index(space))
        start += parts[-1].size
    return np.concatenate(parts) if parts else np.arange(size)


def _moved(raw: Bytes, tensor: Tensor, moves: list[_Move], number: int, parts: int) -> Bytes:
    """One of the `parts` tensors side by side that hold a stack of matrices, moved. raw: rows of all matrices."""
    height = len(raw) // len(moves)
    made = np.empty_like(raw)
    for place, move in enumerate(moves):
        rows = move.rows.reshape(parts, height)[number] - number * height
        picked = raw[move.matrix * height + rows]
        made[place * height : (place + 1) * height] = move_columns(picked, tensor.kind, move.columns)
    return made
