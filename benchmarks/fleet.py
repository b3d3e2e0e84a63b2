"""Many devices: a few processes of them (`device_process`), and what is measured over all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType

import msgspec

from benchmarks.device_process import Order, Report, Run, Stop, Wander

PROCESSES = 4  # more than cores, so that threads of one do not wait for each other; few, as each holds a bundle


class Fleet:
    """Devices 0, 1, 2 … in processes of their own, connected and warm, until the block ends."""

    def __init__(self, bundle: Path, url: str, devices: int, processes: int = PROCESSES) -> None:
        """bundle: OUT/device. url: of the cloud. Devices are dealt out to the processes in turn."""
        self._command = [sys.executable, "-m", "benchmarks.device_process", str(bundle), url]
        self._numbers = [[*range(first, devices, processes)] for first in range(min(processes, devices))]
        self._processes: list[subprocess.Popen[str]] = []
        self._busy: list[subprocess.Popen[str]] = []  # those that owe a report

    def __enter__(self) -> Fleet:
        try:
            for numbers in self._numbers:
                command = [*self._command, *map(str, numbers)]
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                )
            for process in self._processes:
                _expect(process, "ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def run(self, order: Run) -> Report:
        """Carries the order out to its end."""
        self.start(order)
        return self.finish()

    def start(self, order: Run) -> None:
        """Comes back once each of the order's devices has its first token."""
        wanted = set(order.devices)
        self._busy = [
            process for process, own in zip(self._processes, self._numbers, strict=True) if wanted.intersection(own)
        ]
        for process in self._busy:
            _send(process, order)
        for process in self._busy:
            _expect(process, "running")

    def stop(self) -> Report:
        """Ends the answers of `start`."""
        for process in self._busy:
            _send(process, Stop())
        return self.finish()

    def wander(self, order: Wander) -> Report:
        """Carries the order out, its active devices dealt out to the processes."""
        self._busy = list(self._processes)
        for number, process in enumerate(self._busy):
            active = len(range(number, order.active, len(self._busy)))
            _send(process, msgspec.structs.replace(order, active=active, seed=order.seed + number))
        return self.finish()

    def finish(self) -> Report:
        """What all report, at the end of their orders."""
        whole = Report()
        for process in self._busy:
            whole.add(msgspec.json.decode(_line(process), type=Report))
        return whole


def _send(process: subprocess.Popen[str], order: Order) -> None:
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(order).decode() + "\n")
    process.stdin.flush()


def _expect(process: subprocess.Popen[str], word: str) -> None:
    if (line := _line(process).strip()) != word:
        raise RuntimeError(f"device process: seen {line[:80]!r}, wanted {word!r}")


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"device process: it ended with status {process.wait()}, see above")
    return line
