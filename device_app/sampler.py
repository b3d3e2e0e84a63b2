"""Chooses tokens, exactly as over the full vocabulary, though only the top rows of the logits arrive.

What is unseen is bounded: its values lie at or below the smallest value seen, and its mass is what log-sum-exp says
less the mass seen. Where the bounds do not settle the token, `choose` says so and the full row is fetched.

Order of filters: repetition penalty, temperature, top-k, top-p, min-p, as transformers has them. After sorting by
(descending value, ascending plain id) each of the last three keeps a prefix, so what is kept is a prefix too, and a
draw is the first token whose cumulative mass exceeds u times the mass kept.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

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
    arXiv 1909.05858). Raises UsageError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        warm = self.temperature
        for name, value, right, wanted in (
            # Below 0.01 the cloud's float32 may overflow, which would look like a lie.
            ("temperature", warm, warm == 0 or 0.01 <= warm <= 100, "0, or 0.01 to 100"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "0 to 2^64 - 1"),
        ):
            if not right:
                raise UsageError(f"{name}: seen {value}, wanted {wanted}")


@dataclass(frozen=True)
class Row:
    """Logits of one position, revealed: values [k] and plain ids [k], in any order; all of them where `full`.

    log_sum_exp: over the whole vocabulary of logits / temperature, for the sampling temperature (or 1 if greedy).
    """

    values: Array
    ids: Index
    log_sum_exp: float
    full: bool

    def head(self, k: int) -> Row:
        """The k greatest alone, as a cloud sends them: much less to sort, and they settle nearly every draw."""
        if k >= len(self.values):
            return self
        top = np.argpartition(self.values, -k)[-k:]
        return Row(self.values[top], self.ids[top], self.log_sum_exp, full=False)

    def without(self, ids: Iterable[int]) -> Row:
        """The same but for some ids. Log-sum-exp stays that of all."""
        kept = ~np.isin(self.ids, list(ids))
        return Row(self.values[kept], self.ids[kept], self.log_sum_exp, self.full)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of the token at `position` of the sequence: of these two alone, so that replays and
    drafts do not shift it (PROTOCOL.md, draws)."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / float(1 << 53)


class Sampler:
    """Chooses the tokens of one answer. Ids of the prompt count as seen for the repetition penalty; `banned` ones are
    never chosen."""

    def __init__(
        self, sampling: Sampling, vocab_size: int, prompt: Iterable[int] = (), banned: Iterable[int] = ()
    ) -> None:
        self._sampling = sampling
        self._banned = frozenset(banned)
        self._penalised = np.zeros(vocab_size, bool)
        if sampling.repetition_penalty != 1:
            self._penalised[[token for token in prompt if token >= 0]] = True  # below 0: images

    def observe(self, token: int) -> None:
        """Counts a chosen token as seen."""
        if self._sampling.repetition_penalty != 1:
            self._penalised[token] = True

    def choose(self, row: Row, position: int) -> int | None:
        """The token at `position`, or None if only the full row can tell. A full row always can."""
        if self._banned:
            if self._sampling.temperature and not row.full:
                return None  # the mass that log-sum-exp tells of is partly theirs
            row = row.without(self._banned)
            if not row.values.size:
                return None
        values = row.values.astype(np.float64)
        floor = -math.inf if row.full else float(values.min())
        adjusted, ceiling, unseen_penalised = values, floor, 0
        if self._sampling.repetition_penalty != 1:
            known = self._penalised[row.ids]
            adjusted = np.where(known, self._penalty(values), values)
            unseen_penalised = int(self._penalised.sum() - known.sum())
            if unseen_penalised and not row.full:
                ceiling = max(floor, float(self._penalty(np.array(floor))))
        if self._sampling.temperature == 0:
            best = adjusted.max()
            return int(row.ids[adjusted == best].min()) if best > ceiling else None
        return self._draw(
            row, values, adjusted, floor, ceiling, unseen_penalised, uniform(self._sampling.seed, position)
        )

    def _penalty(self, values: Array) -> Array:
        penalty = self._sampling.repetition_penalty
        penalised: Array = np.where(values > 0, values / penalty, values * penalty)
        return penalised

    def _draw(
        self,
        row: Row,
        values: Array,
        adjusted: Array,
        floor: float,
        ceiling: float,
        unseen_penalised: int,
        u: float,
    ) -> int | None:
        options, temperature = self._sampling, self._sampling.temperature
        order = np.lexsort((row.ids, -adjusted))
        logits = adjusted[order] / temperature
        top = logits[0]
        cumulative = np.cumsum(np.exp(logits - top))  # masses, relative to the top token's
        # Tokens above the ceiling are in their final places; below it unseen ones may come between.
        settled = len(logits) if row.full else int(np.searchsorted(-logits, -ceiling / temperature, side="left"))
        if settled == 0:
            return None
        sure = float(cumulative[settled - 1])
        most_unseen = math.exp(ceiling / temperature - top)  # mass of any one unseen token, at most
        low = high = float(cumulative[-1])
        if not row.full:
            raw = values / temperature
            if max(row.log_sum_exp, float(raw.max())) > top + 40:
                high = math.inf  # penalties took nearly all the mass: what the unseen weigh is lost in its rounding
            else:
                whole = math.exp(row.log_sum_exp - top)
                unseen = whole - float(np.exp(raw - top).sum())
                error = whole * (MASS_ERROR + STEPS * max(abs(row.log_sum_exp), float(np.abs(raw).max())))
                less, more = (unseen_penalised * math.exp(floor / temperature - top), unseen_penalised * most_unseen)
                low += max(0.0, unseen - error - (less if options.repetition_penalty > 1 else 0.0))
                high += max(0.0, unseen + error) + (more if options.repetition_penalty < 1 else 0.0)

        if options.top_k:
            if options.top_k <= settled:
                low = high = float(cumulative[options.top_k - 1])
            elif not row.full:
                low = sure
        kept_low, kept_high = low, high
        if options.top_p < 1:
            kept_low = self._nucleus(cumulative[:settled], options.top_p * low, 0.0)
            kept_high = min(high, self._nucleus(cumulative[:settled], options.top_p * high, most_unseen))
        if options.min_p > 0:
            cut = top + math.log(options.min_p)
            above = int(np.searchsorted(-logits[:settled], -cut, side="right"))
            if above < settled or row.full or cut > ceiling / temperature:
                mass = float(cumulative[above - 1])
                kept_low, kept_high = min(kept_low, mass), min(kept_high, mass)
            else:
                kept_low = min(kept_low, sure)
        first, last = (int(np.searchsorted(cumulative, u * kept, side="right")) for kept in (kept_low, kept_high))
        return int(row.ids[order[first]]) if first == last < settled else None

    @staticmethod
    def _nucleus(cumulative: Array, wanted: float, one_more: float) -> float:
        """Mass of the shortest prefix with at least `wanted`; beyond what is settled, `wanted` and `one_more` token."""
        if wanted > cumulative[-1]:
            return wanted + one_more
        return float(cumulative[np.searchsorted(cumulative, wanted, side="left")])
