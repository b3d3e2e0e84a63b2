"""A process in a pseudo-terminal, and a screen that shows what it wrote."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from contextlib import suppress


def _as_a_terminal_does() -> None:
    """What a terminal gives its program: itself, and signals that end it, which may be ignored where tests run."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """`stip-device …` in a pseudo-terminal of its own, and what it shows."""

    def __init__(self, *arguments: object, environment: Mapping[str, str], columns: int = 80, rows: int = 24) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "device_app", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_as_a_terminal_does,
            env=environment,
        )
        os.close(slave)
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._seen = 0

    def write(self, keys: str | bytes) -> None:
        """Presses keys, as fast as they are taken."""
        left = keys.encode() if isinstance(keys, str) else keys
        while left:
            readable, writable, _ = select.select([self._master], [self._master], [], 10)
            assert readable or writable, f"nothing takes the {len(left)} bytes that are left"
            if readable:
                self._read()
            if writable:
                left = left[os.write(self._master, left[:1024]) :]

    def expect(self, pattern: str, seconds: float = 20) -> str:
        """Waits until something new matches, and gives all that was shown up to its end."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown[self._seen :])):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown[self._seen :]!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                assert self._read(), f"it ended without {pattern!r}: {self.shown[self._seen :]!r}"
        new = self.shown[self._seen : self._seen + match.end()]
        self._seen += match.end()
        return new

    def _read(self) -> bool:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux's end of file for a terminal
            return False
        self.shown += self._decoder.decode(data)
        return bool(data)

    def insist(self, keys: str, pattern: str) -> str:
        """Presses until it is noticed: Python looks at a Ctrl-C just before input() only at the next key."""
        for _ in range(20):
            self.write(keys)
            with suppress(AssertionError):
                return self.expect(pattern, seconds=1)
        raise AssertionError(f"{keys!r} was not noticed: {self.shown!r}")

    def leave(self) -> int:
        """Reads to the end and gives the exit status."""
        while self._read():
            pass
        return self.process.wait(20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._master)


class Screen:
    """What a terminal of some width shows after all that was written: enough of ECMA-48 for what we write.

    Raises ValueError for a sequence that it does not know, and where the cursor would leave the window upwards.
    """

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.lines = [""]  # with those that scrolled away
        self._row = self._column = 0
        self._columns, self._rows = columns, rows

    def write(self, text: str) -> None:
        """Takes what a program writes, line ends as it writes them."""
        for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]|\x1b", text):
            if piece.startswith("\x1b"):
                self._control(piece)
            elif piece == "\r":
                self._column = 0
            elif piece == "\n":
                self._row, self._column = self._row + 1, 0
                if self._row == len(self.lines):
                    self.lines.append("")
            else:
                self._put(piece)

    def flush(self) -> None:
        """As files have it."""

    def _put(self, character: str) -> None:
        if self._column == self._columns or not character.isprintable():
            raise ValueError(f"{character!r} at column {self._column} of {self._columns}")
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
        self._column += 1

    def _control(self, sequence: str) -> None:
        if re.fullmatch(r"\x1b\[[0-9;]*m", sequence):
            return  # colours
        if match := re.fullmatch(r"\x1b\[(\d+)A", sequence):
            self._row -= int(match[1])
            if self._row < max(0, len(self.lines) - self._rows):
                raise ValueError("the cursor was moved to what has scrolled away")
        elif sequence == "\x1b[K":
            self.lines[self._row] = self.lines[self._row][: self._column]
        elif sequence == "\x1b[J":
            self.lines[self._row] = self.lines[self._row][: self._column]
            del self.lines[self._row + 1 :]
        else:
            raise ValueError(f"seen {sequence!r}")
