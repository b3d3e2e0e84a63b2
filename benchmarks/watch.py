"""What a server takes while it serves: memory, processor time, connections, as Linux tells of it in /proc."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Sample:
    """A server at one moment."""

    moment: float  # of the monotonic clock
    memory: int  # bytes
    sockets: int


class Watch:
    """Looks at a process again and again until the block ends. The first look is at its making: the ready server.

    Memory is what the process itself took (RssAnon and RssShmem). Mapped files (RssFile) are left out: the checkpoint's
    weights are among them, are shared with the page cache, and become resident with the first forward.
    """

    def __init__(self, pid: int, every: float = 0.25) -> None:
        """every: seconds from one look to the next."""
        self._pid = pid
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self.samples = [self._sample()]

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @property
    def memory_now(self) -> int:
        """Bytes beyond those of the ready server."""
        return self._sample().memory - self.samples[0].memory

    @property
    def memory_peak(self) -> int:
        """The most bytes beyond those of the ready server that were seen."""
        return max(sample.memory for sample in self.samples) - self.samples[0].memory

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the process took up to now."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def between(self, begin: float, end: float) -> list[Sample]:
        """The looks between two moments."""
        return [sample for sample in self.samples if begin <= sample.moment <= end]

    def _look_on(self) -> None:
        while not self._over.wait(self._every):
            self.samples.append(self._sample())

    def _sample(self) -> Sample:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self._pid}/status").read_text().splitlines())
        memory = sum(1024 * int(status[field].split()[0]) for field in ("RssAnon", "RssShmem"))
        return Sample(time.monotonic(), memory, _sockets(self._pid))


def _sockets(pid: int) -> int:
    count = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += str(file.readlink()).startswith("socket:")
        except FileNotFoundError:  # closed meanwhile
            continue
    return count
