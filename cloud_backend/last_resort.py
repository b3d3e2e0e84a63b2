"""The end of a process that was told to stop and does not: a step may be stuck."""

from __future__ import annotations

import os
import threading

FAREWELL_SECONDS = 5.0  # of the drain, for devices to be told and the step that runs to end; at most half of it


def answering_seconds(drain_seconds: float) -> float:
    """How long requests may still be answered, so that the rest is done in time."""
    return max(drain_seconds - FAREWELL_SECONDS, drain_seconds / 2)


def last_resort(seconds: float, status: int) -> threading.Timer:
    """Ends the process after so many seconds, unless it is cancelled before.

    A step that is stuck would keep it, and the interpreter too would wait: its thread cannot be interrupted.
    """
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()
    return timer
