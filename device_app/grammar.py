"""Answers of a form that is given beforehand, JSON of a schema for one: which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """What one answer must be. It follows the answer token by token."""

    def allowed(self) -> NDArray[np.bool_]:
        """The ids that may come next [vocab_size], the end ids among them where the answer may end."""

    def advance(self, token: int) -> None:
        """Goes on by a token that was chosen, which must be an allowed one."""

    def accepts(self, ids: Sequence[int]) -> int:
        """How many of `ids` may follow from here, one after the other. Changes nothing."""

    def forced(self, most: int) -> list[int]:
        """Ids, at most `most`, of which each is the only one that may come: drafts that are never rejected."""
