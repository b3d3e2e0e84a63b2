"""Programs under measurement, as processes of their own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """What a finished process printed and took."""

    stdout: str
    seconds: float
    peak_bytes: int  # largest resident set, files it mapped included


def run(command: Sequence[str | Path]) -> Run:
    """Runs a command to its end. Raises CalledProcessError if it fails.

    The peak counts from this process's own size on (Linux hands it down), so callers stay small before they call.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    stdout = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return Run(stdout, time.monotonic() - started, usage.ru_maxrss * 1024)


@contextmanager
def listening(command: Sequence[str | Path], *, log: str = "stdout") -> Iterator[str]:
    """Starts a server and gives the last word of the line of its `log` that says where it is listening.

    Raises RuntimeError with what it said if it ends before.
    """
    streams: dict[str, Any] = {log: subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **streams)
    try:
        said: list[str] = []
        for line in getattr(process, log):
            said.append(line)
            if "listening" in line:
                break
        else:
            raise RuntimeError(f"the server ended with status {process.wait()}:\n{''.join(said)}")
        yield said[-1].split()[-1]
    finally:
        process.kill()
        process.wait()
