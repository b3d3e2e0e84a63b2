"""The scheme `permutation`: STIP §5.1 with the structure that real attention needs.

Every space gets one secret permutation. An index p stands for it: position j of the permuted axis holds feature p[j].
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable

import numpy as np
import torch

from export.families import Axis, Features, Fixed, Heads, Structure
from shared.errors import FamilyError
from shared.key import Index, UserKey

RandomBytes = Callable[[int], bytes]

SCHEME = "permutation"


def random_permutation(size: int, random_bytes: RandomBytes = os.urandom) -> Index:
    """A uniformly random order of `size` things: sorts random 64-bit keys, and draws again should two be equal."""
    while True:
        keys = np.frombuffer(random_bytes(8 * size), np.uint64)
        order = np.argsort(keys)
        if np.all(np.diff(keys[order]) > 0):
            return order.astype(np.int64)


class Permutation:
    """One secret permutation for each space of a model, and what it does to tensors."""

    name = SCHEME

    def __init__(self, structures: Iterable[Structure], random_bytes: RandomBytes = os.urandom) -> None:
        self._random_bytes = random_bytes
        self._index: dict[str, Index] = {}
        self.log2_keys = 0.0  # log₂ of the number of keys the draws choose from
        for structure in structures:
            if isinstance(structure, Features):
                self._index[structure.name] = self._order(structure.size)
            else:
                self._draw_heads(structure)

    def _order(self, size: int) -> Index:
        self.log2_keys += math.lgamma(size + 1) / math.log(2)
        return random_permutation(size, self._random_bytes)

    def _draw_heads(self, heads: Heads) -> None:
        group = heads.query_heads // heads.key_value_heads
        inside = np.arange(heads.dim)
        key_value_order = self._order(heads.key_value_heads)
        key, query, value, attended = [], [], [], []
        for source in key_value_order:  # the key/value head that comes next in the permuted model
            mixed = self._order(heads.dim)
            key.append(source * heads.dim + inside)
            value.append(source * heads.dim + mixed)
            for member in self._order(group):
                head = source * group + member
                query.append(head * heads.dim + inside)
                attended.append(head * heads.dim + mixed)
        self._index[heads.query] = np.concatenate(query)
        self._index[heads.key] = np.concatenate(key)
        self._index[heads.value] = np.concatenate(value)
        self._index[heads.attended] = np.concatenate(attended)

    def act(self, name: str, tensor: torch.Tensor, axes: tuple[Axis, ...]) -> torch.Tensor:
        """`tensor` in the permuted spaces of its axes. Raises FamilyError where a shape does not fit its spaces."""
        if tensor.ndim != len(axes):
            raise FamilyError(f"tensor {name!r}: seen {tensor.ndim} axes, wanted {len(axes)}")
        for dimension, axis in enumerate(axes):
            if isinstance(axis, Fixed):
                continue
            index = self._index[axis]
            if tensor.shape[dimension] != len(index):
                raise FamilyError(
                    f"tensor {name!r}: seen {tensor.shape[dimension]} on axis {dimension}, wanted {len(index)} ({axis})"
                )
            tensor = tensor.index_select(dimension, torch.from_numpy(index))
        return tensor

    def unmoved(self, axes: tuple[Axis, ...]) -> str | None:
        """Why a tensor with these axes is stored as it was, or None if it is not."""
        reasons = []
        for axis in axes:
            if isinstance(axis, Fixed):
                reasons.append(axis.reason)
            elif np.array_equal(self._index[axis], np.arange(len(self._index[axis]))):
                reasons.append(f"{axis} moves by whole heads alone, and the draw left their order as it was")
            else:
                return None
        return "; ".join(reasons)

    def user_key(self, key_id: str) -> UserKey:
        """The two permutations a device needs; the others stay with the developer and are not stored at all."""
        return UserKey(key_id, self._index["residual"], self._index["vocab"])
