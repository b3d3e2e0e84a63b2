"""Token after token: asks for logits, chooses, drafts what may follow, and goes on from what is sure.

A draft is verified in the round trip that the next token takes anyway: its tokens are appended behind it, and the
cloud gives a row for each. The sampler then chooses at every position as it would have without the draft; as long as
it chooses what was drafted, the following row is the right one (arXiv 2211.17192, with the draft taken for certain).
So drafts change how many tokens a round trip gives, never which.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from device_app.connection import Connection
from device_app.logprobs import TokenLogprobs, logprobs_of
from device_app.sampler import Row, Sampler, Sampling
from device_app.session import Session
from shared.errors import BundleError

if TYPE_CHECKING:
    from device_app.grammar import Constraint

TOP_K = 256  # rows asked for: 2 KiB a token in float32, and more than 90 % of the mass
TIES = 16  # more than the sampler keeps, so that ties at its edge are seen


class Drafter(Protocol):
    """Guesses what follows."""

    def draft(self, ids: Sequence[int], most: int, least: float = 0.0) -> list[int]:
        """At most `most` ids that may follow `ids`, while the chance that all up to there do is at least `least`."""


class DraftLength(Protocol):
    """Says how long drafts should be, from how they fared."""

    def length(self) -> int:
        """How many tokens to draft now, at most."""

    def least(self) -> float:
        """The chance of being right that a drafted token needs to be worth its time."""

    def saw(self, *, drafted: int, accepted: int, seconds: float, cloud_seconds: float, size: int) -> None:
        """Takes the figures of one round trip: seconds on the clock, of which in the cloud; bytes both ways."""


@dataclass(frozen=True)
class Chosen:
    """A token of an answer, with its log-probabilities where they were asked for."""

    id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class _RoundTrip:
    """The rows after some ids and after each token of a draft behind them, and what it took to get them."""

    rows: list[Row]
    seconds: float
    cloud_seconds: float
    size: int  # bytes both ways
    plain: bool  # nothing else went with it: no prompt, no replay


@dataclass(frozen=True)
class Decoding:
    """How the tokens of one answer are made."""

    connection: Connection[Session]
    sampler: Sampler
    sampling: Sampling
    source: list[int] | None = None
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    drafter: Drafter | None = None
    pace: DraftLength | None = None

    def tokens(self, prompt: Sequence[int], most: int) -> Iterator[Chosen]:
        """At most `most` tokens, fewer where the context ends. Raises CloudError."""
        opened, session = self.connection.open(), self.connection.session
        # All of a row, where the cloud does not give so many of it.
        wanted = max(TOP_K, self.sampling.top_k + TIES)
        top_k = wanted if wanted <= opened.max_top_k else 0
        ids = list(prompt)
        while most > 0 and len(ids) <= opened.context:
            room = min(most, opened.context - len(ids) + 1)
            if certain := self._certain(room):
                for token in certain:
                    most -= 1
                    yield Chosen(token, None)
                    self._take(token, ids)
                continue
            draft = self._draft(ids, min(room, session.most_rows(top_k)) - 1)
            trip = self._ask(ids, draft, top_k)
            session.counters.drafted += len(draft)
            accepted = 0
            for row, drafted in zip(trip.rows, [*draft, None], strict=True):
                chosen = self._choose(row, ids, wanted)
                if chosen.id == drafted:
                    accepted += 1
                    session.counters.accepted += 1
                most -= 1
                yield chosen
                self._take(chosen.id, ids)
                if chosen.id != drafted:
                    break
            if self.pace is not None and trip.plain:
                self.pace.saw(
                    drafted=len(draft),
                    accepted=accepted,
                    seconds=trip.seconds,
                    cloud_seconds=trip.cloud_seconds,
                    size=trip.size,
                )

    def _take(self, token: int, ids: list[int]) -> None:
        ids.append(token)
        self.sampler.observe(token)
        if self.constraint is not None:
            self.constraint.advance(token)

    def _certain(self, room: int) -> list[int]:
        """Tokens that the constraint leaves no choice of: no model is asked for them, unless how probable they were."""
        if self.constraint is None or self.top_logprobs is not None:
            return []
        with self.connection.session.counters.timed("draft"):
            return self.constraint.forced(room)

    def _draft(self, ids: list[int], room: int) -> list[int]:
        if self.drafter is None or self.pace is None or room < 1:
            return []
        length = min(self.pace.length(), room)
        if not length:
            return []
        least = self.pace.least()
        with self.connection.session.counters.timed("draft"):
            if self.constraint is None:
                return self.drafter.draft(ids, length, least)
            draft = self.constraint.forced(room) or self.drafter.draft(ids, length, least)
            return draft[: self.constraint.accepts(draft)]

    def _ask(self, ids: list[int], draft: list[int], top_k: int) -> _RoundTrip:
        counters = self.connection.session.counters
        before, began = dataclasses.replace(counters), time.perf_counter()
        rows = self.connection.rows(
            ids + draft,
            source=self.source,
            rows=len(draft) + 1,
            top_k=top_k,
            temperature=self.sampling.temperature or 1.0,
        )
        return _RoundTrip(
            rows,
            time.perf_counter() - began,
            (counters.queue_us + counters.compute_us - before.queue_us - before.compute_us) / 1e6,
            counters.bytes_up + counters.bytes_down - before.bytes_up - before.bytes_down,
            counters.vectors_up - before.vectors_up == len(rows) and counters.round_trips - before.round_trips == 1,
        )

    def _choose(self, row: Row, ids: list[int], wanted: int) -> Chosen:
        """The token behind `ids`, of the full row where nothing less settles it."""
        counters, position = self.connection.session.counters, len(ids)
        with counters.timed("sample"):
            allowed = None if self.constraint is None else self.constraint.allowed()
            # Greedy sorts nothing; a draw sorts a full row only where its head leaves the token open.
            token = self.sampler.choose(row.head(wanted) if self.sampling.temperature else row, position, allowed)
            if token is None and row.full:
                token = self.sampler.choose(row, position, allowed)
            logprobs = self._logprobs(row, token)
        if not row.full and (token is None or (self.top_logprobs is not None and logprobs is None)):
            counters.full_rows += 1
            [row] = self._ask(ids, [], 0).rows
            with counters.timed("sample"):
                token = self.sampler.choose(row, position, allowed)
                logprobs = self._logprobs(row, token)
        if token is None:  # a full row settles all else
            raise BundleError("banned_ids: they leave no token to choose", hint="export the bundle again")
        return Chosen(token, logprobs)

    def _logprobs(self, row: Row, token: int | None) -> TokenLogprobs | None:
        return None if token is None or self.top_logprobs is None else logprobs_of(row, token, self.top_logprobs)
