"""The scheme `permutation`: STIP §5.1 with the structure that real attention needs.

Every space gets one secret permutation. An index p stands for it: position j of the permuted axis holds feature p[j].
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from export.scheme import (
    RandomBytes,
    Read,
    SchemeName,
    Secret,
    act_on_axes,
    key_of,
    random_permutation,
    why_unmoved,
)
from export.spaces import After, Axis, Gated, Heads, Structure
from shared.key import Index, UserKey


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
    """One secret permutation for each space of a model, and what it does to tensors."""

    name: SchemeName = "permutation"
    moves_only = True

    def __init__(self, structures: Iterable[Structure], random_bytes: RandomBytes = os.urandom) -> None:
        self._random_bytes = random_bytes
        self._secrets: dict[str, Secret] = {}
        self.log2_keys: float | None = 0.0
        for structure in structures:
            if isinstance(structure, Heads):
                self._draw_heads(structure)
            elif isinstance(structure, Gated):
                order = Order(self._order(structure.size, moves=True))
                self._secrets |= dict.fromkeys((structure.gate, structure.up, structure.product), order)
            else:
                self._secrets[structure.name] = Order(self._order(structure.size, moves=True))

    def _order(self, size: int, *, moves: bool = False) -> Index:
        orders = math.lgamma(size + 1) / math.log(2)
        if moves and 1 < size < 20:  # beyond, one order less is no difference
            orders = math.log2(math.factorial(size) - 1)
        self.log2_keys = (self.log2_keys or 0.0) + orders
        return random_permutation(size, self._random_bytes, moves=moves)

    def _draw_heads(self, heads: Heads) -> None:
        group = heads.query_heads // heads.key_value_heads
        inside = np.arange(heads.dim)
        key_value_order = self._order(heads.key_value_heads, moves=True)
        key, query, value, attended = [], [], [], []
        for source in key_value_order:  # the key/value head that comes next in the permuted model
            mixed = self._order(heads.dim)
            turned = heads.dim - heads.free
            placed = np.concatenate([inside[:turned], turned + self._order(heads.free)])
            key.append(source * heads.dim + placed)
            value.append(source * heads.dim + mixed)
            for member in self._order(group, moves=heads.key_value_heads == 1):
                head = source * group + member
                query.append(head * heads.dim + placed)
                attended.append(head * heads.dim + mixed)
        self._secrets[heads.query] = Order(np.concatenate(query))
        self._secrets[heads.key] = Order(np.concatenate(key))
        self._secrets[heads.value] = Order(np.concatenate(value))
        self._secrets[heads.attended] = Order(np.concatenate(attended))

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
