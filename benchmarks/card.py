"""The card that is measured on: its name, how fast its memory is, and how much of that is in use."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable

import torch

COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**28}  # far beyond any cache


class Card:
    """A GPU, or the processor in its place."""

    def __init__(self, device: str, fallback: str) -> None:
        """fallback: the name of what is no GPU."""
        self.device = device
        self.name = torch.cuda.get_device_name() if device == "cuda" else fallback
        self.peak_bytes = 0  # in use by all processes, as often as somebody looked; 0 where it is no GPU

    @property
    def slug(self) -> str:
        """Its name as part of a file's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def used(self) -> int:
        """Bytes of its memory that all processes use now, what their allocators keep included."""
        if self.device != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info()
        self.peak_bytes = max(self.peak_bytes, total - free)
        return total - free

    def wait(self) -> None:
        """Until all that was launched is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """The median time of `work`, after two runs that do not count."""
        taken = []
        for _ in range(times + 2):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[2:])

    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a large copy from its memory to its memory."""
        size = COPY_BYTES[self.device]
        here, there = (torch.ones(size // 4, device=self.device) for _ in range(2))
        return 2 * size / self.seconds(lambda: there.copy_(here), 9)

    def empty(self) -> None:
        """Gives back what this process's allocator keeps."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
