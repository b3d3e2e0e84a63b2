"""Drafts: what the next tokens may be, guessed on the device, so that one round trip can settle several.

A draft changes how fast an answer comes and never what it says: the cloud gives the logits after each drafted token,
and the device's own sampler decides whether it would have chosen it.

Tokens are guessed one by one, each from what then stands before it: from where the same tokens stood before, in this
conversation or an earlier one (prompt lookup, Saxena 2023), or from the bundle's table of each token's most likely
successor. How often guesses of each kind come true is learned as the answer grows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from device_app.decoding import Drafter
from device_app.held import common_prefix
from device_app.lookup import Lookup
from device_app.successors import NO_SUCCESSORS, Successors
from shared.errors import UsageError

if TYPE_CHECKING:
    from device_app.bundle import Bundle

WEIGHT = 8.0  # guesses that a chance known beforehand is worth
MEMORY = 64.0  # guesses after which older ones count half
# Chances of a token that followed the last 1, 2, … tokens before; of LONG the answer is copying. Measured on SmolLM2.
MATCHED = (0.14, 0.44, 0.64, 0.7, 0.72, 0.8, 0.8, 0.8, 0.85, 0.85, 0.9, 0.97)
LONG = len(MATCHED)


@dataclass(frozen=True)
class Drafting:
    """How an assistant drafts. Raises UsageError for values out of range."""

    most: int = 8  # tokens drafted at once; 0: none
    bytes_a_token: int | None = 32 * 1024  # up and down, smoothed over some answers' tokens; None: as many as pay

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 64:
            raise UsageError(f"most: seen {self.most}, wanted 0 to 64 drafted tokens")
        if self.bytes_a_token is not None and self.bytes_a_token < 1:
            raise UsageError(f"bytes_a_token: seen {self.bytes_a_token}, wanted 1 or more, or None")


NO_DRAFTS = Drafting(most=0)


@dataclass(frozen=True)
class _Guess:
    token: int
    kind: Hashable  # guesses of one kind come true equally often
    chance: float


class LearningDrafter:
    """Guesses by lookup or by table, whichever has the better chance; one for all answers of an assistant."""

    def __init__(self, successors: Successors = NO_SUCCESSORS) -> None:
        self._successors = successors
        self._lookup = Lookup(longest=LONG)
        self._chances = _Chances()
        self._ids: list[int] = []
        self._guesses: list[_Guess] = []  # what was guessed to follow self._ids

    def draft(self, ids: Sequence[int], most: int, least: float = 0.0) -> list[int]:
        """At most `most` tokens that may follow `ids`, while the chance that all up to there do is at least `least`.

        What follows earlier `ids` tells which guesses came true, whether they were sent or not.
        """
        self._observe(list(ids))
        self._guesses = []
        draft: list[int] = []
        chance = 1.0
        # One token more than is sent is guessed, so that chances are learned even while nothing pays.
        while guess := self._guess(draft):
            self._guesses.append(guess)
            chance *= guess.chance
            if len(draft) == most or chance < least:
                break
            draft.append(guess.token)
        return draft

    def _observe(self, ids: list[int]) -> None:
        """Takes in what was added to the sequence, or another sequence."""
        known = common_prefix(ids, self._ids)
        if known == len(self._ids):
            for guess, token in zip(self._guesses, ids[known:], strict=False):
                self._chances.saw(guess.kind, guess.token == token)
                if guess.token != token:
                    break
        self._lookup.take(ids, known)
        self._ids = ids

    def _guess(self, draft: list[int]) -> _Guess | None:
        before = [*self._ids[-LONG:], *draft][-LONG:]
        if not before:
            return None
        guesses = []
        if (found := self._lookup.find(before)) is not None:
            kind = "lookup", found.length
            guesses.append(_Guess(found.token, kind, self._chances.of(kind, MATCHED[found.length - 1])))
        if (next_one := self._successors.after(before[-1])) is not None:
            # A model that has read one token alone is surer than it should be.
            kind, beforehand = ("table", int(8 * next_one.chance)), 0.05 + 0.35 * next_one.chance
            guesses.append(_Guess(next_one.token, kind, self._chances.of(kind, beforehand)))
        return max(guesses, key=lambda guess: guess.chance, default=None)


class _Chances:
    """How often guesses of each kind come true: what is known beforehand, and what was seen, the latest most."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[float, float]] = {}  # by kind: came true, of

    def of(self, kind: Hashable, beforehand: float) -> float:
        true, of = self._seen.get(kind, (0.0, 0.0))
        return (true + WEIGHT * beforehand) / (of + WEIGHT)

    def saw(self, kind: Hashable, came_true: bool) -> None:
        true, of = self._seen.get(kind, (0.0, 0.0))
        keep = 0.5 ** (1 / MEMORY)
        self._seen[kind] = keep * true + came_true, keep * of + 1


def drafter_of(bundle: Bundle) -> Drafter:
    """Guesses as well as a bundle allows."""
    return LearningDrafter(bundle.successors)
