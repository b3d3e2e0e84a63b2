"""What every scheme does. A scheme draws one secret for each space of a model and acts on the axes of its tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch

from export.spaces import After, Axis, Each, Fixed, Gain, Shift, of_each, spaces_of
from shared.errors import FamilyError
from shared.key import Index, UserKey
from shared.wire import Array

RandomBytes = Callable[[int], bytes]
Head = Literal["cloud", "device"]  # where the classifier runs
Read = Callable[[str], torch.Tensor]  # a tensor of the original, by name
SchemeName = Literal["permutation", "rotation"]
EXACT_BITS = 62  # up to here orders are counted exactly; of more, one less is no difference


class Secret(Protocol):
    """The secret of one space."""

    @property
    def size(self) -> int:
        """Features in the space."""

    def act(self, tensor: torch.Tensor, dimension: int) -> torch.Tensor:
        """`tensor` with its axis `dimension` in the secret coordinates."""


class Scheme(Protocol):
    """One protection, drawn for one model."""

    name: SchemeName
    log2_keys: float | None  # log₂ of the number of keys the draws choose from; None where they cannot be counted
    moves_only: bool  # values change places and none is computed, so that no dtype rounds any

    def act(self, name: str, tensor: torch.Tensor, axes: tuple[Axis, ...], read: Read) -> torch.Tensor:
        """`tensor` in the secret coordinates of its axes. `read` gives other tensors of the original, such as the gain
        of the norm before it. Raises FamilyError where a shape does not fit its spaces."""

    def folded(self, axes: tuple[Axis, ...]) -> After | None:
        """The axis whose norm's weight `act` takes out of the norm and puts into a tensor with these axes, if any."""

    def turns(self, space: str) -> bool:
        """Whether the features of a space become mixtures of one another, rather than change places."""

    def unmoved(self, axes: tuple[Axis, ...]) -> str | None:
        """Why a tensor with these axes is stored as it was, or None if it is not."""

    def user_key(self, key_id: str, *, head: Literal["cloud", "device"] = "cloud") -> UserKey:
        """What a device needs; the rest stays with the developer and is not stored at all."""


def act_on_axes(name: str, tensor: torch.Tensor, axes: tuple[Axis, ...], secrets: Mapping[str, Secret]) -> torch.Tensor:
    """`tensor` with every axis that may move in the coordinates of its spaces. Raises FamilyError for a shape that
    does not fit them."""
    if tensor.ndim != len(axes):
        raise FamilyError(f"tensor {name!r}: seen {tensor.ndim} axes, wanted {len(axes)}")
    if isinstance(axes[0], Each):
        stack = secrets[axes[0].space]
        _check_size(name, tensor, 0, stack.size, axes[0].space)
        one_by_one = zip(tensor, of_each(axes, len(tensor)), strict=True)
        return stack.act(torch.stack([act_on_axes(name, part, rest, secrets) for part, rest in one_by_one]), 0)
    for dimension, axis in enumerate(axes):
        spaces = spaces_of(axis)
        if not spaces:
            continue
        sizes = [secrets[space].size for space in spaces]
        _check_size(name, tensor, dimension, sum(sizes), " + ".join(spaces))
        parts = torch.split(tensor, sizes, dimension)
        moved = [secrets[space].act(part, dimension) for space, part in zip(spaces, parts, strict=True)]
        tensor = moved[0] if len(moved) == 1 else torch.cat(moved, dimension)
    return tensor


def _check_size(name: str, tensor: torch.Tensor, dimension: int, size: int, space: str) -> None:
    if tensor.shape[dimension] != size:
        raise FamilyError(
            f"tensor {name!r}: seen {tensor.shape[dimension]} on axis {dimension}, wanted {size} ({space})"
        )


def fold(tensor: torch.Tensor, axes: tuple[Axis, ...], read: Read, folds: Callable[[str], bool]) -> torch.Tensor:
    """`tensor` in float32 with norms' weights where `folds` says so of their space: in what reads through the norm,
    and out of the norm. A norm's bias is divided by the weight, so that the reader gives it back.

    Raises FamilyError where a weight of 0 meets a bias.
    """
    tensor = tensor.float()
    for dimension, axis in enumerate(axes):
        if isinstance(axis, Gain) and folds(axis.space):
            return torch.full_like(tensor, 1 - axis.offset)
        if isinstance(axis, Shift) and folds(axis.space):
            gain = read(axis.gain).double()
            if not gain.all():
                raise FamilyError(
                    f"tensor {axis.gain!r}: a norm's weight of 0 cannot be folded, as its bias would be lost",
                    hint="--scheme permutation",
                )
            return (tensor.double() / gain).float()
        if isinstance(axis, After) and folds(axis.space):
            shape = [1] * tensor.ndim
            shape[dimension] = -1
            tensor = tensor * (read(axis.gain).float() + axis.offset).view(shape)
    return tensor


def why_unmoved(axes: tuple[Axis, ...], stays: Callable[[str], bool]) -> str | None:
    """The reasons of axes that are all where they were (`stays` says so of a space), or None if one is not."""
    if isinstance(axes[0], Each):
        return None  # many draws, none of which may leave everything where it was
    reasons = []
    for axis in axes:
        spaces = spaces_of(axis)
        if isinstance(axis, Fixed):
            reasons.append(axis.reason)
        elif all(map(stays, spaces)):
            reasons += [f"{space} moves by whole heads or features alone, and there is one of them" for space in spaces]
        else:
            return None
    return "; ".join(reasons)


def key_of(key_id: str, secret: Callable[[str], Array], secrets: Mapping[str, Secret], head: Head) -> UserKey:
    """The user key of drawn secrets; `secret` gives one as devices need it."""
    logits = next((space for space in ("vocab", "classes") if space in secrets), None)
    return UserKey(
        key_id,
        secret("residual"),
        secret(logits) if logits and head == "cloud" else None,
        secret("encoder") if "encoder" in secrets else None,
    )


def random_permutation(
    size: int, random_bytes: RandomBytes = os.urandom, *, levels: tuple[int, ...] = (), moves: bool = False
) -> Index:
    """A uniformly random order of `size` things: sorts random 64-bit keys, and draws again should two be equal.

    levels: sizes of nested blocks, the largest first, each a divisor of the one before: whole blocks change places,
        and within each of them the next smaller ones, so that every block stays together.
    moves: draw among the orders that leave not everything where it was, where there is another.
    """
    while True:
        order = np.zeros(1, np.int64)
        for parts in _parts(size, levels):
            inside = _random_orders(len(order), parts, random_bytes)
            order = (order[:, None] * parts + inside).reshape(-1)
        if not (moves and size > 1 and bool((np.diff(order) == 1).all())):
            return order


def log2_orders(size: int, levels: tuple[int, ...] = (), *, moves: bool = False) -> float:
    """log₂ of the number of orders that `random_permutation` draws among."""
    orders, exact, blocks = 0.0, 1, 1
    for parts in _parts(size, levels):
        orders += blocks * math.lgamma(parts + 1) / math.log(2)
        if orders < EXACT_BITS:
            exact *= math.factorial(parts) ** blocks
        blocks *= parts
    if moves and size > 1 and orders < EXACT_BITS:
        return math.log2(exact - 1)
    return orders


def _parts(size: int, levels: tuple[int, ...]) -> list[int]:
    """How many parts each block of a level has, from the whole down to single things."""
    sizes = (size, *levels, 1)
    assert all(larger % smaller == 0 for larger, smaller in pairwise(sizes)), sizes
    return [larger // smaller for larger, smaller in pairwise(sizes)]


def _random_orders(count: int, size: int, random_bytes: RandomBytes) -> Index:
    """Independent orders [count, size]."""
    while True:
        keys = np.frombuffer(random_bytes(8 * count * size), np.uint64).reshape(count, size)
        order = np.argsort(keys)
        if np.all(np.diff(np.take_along_axis(keys, order, 1)) > 0):
            return order.astype(np.int64)
