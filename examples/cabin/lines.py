"""What the program says: one JSON object a line, on stdout."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timezone
from typing import Any


class Lines:
    """Writes lines, for several threads, and counts them by what they tell of."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def say(self, counted: str, **fields: Any) -> None:
        """One line. counted: what it counts as, "described" say."""
        with self._lock:
            self.counts[counted] += 1
            print(json.dumps(fields, ensure_ascii=False), file=sys.stdout, flush=True)


class Link:
    """Tells of the line to the cloud: once when it is lost, with when something was last heard, and once it is back."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self.was_there = False  # ever
        self._heard = time.time()
        self._offline_since: float | None = None

    def heard(self, way: str, frame: bytes) -> None:
        """For `on_frame`: what comes down proves that the line is there."""
        if way != "down":
            return
        self.was_there = True
        self._heard = time.time()
        if self._offline_since is not None:
            seconds = round(self._heard - self._offline_since, 3)
            self._lines.say("online", state="online", time=moment(self._heard), offline_seconds=seconds)
            self._offline_since = None

    def lost(self, reason: str = "the connection was lost") -> None:
        """For `on_lost`, and where no connection could be made in the first place."""
        if self._offline_since is None:
            self._offline_since = self._heard
            self._lines.say("offline", state="offline", since=moment(self._heard), reason=reason)


def moment(seconds: float) -> str:
    """A time since the epoch in UTC, to the millisecond (RFC 3339)."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
