"""`stip-cloud` as it is, that also says on SIGUSR1 how many asyncio tasks it has, in the file that TASKS names."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from cloud_backend.cli import main

TASKS = "STIP_TEST_TASKS"


def count_tasks(*_: object) -> None:
    """Runs in the thread of the event loop, wherever that is."""
    path = Path(os.environ[TASKS])
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(str(len(asyncio.all_tasks())))
    unfinished.rename(path)  # a reader never sees half of it


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, count_tasks)
    main()
