"""Chooses tokens, exactly as over the full vocabulary, though only the top rows of the logits arrive.

What is unseen is bounded: its values lie at or below the smallest value seen, and its mass is what log-sum-exp says
less the mass seen. Where the bounds do not settle the token, `choose` says so and the full row is fetched.

Order: adjustments of the logits (adjustments.py), temperature, top-k, top-p, min-p, as transformers has them. After
sorting by (descending value, ascending plain id) each of the last three keeps a prefix, so what is kept is a prefix
too, and a draw is the first token whose cumulative mass exceeds u times the mass kept.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from device_app.adjustments import Adjustments, Allowed, Unseen
from shared.errors import UsageError
from shared.key import Index
from shared.wire import Array

# Log-sum-exp is computed and sent in float32. Of the mass it is right to about 1e-5, and to a few float32 steps of the
# largest number in it (the steps of logits / temperature, and of the log-sum-exp, are shares of the mass).
MASS_ERROR, STEPS = 1e-5, 2.0**-21


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    repetition_penalty divides positive and multiplies negative logits of ids in the prompt or answer (CTRL,
    arXiv 1909.05858). As in OpenAI's API, frequency_penalty is subtracted once for each time that an id is in the
    answer, presence_penalty once if it is, and logit_bias (plain id → number) is added. Raises UsageError for values
    out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int = 0

    def __post_init__(self) -> None:
        warm = self.temperature
        biases = np.abs([0.0, *self.logit_bias.values()])
        most_bias = float(biases.max())  # NaN if any is
        for name, value, right, wanted in (
            # Below 0.01 the cloud's float32 may overflow, which would look like a lie.
            ("temperature", warm, warm == 0 or 0.01 <= warm <= 100, "0, or 0.01 to 100"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 100, "-100 to 100"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 100, "-100 to 100"),
            ("logit_bias", most_bias, most_bias <= 100, "-100 to 100"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "0 to 2^64 - 1"),
        ):
            if not right:
                raise UsageError(f"{name}: seen {value}, wanted {wanted}")


@dataclass(frozen=True)
class Row:
    """Logits of one position, revealed: values [k] and plain ids [k], in any order; all of them where `full`.

    log_sum_exp: over the whole vocabulary of logits / temperature, for the sampling temperature (or 1 if greedy);
    log_sum_exp_at_one: of the logits themselves.
    """

    values: Array
    ids: Index
    log_sum_exp: float
    log_sum_exp_at_one: float
    full: bool

    def head(self, k: int) -> Row:
        """The k greatest alone, as a cloud sends them: much less to sort, and they settle nearly every draw."""
        if k >= len(self.values):
            return self
        top = np.argpartition(self.values, -k)[-k:]
        return Row(self.values[top], self.ids[top], self.log_sum_exp, self.log_sum_exp_at_one, full=False)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of the token at `position` of the sequence: of these two alone, so that replays and
    drafts do not shift it (PROTOCOL.md, draws)."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / float(1 << 53)


class Sampler:
    """Chooses the tokens of one answer. Ids of the prompt count as seen for the repetition penalty; `banned` ones are
    never chosen. Raises UsageError where a bias is for no id of the vocabulary."""

    def __init__(
        self, sampling: Sampling, vocab_size: int, prompt: Iterable[int] = (), banned: Iterable[int] = ()
    ) -> None:
        self._sampling = sampling
        self._adjustments = Adjustments(
            vocab_size,
            prompt=prompt,
            banned=banned,
            bias=sampling.logit_bias,
            repetition=sampling.repetition_penalty,
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
        )

    def observe(self, token: int) -> None:
        """Counts a chosen token as seen."""
        self._adjustments.observe(token)

    def choose(self, row: Row, position: int, allowed: Allowed | None = None) -> int | None:
        """The token at `position`, or None if only the full row can tell. A full row always can, unless nothing is left
        to choose. allowed [vocab_size]: ids that may be chosen, where not all may."""
        choosable = self._adjustments.choosable(allowed)
        ids, values = row.ids, row.values
        if choosable is not None:
            if np.count_nonzero(choosable) == 1:
                return int(choosable.argmax())
            left = choosable[ids]
            ids, values = ids[left], values[left]
        if row.full:
            floor, unseen = -math.inf, Unseen()
        else:
            floor = float(row.values.min())
            unseen = self._adjustments.unseen(row.ids, floor, choosable)
        if not ids.size:
            return None
        adjusted = self._adjustments.adjusted(values, ids)
        ceiling = unseen.ceiling(floor)
        if self._sampling.temperature == 0:
            best = adjusted.max()
            return int(ids[adjusted == best].min()) if best > ceiling else None
        return self._draw(row, ids, adjusted, floor, unseen, uniform(self._sampling.seed, position))

    def _draw(self, row: Row, ids: Index, adjusted: Array, floor: float, unseen: Unseen, u: float) -> int | None:
        """adjusted [n]: values of those `ids` [n] of the row that can be chosen."""
        options, temperature = self._sampling, self._sampling.temperature
        order = np.lexsort((ids, -adjusted))
        logits = adjusted[order] / temperature
        top, ceiling = float(logits[0]), unseen.ceiling(floor) / temperature
        cumulative = np.cumsum(np.exp(logits - top))  # masses, relative to the top token's
        # Tokens above the ceiling are in their final places; below it unseen ones may come between.
        settled = int(np.searchsorted(-logits, -ceiling, side="left"))
        if settled == 0:
            return None
        sure, all_seen = float(cumulative[settled - 1]), ceiling == -math.inf
        most_unseen = math.exp(ceiling - top)  # mass of any one unseen token, at most
        low, high = (float(cumulative[-1]) + bound for bound in self._unseen_mass(row, floor, unseen, top))

        if options.top_k:
            if options.top_k <= settled:
                low = high = float(cumulative[options.top_k - 1])
            elif not all_seen:
                low = sure
        kept_low, kept_high = low, high
        if options.top_p < 1:
            kept_low = self._nucleus(cumulative[:settled], options.top_p * low, 0.0)
            kept_high = min(high, self._nucleus(cumulative[:settled], options.top_p * high, most_unseen))
        if options.min_p > 0:
            cut = top + math.log(options.min_p)
            above = int(np.searchsorted(-logits[:settled], -cut, side="right"))
            if above < settled or cut > ceiling:
                mass = float(cumulative[above - 1])
                kept_low, kept_high = min(kept_low, mass), min(kept_high, mass)
            else:
                kept_low = min(kept_low, sure)
        first, last = (int(np.searchsorted(cumulative, u * kept, side="right")) for kept in (kept_low, kept_high))
        return int(ids[order[first]]) if first == last < settled else None

    def _unseen_mass(self, row: Row, floor: float, unseen: Unseen, top: float) -> tuple[float, float]:
        """What the unseen weigh at least and at most, where the value `top` weighs 1.

        Two bounds hold, and the smaller one counts: each weighs what its value can be, and all together weigh what
        log-sum-exp leaves, but for those that the adjustments raise, lower, or take out.
        """
        if unseen.ceiling(floor) == -math.inf:
            return 0.0, 0.0
        temperature = self._sampling.temperature
        # Not more than the top token's, where any is plain; else it may be any number.
        one = math.exp(min(floor / temperature - top, 700.0))
        risen = float(np.exp(unseen.rising / temperature - top).sum())
        most = unseen.plain * one + float(np.exp(unseen.tops / temperature - top).sum())
        raw = row.values.astype(np.float64) / temperature
        if max(row.log_sum_exp, float(raw.max())) > top + 40:
            return 0.0, most  # adjustments took nearly all the mass: what the unseen weigh is lost in its rounding
        whole = math.exp(row.log_sum_exp - top)
        left = whole - float(np.exp(raw - top).sum())
        error = whole * (MASS_ERROR + STEPS * max(abs(row.log_sum_exp), float(np.abs(raw).max())))
        high = min(most, max(0.0, left + error) + risen)
        return min(high, max(0.0, left - error - unseen.falling * one)), high

    @staticmethod
    def _nucleus(cumulative: Array, wanted: float, one_more: float) -> float:
        """Mass of the shortest prefix with at least `wanted`; beyond what is settled, `wanted` and `one_more` token."""
        if wanted > cumulative[-1]:
            return wanted + one_more
        return float(cumulative[np.searchsorted(cumulative, wanted, side="left")])
