"""When tokens came, and what can be said of that: throughput, latencies, fairness.

All moments are those of the machine's monotonic clock, which its processes share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shared.errors import UsageError


@dataclass(frozen=True)
class Timeline:
    """One answer of one device. Moments in seconds."""

    device: int
    began: float  # when it was asked for
    moments: list[float]  # when each of its tokens came

    @property
    def first_token_seconds(self) -> float:
        """From the question to the first token."""
        return self.moments[0] - self.began

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """From each token to the next: the first token waits for the prompt and is left out."""
        return list(pairwise(self.moments))


@dataclass(frozen=True)
class Percentiles:
    """Of latencies, in milliseconds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Together:
    """What devices got while all of them ran: from the last one's first token to the first one's last."""

    seconds: float
    tokens: int
    tokens_per_second: float  # of all
    slowest: float  # tokens/s of the device that got the fewest
    fastest: float
    jain: float  # index of fairness: 1 where all get the same, 1/n where one gets all (Jain et al., DEC-TR-301, 1984)


def percentiles(seconds: Iterable[float]) -> Percentiles:
    """Of durations in seconds, at least one."""
    return Percentiles(*(1000 * float(value) for value in np.percentile(list(seconds), (50, 95, 99))))


def per_token(timelines: Iterable[Timeline]) -> list[float]:
    """Seconds from token to token, over all answers."""
    return [after - before for timeline in timelines for before, after in timeline.gaps]


def together(timelines: Sequence[Timeline]) -> Together:
    """What each device got while all ran. Raises UsageError where one had ended before another had begun."""
    moments: dict[int, list[float]] = {}
    for timeline in timelines:
        moments.setdefault(timeline.device, []).extend(timeline.moments)
    begin, end = max(map(min, moments.values())), min(map(max, moments.values()))
    if begin >= end:
        raise UsageError(
            f"devices: never did all {len(moments)} run at the same time",
            hint="let each make more tokens, or start them closer together",
        )
    counts = np.array([sum(begin < moment <= end for moment in own) for own in moments.values()])
    rates = counts / (end - begin)
    return Together(
        seconds=end - begin,
        tokens=int(counts.sum()),
        tokens_per_second=float(rates.sum()),
        slowest=float(rates.min()),
        fastest=float(rates.max()),
        jain=float(counts.sum() ** 2 / (len(counts) * (counts**2).sum())),
    )


def during(timelines: Iterable[Timeline], begin: float, end: float) -> list[float]:
    """Seconds of the gaps that have a part between these two moments."""
    return [
        after - before for timeline in timelines for before, after in timeline.gaps if after > begin and before < end
    ]


def outside(timelines: Sequence[Timeline], begin: float, end: float) -> list[float]:
    """Seconds of all other gaps, from when every device has its first token on."""
    running = max(timeline.moments[0] for timeline in timelines)
    return [
        after - before
        for timeline in timelines
        for before, after in timeline.gaps
        if before >= running and (after <= begin or before >= end)
    ]
