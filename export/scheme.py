"""What every scheme does. A scheme draws one secret for each space of a model and acts on the axes of its tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import numpy as np
import torch

from export.families import After, Axis, Fixed, Structure, space_of
from shared.errors import FamilyError
from shared.key import Index, UserKey

RandomBytes = Callable[[int], bytes]
Head = Literal["cloud", "device"]  # where the classifier runs
Read = Callable[[str], torch.Tensor]  # a tensor of the original, by name
SchemeName = Literal["permutation", "rotation"]


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

    def folded(self, axes: tuple[Axis, ...]) -> str | None:
        """The norm's weight that `act` takes out of the norm and puts into a tensor with these axes, if it does so."""

    def unmoved(self, axes: tuple[Axis, ...]) -> str | None:
        """Why a tensor with these axes is stored as it was, or None if it is not."""

    def user_key(self, key_id: str, *, head: Literal["cloud", "device"] = "cloud") -> UserKey:
        """What a device needs; the rest stays with the developer and is not stored at all."""


def draw(name: SchemeName, structures: Iterable[Structure], random_bytes: RandomBytes = os.urandom) -> Scheme:
    """The scheme `name` with fresh secrets for every space in `structures`."""
    from export.permutation import Permutation
    from export.rotation import Rotation

    kinds: dict[SchemeName, type[Permutation] | type[Rotation]] = {"permutation": Permutation, "rotation": Rotation}
    return kinds[name](structures, random_bytes)


def act_on_axes(name: str, tensor: torch.Tensor, axes: tuple[Axis, ...], secrets: dict[str, Secret]) -> torch.Tensor:
    """`tensor` with every axis that may move in the coordinates of its space."""
    if tensor.ndim != len(axes):
        raise FamilyError(f"tensor {name!r}: seen {tensor.ndim} axes, wanted {len(axes)}")
    for dimension, axis in enumerate(axes):
        if (space := space_of(axis)) is None:
            continue
        secret = secrets[space]
        if tensor.shape[dimension] != secret.size:
            raise FamilyError(
                f"tensor {name!r}: seen {tensor.shape[dimension]} on axis {dimension}, wanted {secret.size} ({space})"
            )
        tensor = secret.act(tensor, dimension)
    return tensor


def fold(tensor: torch.Tensor, axes: tuple[Axis, ...], read: Read) -> torch.Tensor:
    """`tensor` in float32 with the gain of the norm that it reads through multiplied in."""
    tensor = tensor.float()
    for dimension, axis in enumerate(axes):
        if isinstance(axis, After):
            shape = [1] * tensor.ndim
            shape[dimension] = -1
            tensor = tensor * read(axis.gain).float().view(shape)
    return tensor


def why_unmoved(axes: tuple[Axis, ...], stays: Callable[[str], bool]) -> str | None:
    """The reasons of axes that are all where they were (`stays` says so of a space), or None if one is not."""
    reasons = []
    for axis in axes:
        space = space_of(axis)
        if isinstance(axis, Fixed):
            reasons.append(axis.reason)
        elif space is not None and stays(space):
            reasons.append(f"{space} moves by whole heads alone, and the draw left their order as it was")
        else:
            return None
    return "; ".join(reasons)


def random_permutation(size: int, random_bytes: RandomBytes = os.urandom) -> Index:
    """A uniformly random order of `size` things: sorts random 64-bit keys, and draws again should two be equal."""
    while True:
        keys = np.frombuffer(random_bytes(8 * size), np.uint64)
        order = np.argsort(keys)
        if np.all(np.diff(keys[order]) > 0):
            return order.astype(np.int64)
