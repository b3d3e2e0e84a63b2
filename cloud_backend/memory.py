"""What torch and the C library would keep of memory that nobody needs any more.

On a processor torch prepares a matrix product for each shape it meets and keeps the last thousand; every step of a busy
server has a shape of its own, and together they would come to gigabytes. Preparing anew takes next to nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import os

from cloud_backend.scheduler import Scheduler

PREPARED = 16  # matrix products that are kept: more than the shapes of one step
TRIM_SECONDS = 2.0


def bound_preparations() -> None:
    """Before torch computes for the first time. Whoever set these already knows better."""
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(PREPARED))


async def give_back(scheduler: Scheduler) -> None:
    """Until cancelled: between two steps, now and then, returns to the system what was freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    while trim is not None:
        await asyncio.sleep(TRIM_SECONDS)
        await scheduler.call(lambda: trim(0))
