"""How far to draft: as far as a further token is likely enough to be worth what it costs.

Over many round trips, the most tokens a second come from drafting on as long as the chance that the draft is right up
to there is at least (tokens a second) × (seconds that one more row takes). So a slow line drafts far, a busy cloud or
a thin line less far. All that is learned from the round trips themselves; there is no clock in here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MEMORY = 32.0  # round trips after which older ones count half
PROBE = 32  # round trips without a draft after which one token is tried, whatever it costs
OUTLIER = 2.0  # times what was expected: more is taken for this much, as one stall says little of the next
ROWS_KNOWN = 8.0  # a slope of 0 is believed as firmly as this spread of rows² would make it
LINE_ROWS_KNOWN = 64.0  # of the line, whose times scatter more than the cloud's


class Pace:
    """The length of drafts, from how round trips went."""

    def __init__(self, most: int, bytes_a_token: int | None = None) -> None:
        """most: tokens drafted at once. bytes_a_token: up and down, smoothed, over which nothing is drafted."""
        self._most = most
        self._bytes_a_token = bytes_a_token
        self._cloud, self._line = _Slope(ROWS_KNOWN), _Slope(LINE_ROWS_KNOWN)
        self._tokens = self._seconds = self._bytes = 0.0  # sums in which older round trips count less
        self._plain = 0  # round trips since the last draft

    @property
    def round_trip_seconds(self) -> float | None:
        """A round trip's time on the line, smoothed, without the cloud's own; None before the first."""
        return self._line.seconds if self._line.weight else None

    def length(self) -> int:
        """How many tokens to draft at most; 0 while drafts took more bytes than they may, and where that tells most."""
        allowed = self._bytes_a_token
        if allowed is not None and self._bytes > allowed * self._tokens:
            return 0
        # Drafts that are always as long say nothing of what a row costs: now and then there is none.
        alike = self._cloud.weight >= 2 and self._cloud.spread < 2 * ROWS_KNOWN
        if alike and not self._plain:
            return 0
        return min(1, self._most) if self._plain >= PROBE else self._most

    def least(self) -> float:
        """The chance of being right that makes one more drafted token worth its time."""
        if not self._seconds or self._plain >= PROBE:
            return 0.0
        row_seconds = max(0.0, self._cloud.slope) + max(0.0, self._line.slope)
        return self._tokens / self._seconds * row_seconds

    def saw(self, *, drafted: int, accepted: int, seconds: float, cloud_seconds: float, size: int) -> None:
        """Takes in a round trip without a prompt: tokens, seconds on the clock and in the cloud, bytes both ways."""
        rows = drafted + 1
        self._cloud.saw(rows, cloud_seconds)
        self._line.saw(rows, max(0.0, seconds - cloud_seconds))
        self._plain = 0 if drafted else self._plain + 1
        keep = 0.5 ** (1 / MEMORY)
        self._tokens = keep * self._tokens + accepted + 1
        self._seconds = keep * self._seconds + seconds
        self._bytes = keep * self._bytes + size


@dataclass
class _Slope:
    """Seconds a row, by least squares of seconds on rows; drawn to 0 until rows of many numbers were seen."""

    known: float  # how firmly 0 is believed beforehand, in rows²; forgotten like all else
    weight: float = 0.0
    rows: float = 0.0  # means
    seconds: float = 0.0
    spread: float = 0.0  # weighted sums of rows² and of rows × seconds, about the means
    together: float = field(default=0.0)

    @property
    def slope(self) -> float:
        return self.together / (self.spread + self.known)

    def saw(self, rows: int, seconds: float) -> None:
        if self.weight >= 4:
            seconds = min(seconds, OUTLIER * max(0.0, self.seconds + self.slope * (rows - self.rows)))
        keep = 0.5 ** (1 / MEMORY)
        self.weight, self.known = keep * self.weight + 1, max(1.0, keep * self.known)
        self.spread, self.together = keep * self.spread, keep * self.together
        from_mean = rows - self.rows
        self.rows += from_mean / self.weight
        before, self.seconds = seconds - self.seconds, self.seconds + (seconds - self.seconds) / self.weight
        self.spread += from_mean * (rows - self.rows)
        self.together += before * (rows - self.rows)
