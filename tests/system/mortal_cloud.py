"""A server that can be killed and comes back."""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from tests.conftest import run_cloud_process
from tests.processes import eventually
from tests.system.watched_cloud import TASKS


class MortalCloud:
    """`stip-cloud serve` as a process that can be killed and comes back on the same port. A context manager."""

    def __init__(self, *arguments: str | Path, tasks: Path) -> None:
        """arguments: those of `serve`, but for the port. tasks: the file in which the process says how many it has."""
        self.lives: list[tuple[float, float]] = []  # when it was ready and when it was killed, each time
        self.url = ""
        self.port = 0
        self.pid = 0
        self._arguments = arguments
        self._tasks = tasks
        self._running = ExitStack()

    def __enter__(self) -> MortalCloud:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _start(self) -> None:
        process = run_cloud_process(
            *self._arguments,
            port=self.port,
            module="tests.system.watched_cloud",
            environment={TASKS: str(self._tasks)},
        )
        self.url, running = self._running.enter_context(process)
        self.port, self.pid = int(self.url.rpartition(":")[2]), running.pid
        self.lives.append((time.monotonic(), math.inf))

    def kill_and_restart(self) -> None:
        """SIGKILL: it loses all that it held, and says nothing to anyone."""
        self.lives[-1] = (self.lives[-1][0], time.monotonic())
        self._running.close()
        self._start()

    def tasks(self) -> int:
        """How many asyncio tasks it has."""
        self._tasks.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        assert eventually(self._tasks.exists, 10)
        return int(self._tasks.read_text())
