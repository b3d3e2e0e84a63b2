"""The scheme `rotation`: features turn into one another wherever the stock architecture allows it.

- The gains of norms are folded into what reads them, and the residual stream gets a random orthogonal basis; with
  LayerNorms one that keeps the vector of ones; where a gain sits between norm and stream, a permutation alone.
- Each key/value head gets an orthogonal basis for its values, shared by the query heads of its group.
- Each rotary plane of a head turns by a secret angle, in query and key alike, and is scaled in one, back in the other.
- Heads, groups, the features of the feed-forward block and the vocabulary are permuted; up is scaled with product.

Products with bases are computed in float64, and rounded to float32. SECURITY.md says what all this is worth.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from export.permutation import Order
from export.scheme import (
    RandomBytes,
    Read,
    SchemeName,
    Secret,
    act_on_axes,
    fold,
    key_of,
    random_permutation,
    why_unmoved,
)
from export.spaces import After, Axis, Features, Gain, Gated, Heads, Stream, Structure
from shared.key import UserKey

Matrix = npt.NDArray[np.float64]

BLOCK = 2**22  # values that are computed in float64 at a time


@dataclass(frozen=True, eq=False)
class Scaled:
    """A secret order, and a factor for each feature in it."""

    order: Order
    factors: Matrix  # [size]

    @property
    def size(self) -> int:
        return self.order.size

    def act(self, tensor: torch.Tensor, dimension: int) -> torch.Tensor:
        shape = [1] * tensor.ndim
        shape[dimension] = -1
        return self.order.act(tensor, dimension) * torch.from_numpy(self.factors).to(tensor.dtype).view(shape)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A secret order of heads, and for each a matrix [dim, dim]: a head's features x become x·matrix.

    A single head is a basis of the whole space.
    """

    order: npt.NDArray[np.int64]  # [heads]: the head that comes next
    matrices: Matrix  # [heads, dim, dim]

    @property
    def size(self) -> int:
        heads, dim, _ = self.matrices.shape
        return int(heads * dim)

    def act(self, tensor: torch.Tensor, dimension: int) -> torch.Tensor:
        heads, dim, _ = self.matrices.shape
        moved = tensor.movedim(dimension, -1)
        rows = moved.reshape(-1, heads, dim)
        turned = torch.empty_like(rows)
        matrices = torch.from_numpy(self.matrices)
        for start in range(0, len(rows), step := max(1, BLOCK // self.size)):
            block = rows[start : start + step, torch.from_numpy(self.order)].double()
            turned[start : start + step] = torch.einsum("rhx,hxy->rhy", block, matrices)
        return turned.reshape(moved.shape).movedim(-1, dimension)


class Rotation:
    """One secret for each space of a model, and what it does to tensors."""

    name: SchemeName = "rotation"
    moves_only = False
    log2_keys: float | None = None

    def __init__(self, structures: Iterable[Structure], random_bytes: RandomBytes = os.urandom) -> None:
        self._random_bytes = random_bytes
        self._secrets: dict[str, Secret] = {}
        self._folding: set[str] = set()  # streams whose norms' weights move into what reads through them
        for structure in structures:
            if isinstance(structure, Stream):
                self._secrets[structure.name] = self._draw_stream(structure)
            elif isinstance(structure, Features):
                self._secrets[structure.name] = self._draw_order(structure.size)
            elif isinstance(structure, Gated):
                self._draw_gated(structure)
            else:
                self._draw_heads(structure)

    def act(self, name: str, tensor: torch.Tensor, axes: tuple[Axis, ...], read: Read) -> torch.Tensor:
        folded = fold(tensor, axes, read, self._folding.__contains__)
        if isinstance(axes[0], Gain) and axes[0].space in self._folding:
            return folded  # ones, in any basis
        return act_on_axes(name, folded, axes, self._secrets)

    def folded(self, axes: tuple[Axis, ...]) -> After | None:
        return next((axis for axis in axes if isinstance(axis, After) and axis.space in self._folding), None)

    def turns(self, space: str) -> bool:
        return isinstance(self._secrets[space], Blocks)

    def unmoved(self, axes: tuple[Axis, ...]) -> str | None:
        return why_unmoved(axes, lambda space: _is_identity(self._secrets[space]))

    def user_key(self, key_id: str, *, head: Literal["cloud", "device"] = "cloud") -> UserKey:
        return key_of(key_id, self._for_devices, self._secrets, head)

    def _for_devices(self, space: str) -> Any:
        secret = self._secrets[space]
        if isinstance(secret, Blocks):
            return secret.matrices[0].astype(np.float32)
        assert isinstance(secret, Order)
        return secret.index

    # --- draws ---

    def _draw_stream(self, stream: Stream) -> Secret:
        if stream.norm == "post":
            return self._draw_order(stream.size)
        self._folding.add(stream.name)
        if stream.norm == "rms":
            basis = random_orthogonal(1, stream.size, self._random_bytes)
        else:
            basis = orthogonal_keeping_ones(stream.size, self._random_bytes)[None]
        return Blocks(np.zeros(1, np.int64), basis)

    def _draw_order(self, size: int) -> Order:
        return Order(random_permutation(size, self._random_bytes, moves=True))

    def _draw_gated(self, gated: Gated) -> None:
        order = self._draw_order(gated.size)
        sign = np.where(self._uniform(gated.size) < 0.5, -1.0, 1.0)
        factors = sign * self._factors(gated.size)
        self._secrets[gated.gate] = order
        self._secrets[gated.up] = Scaled(order, factors)
        self._secrets[gated.product] = Scaled(order, 1 / factors)

    def _draw_heads(self, heads: Heads) -> None:
        groups, dim = heads.key_value_heads, heads.dim
        group = heads.query_heads // groups
        order = random_permutation(groups, self._random_bytes, moves=True)
        members = np.stack([random_permutation(group, self._random_bytes, moves=groups == 1) for _ in range(groups)])
        query_order = (order[:, None] * group + members).reshape(-1)
        values = random_orthogonal(groups, dim, self._random_bytes)
        if heads.normed:
            query = key = np.broadcast_to(np.eye(dim), (groups, dim, dim)).copy()
        else:
            query, key = self._turns(groups, dim - heads.free, heads.free)
        self._secrets[heads.query] = Blocks(query_order, query.repeat(group, 0))
        self._secrets[heads.key] = Blocks(order, key)
        self._secrets[heads.value] = Blocks(order, values)
        self._secrets[heads.attended] = Blocks(query_order, values.repeat(group, 0))

    def _turns(self, heads: int, rotary: int, free: int) -> tuple[Matrix, Matrix]:
        """For query and key, matrices [heads, dim, dim] whose product with one another's transpose is the identity.

        The first `rotary` features turn by planes; the `free` ones behind them by any orthogonal matrix. Both are
        scaled in the query and back in the key.
        """
        query = np.zeros((heads, rotary + free, rotary + free))
        key = query.copy()
        if rotary:
            query[:, :rotary, :rotary], key[:, :rotary, :rotary] = self._planes(heads, rotary)
        if free:
            basis = random_orthogonal(heads, free, self._random_bytes)
            factor = self._factors(heads * free).reshape(heads, 1, free)
            query[:, rotary:, rotary:], key[:, rotary:, rotary:] = basis * factor, basis / factor
        return query, key

    def _planes(self, heads: int, dim: int) -> tuple[Matrix, Matrix]:
        """For query and key, matrices [heads, dim, dim] that turn the plane of features f and f + dim/2 and scale it.

        Turning commutes with rotary positions, which turn the same planes (RoFormer, arXiv 2104.09864).
        """
        half = dim // 2
        angle = 2 * np.pi * self._uniform(heads * half).reshape(heads, half)
        first, second = np.arange(half), np.arange(half) + half
        turn = np.zeros((heads, dim, dim))
        turn[:, first, first] = turn[:, second, second] = np.cos(angle)
        turn[:, first, second] = np.sin(angle)
        turn[:, second, first] = -np.sin(angle)
        factor = np.tile(self._factors(heads * half).reshape(heads, half), 2)[:, None, :]
        return turn * factor, turn / factor

    def _uniform(self, count: int) -> Matrix:
        return random_uniform(count, self._random_bytes)

    def _factors(self, count: int) -> Matrix:
        """Factors from 1/2 to 2, their logarithms uniform: enough to spoil comparisons, little for a float's range."""
        factors: Matrix = np.exp2(2 * self._uniform(count) - 1)
        return factors


def random_uniform(count: int, random_bytes: RandomBytes = os.urandom) -> Matrix:
    """Numbers between 0 and 1, never 0, of 53 random bits each."""
    bits = np.frombuffer(random_bytes(8 * count), np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) / 2.0**53


def random_orthogonal(count: int, size: int, random_bytes: RandomBytes = os.urandom) -> Matrix:
    """Orthogonal matrices [count, size, size], uniform over all (Mezzadri, arXiv math-ph/0609050)."""
    radius, angle = random_uniform(2 * count * size * size, random_bytes).reshape(2, count, size, size)
    normal = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)  # Box and Muller
    basis, triangle = np.linalg.qr(normal)
    unique: Matrix = basis * np.sign(np.diagonal(triangle, axis1=-2, axis2=-1))[:, None, :]
    return unique


def orthogonal_keeping_ones(size: int, random_bytes: RandomBytes = os.urandom) -> Matrix:
    """A random orthogonal matrix that maps the vector of ones to itself, so that means and variances survive it."""
    mirror = np.eye(size)
    normal = np.full(size, size**-0.5)
    normal[0] -= 1.0
    if size > 1:
        mirror -= 2 * np.outer(normal, normal) / (normal @ normal)  # Householder: first axis ↔ ones
    inner = np.eye(size)
    if size > 1:
        inner[1:, 1:] = random_orthogonal(1, size - 1, random_bytes)[0]
    kept: Matrix = mirror @ inner @ mirror
    return kept


def _is_identity(secret: Secret) -> bool:
    if isinstance(secret, Order):
        return bool((np.diff(secret.index) == 1).all())
    if isinstance(secret, Blocks):
        return bool((np.diff(secret.order) == 1).all() and (secret.matrices == np.eye(secret.matrices.shape[-1])).all())
    return False
