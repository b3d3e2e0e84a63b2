"""What is done to a model's logits before a token is chosen, and what that leaves open of ids that were not sent.

In this order: the repetition penalty, then what is added (bias) and subtracted (frequency and presence penalty); ids
that are banned, or that a grammar does not allow, cannot be chosen at all. Of an id that is not in a row one thing is
known: its logit lies at or below the row's smallest. `unseen` says what follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.errors import UsageError
from shared.key import Index
from shared.wire import Array

Allowed = NDArray[np.bool_]  # [vocab_size]

NONE: Array = np.zeros(0)


@dataclass(frozen=True)
class Unseen:
    """The ids that could be chosen and are not in a row, by what is done to their logits.

    plain: how many keep theirs. tops [touched]: what the logits of the others become, at most; `rising` are those
    of `tops` that may weigh more than the model gave them. falling: how many ids weigh less than the model gave them,
    or nothing, or may.
    """

    plain: int = 0
    falling: int = 0
    tops: Array = field(default_factory=lambda: NONE)
    rising: Array = field(default_factory=lambda: NONE)

    def ceiling(self, floor: float) -> float:
        """The largest value any of them can have; floor: the largest before adjustments. -inf where there are none."""
        return max(floor if self.plain else -np.inf, float(self.tops.max(initial=-np.inf)))


class Adjustments:
    """Those of one answer. Ids of the prompt count for the repetition penalty alone, those generated for all."""

    def __init__(
        self,
        vocab_size: int,
        *,
        prompt: Iterable[int] = (),
        banned: Iterable[int] = (),
        bias: Mapping[int, float] | None = None,
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
    ) -> None:
        """Raises UsageError where a bias is for no id of the vocabulary."""
        self._vocab_size = vocab_size
        self._repetition, self._frequency, self._presence = repetition, frequency, presence
        self._repeated = np.zeros(vocab_size, bool)
        self._bias = np.zeros(vocab_size)
        self._shift = self._bias  # the bias less the penalties
        self._counts = np.zeros(vocab_size, np.int64)
        self._choosable = np.ones(vocab_size, bool)
        self._choosable[list(banned)] = False
        self._bans = not self._choosable.all()
        if repetition != 1:
            self._repeated[[token for token in prompt if token >= 0]] = True  # below 0: images
        for token, added in (bias or {}).items():
            if not 0 <= token < vocab_size:
                raise UsageError(f"logit_bias: seen a token that is not in the vocabulary of {vocab_size}")
            self._bias[token] = added
        self._counting = frequency != 0 or presence != 0
        self._shifting = self._counting or bool(bias)
        if self._counting:
            self._shift = self._bias.copy()

    def observe(self, token: int) -> None:
        """Counts a chosen token."""
        if self._repetition != 1:
            self._repeated[token] = True
        if self._counting:
            self._counts[token] += 1
            self._shift[token] = self._bias[token] - self._presence - self._frequency * float(self._counts[token])

    def choosable(self, allowed: Allowed | None) -> Allowed | None:
        """Which ids [vocab_size] can be chosen; None if all can."""
        if allowed is None:
            return self._choosable if self._bans else None
        return self._choosable & allowed if self._bans else allowed

    def adjusted(self, values: Array, ids: Index) -> Array:
        """Values to choose by, of the logits `values` [n] of `ids` [n], in float64."""
        values = values.astype(np.float64)
        if self._repetition != 1:
            penalised = np.where(values > 0, values / self._repetition, values * self._repetition)
            values = np.where(self._repeated[ids], penalised, values)
        return values + self._shift[ids] if self._shifting else values

    def unseen(self, ids: Index, floor: float, choosable: Allowed | None) -> Unseen:
        """What there is beside a row's `ids`, of which `floor` is the smallest logit."""
        elsewhere = self._vocab_size - len(ids)
        could = elsewhere if choosable is None else int(choosable.sum() - choosable[ids].sum())
        if self._repetition == 1 and not self._shifting:
            return Unseen(could, elsewhere - could)
        touched = self._repeated | (self._shift != 0)
        if choosable is not None:
            touched &= choosable
        touched[ids] = False
        others = np.flatnonzero(touched)
        tops = self.adjusted(np.full(len(others), floor), others)
        # Both may be true of one: how it goes on below the floor depends on its logit.
        rises, falls = self._shift[others] > 0, self._shift[others] < 0
        if self._repetition < 1:
            rises |= self._repeated[others]
        elif self._repetition > 1:
            falls |= self._repeated[others]
        return Unseen(could - len(others), elsewhere - could + int(falls.sum()), tops, tops[rises])
