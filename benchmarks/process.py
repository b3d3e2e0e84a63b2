"""Programs under measurement, as processes of their own."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import deque
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


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    address: str  # the last word of the line that says where it is listening
    pid: int
    log: deque[str]  # the last lines of its log, up to now


@contextmanager
def serving(command: Sequence[str | Path], *, log: str = "stdout") -> Iterator[Server]:
    """Starts a server, waits for the line of its `log` that says where it is listening, and ends it with the block.

    Raises RuntimeError with its last lines if it ends without one.
    """
    streams: dict[str, Any] = {log: subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **streams)
    stream, lines = getattr(process, log), deque[str](maxlen=50)
    try:
        for line in stream:
            lines.append(line)
            if "listening" in line:
                break
        else:
            raise RuntimeError(f"server: it ended before it was listening: {''.join(lines)}")
        # A server whose log nobody reads stops once the pipe is full.
        threading.Thread(target=lines.extend, args=(stream,), daemon=True).start()
        yield Server(line.split()[-1], process.pid, lines)
    finally:
        process.kill()
        process.wait()


@contextmanager
def listening(command: Sequence[str | Path], *, log: str = "stdout") -> Iterator[str]:
    """`serving`, where the address is all that is wanted."""
    with serving(command, log=log) as server:
        yield server.address
