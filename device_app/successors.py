"""The bundle's table of each token's most likely successor, which the export asked the model for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.errors import BundleError

SUCCESSORS = "successors.npy"
SURE = 255  # a chance of 1


@dataclass(frozen=True)
class Successor:
    """A token's most likely next one, and its chance when the model has read that one token alone."""

    token: int
    chance: float


@dataclass(frozen=True, eq=False)
class Successors:
    """uint32 [n, 2]: the most likely next token of each of the first n ids, and its chance in 1/255."""

    rows: npt.NDArray[np.uint32]

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> Successors:
        """Raises BundleError for a file that is no such table of the model's ids."""
        hint = "export the bundle again"
        try:
            with path.open("rb") as file:
                rows = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BundleError(f"{path}: {error}", hint=hint) from None
        if rows.dtype != np.uint32 or rows.ndim != 2 or rows.shape[1] != 2:
            raise BundleError(f"{path}: seen {rows.dtype} {rows.shape}, wanted uint32 [ids, 2]", hint=hint)
        largest, surest = rows.max(axis=0, initial=0).tolist()
        if max(len(rows) - 1, largest) >= vocab_size or surest > SURE:
            raise BundleError(
                f"{path}: seen {len(rows)} ids, the id {largest} and the chance {surest}/{SURE}, wanted ids below "
                f"{vocab_size} and chances up to 1",
                hint=hint,
            )
        return cls(rows)

    def after(self, token: int) -> Successor | None:
        """What most likely follows, where the table knows the token."""
        if not 0 <= token < len(self.rows):
            return None
        following, chance = self.rows[token].tolist()
        return Successor(following, chance / SURE)


NO_SUCCESSORS = Successors(np.zeros((0, 2), np.uint32))
