"""The scheme `permutation`: STIP §5.1 with the structure that real attention needs.

Every space gets one secret permutation. An index p stands for it: position j of the permuted axis holds feature p[j].

Where a matrix is stored quantised, values of one block share a scale along the axis that the matrix reads. An order of
that axis which moves whole blocks, and values inside them, leaves every quantised value as it is: see `blocks`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from export.head_blocks import HeadBlocks
from export.progress import listed
from export.scheme import (
    RandomBytes,
    Read,
    SchemeName,
    Secret,
    act_on_axes,
    key_of,
    log2_orders,
    random_permutation,
    why_unmoved,
)
from export.spaces import After, Axis, Gated, Heads, Structure
from shared.errors import FamilyError
from shared.key import Index, UserKey

Levels = tuple[int, ...]  # sizes of nested blocks, the largest first


@dataclass(frozen=True, eq=False)
class Order:
    """A secret order: position j holds feature index[j]."""

    index: Index

    @property
    def size(self) -> int:
        return self.index.size

    def act(self, tensor: torch.Tensor, dimension: int) -> torch.Tensor:
        return tensor.index_select(dimension, torch.from_numpy(self.index))


class Permutation:
    """One secret permutation for each space of a model, and what it does to tensors.

    blocks: space → sizes of the nested blocks that its order must keep together, the largest first. It may name what a
        matrix reads: a stream, the features of a feed-forward block (of a gated one `product`), and `attended` heads.
    Raises FamilyError where blocks do not fit a space, or blocks and heads do not nest.
    """

    name: SchemeName = "permutation"
    moves_only = True

    def __init__(
        self,
        structures: Iterable[Structure],
        random_bytes: RandomBytes = os.urandom,
        blocks: Mapping[str, Levels] = MappingProxyType({}),
    ) -> None:
        self._structures = list(structures)
        self._random_bytes = random_bytes
        self._blocks = {space: levels for space, levels in blocks.items() if levels}
        self._secrets: dict[str, Secret] = {}
        self.log2_keys: float | None = 0.0
        kept: set[str] = set()
        for structure in self._structures:
            kept.add(self._draw(structure))
        if unknown := sorted(self._blocks.keys() - kept):
            raise FamilyError(f"blocks of {listed(unknown)}: no quantised matrix reads there")

    @cached_property
    def log2_keys_free(self) -> float | None:
        """log₂ of the number of keys there would be without blocks; None where there are none."""
        return Permutation(self._structures).log2_keys if self._blocks else None

    def _draw(self, structure: Structure) -> str:
        """Draws for one structure. Gives the space of it that may have blocks."""
        if isinstance(structure, Heads):
            self._draw_heads(structure)
            return structure.attended
        if isinstance(structure, Gated):
            order = Order(self._order(structure.size, self._levels(structure.product, structure.size), moves=True))
            self._secrets |= dict.fromkeys((structure.gate, structure.up, structure.product), order)
            return structure.product
        levels = self._levels(structure.name, structure.size)
        self._secrets[structure.name] = Order(self._order(structure.size, levels, moves=True))
        return structure.name

    def _levels(self, space: str, size: int) -> Levels:
        levels = self._blocks.get(space, ())
        if levels and size % levels[0]:
            raise FamilyError(
                f"space {space!r}: seen {size} features, wanted a multiple of {levels[0]}, the block of its matrices",
                hint="a quantisation of smaller blocks, or none",
            )
        return levels

    def _order(self, size: int, levels: Levels = (), *, moves: bool = False) -> Index:
        self.log2_keys = (self.log2_keys or 0.0) + log2_orders(size, levels, moves=moves)
        return random_permutation(size, self._random_bytes, levels=levels, moves=moves)

    def _draw_heads(self, heads: Heads) -> None:
        group = heads.query_heads // heads.key_value_heads
        nested = HeadBlocks.of(heads, self._levels(heads.attended, heads.query_heads * heads.dim))
        inside = np.arange(heads.dim)
        key, query, value, attended = [], [], [], []
        # the key/value head that comes next in the permuted model
        for at, source in enumerate(self._order_of_key_value_heads(heads, nested)):
            mixed = self._order(heads.dim, nested.inside)
            turned = heads.dim - heads.free
            placed = np.concatenate([inside[:turned], turned + self._order(heads.free)])
            key.append(source * heads.dim + placed)
            value.append(source * heads.dim + mixed)
            for member in self._order_of_members(heads, nested, at * group):
                head = source * group + member
                query.append(head * heads.dim + placed)
                attended.append(head * heads.dim + mixed)
        self._secrets[heads.query] = Order(np.concatenate(query))
        self._secrets[heads.key] = Order(np.concatenate(key))
        self._secrets[heads.value] = Order(np.concatenate(value))
        self._secrets[heads.attended] = Order(np.concatenate(attended))

    def _order_of_key_value_heads(self, heads: Heads, nested: HeadBlocks) -> Index:
        if nested.astride is None:
            return self._order(heads.key_value_heads, nested.groups, moves=True)
        bunch = nested.bunch(heads)
        bunches = self._order(heads.key_value_heads // bunch, moves=True)
        order: Index = (bunches[:, None] * bunch + np.arange(bunch)).reshape(-1)
        return order

    def _order_of_members(self, heads: Heads, nested: HeadBlocks, first: int) -> Index:
        """The order of the query heads of one key/value head, of which `first` is the first one's number."""
        group = heads.query_heads // heads.key_value_heads
        if nested.astride is None:
            return self._order(group, nested.members, moves=heads.key_value_heads == 1)
        begins, parts = 0, []
        for size, levels in nested.runs(first, group):
            parts.append(begins + self._order(size, levels))
            begins += size
        return np.concatenate(parts)

    def index(self, space: str) -> Index:
        """The secret order of a space."""
        secret = self._secrets[space]
        assert isinstance(secret, Order)
        return secret.index

    def act(self, name: str, tensor: torch.Tensor, axes: tuple[Axis, ...], read: Read) -> torch.Tensor:
        return act_on_axes(name, tensor, axes, self._secrets)

    def folded(self, axes: tuple[Axis, ...]) -> After | None:
        return None

    def turns(self, space: str) -> bool:
        return False

    def unmoved(self, axes: tuple[Axis, ...]) -> str | None:
        return why_unmoved(axes, lambda space: bool((np.diff(self.index(space)) == 1).all()))

    def user_key(self, key_id: str, *, head: Literal["cloud", "device"] = "cloud") -> UserKey:
        return key_of(key_id, self.index, self._secrets, head)
