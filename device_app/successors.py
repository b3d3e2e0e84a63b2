"""The bundle's table of each token's most likely successor, which the export asked the model for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from shared.errors import BundleError

SUCCESSORS = "successors.safetensors"


@dataclass(frozen=True)
class Successor:
    """A token's most likely next one, and its chance when the model has read that one token alone."""

    token: int
    chance: float


@dataclass(frozen=True, eq=False)
class Successors:
    """next: uint32 [n], the most likely next token of each of the first n ids; chance: uint8 [n], in 1/255."""

    next: npt.NDArray[np.uint32]
    chance: npt.NDArray[np.uint8]

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> Successors:
        """Raises BundleError for a file that is no such table of the model's ids."""
        hint = "export the bundle again"
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise BundleError(f"{path}: {error}", hint=hint) from None
        seen = {name: (tensor.dtype.name, tensor.ndim) for name, tensor in tensors.items()}
        wanted = {"next": ("uint32", 1), "chance": ("uint8", 1)}
        if seen != wanted:
            raise BundleError(f"{path}: seen {seen}, wanted {wanted} (dtype, dimensions)", hint=hint)
        table = cls(tensors["next"], tensors["chance"])
        if len(table.next) != len(table.chance) or len(table.next) > vocab_size:
            raise BundleError(
                f"{path}: seen {len(table.next)} tokens and {len(table.chance)} chances, wanted as many of both, at "
                f"most {vocab_size}",
                hint=hint,
            )
        if len(table.next) and (largest := int(table.next.max())) >= vocab_size:
            raise BundleError(f"{path}: seen the id {largest}, wanted ids below {vocab_size}", hint=hint)
        return table

    def after(self, token: int) -> Successor | None:
        """What most likely follows, where the table knows the token."""
        if not 0 <= token < len(self.next):
            return None
        return Successor(int(self.next[token]), float(self.chance[token]) / 255)


NO_SUCCESSORS = Successors(np.zeros(0, np.uint32), np.zeros(0, np.uint8))
