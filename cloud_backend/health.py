"""Whether the server works, and whether it takes new sessions: what supervisors and load balancers ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cloud_backend.scheduler import Scheduler

STUCK_SECONDS = 60.0  # a step takes less on any machine that is of use


class Health:
    """The state of one server. Each question is answered by what is wrong, or None.

    loading, draining: whether models are not all loaded yet, and whether the server is to stop.
    engines: the task that runs the scheduler.
    """

    def __init__(self, scheduler: Scheduler, sessions: Callable[[], int], max_sessions: int) -> None:
        self.loading = False
        self.draining = False
        self.engines: asyncio.Task[None] | None = None
        self.stuck_seconds = STUCK_SECONDS
        self._scheduler = scheduler
        self._sessions = sessions
        self._max_sessions = max_sessions

    def broken(self) -> str | None:
        """Why the server is of no use to anyone, if it is not; more time or a restart may mend it."""
        if self.loading:
            return "loading models"
        if self.engines is None or self.engines.done():
            return "the engines ended"
        began = self._scheduler.step_began
        if began is not None and (seconds := time.perf_counter() - began) > self.stuck_seconds:
            return f"a step has run for {seconds:.0f} s"
        return None

    def closed(self) -> str | None:
        """Why nobody is let in, if so."""
        if self.loading:
            return "loading models"
        return "draining" if self.draining else None

    def unready(self) -> str | None:
        """Why a new session would not be served, if so."""
        if (reason := self.broken() or self.closed()) is not None:
            return reason
        sessions = self._sessions()
        return f"{sessions} sessions are open, the most" if sessions >= self._max_sessions else None
