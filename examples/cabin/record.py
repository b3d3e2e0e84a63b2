"""What was done, in a file: a restart describes nothing twice."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from examples.cabin.frames import Frame
from shared.errors import UsageError

SPARE_LINES = 1000  # of frames that are gone: beyond that the file is written anew


class Record:
    """Frames that need no more work, as long as they are in the folder. A line each: modified_ns, name, size.

    A line is on the disk before `add` returns: a car's computer loses its power without notice.
    """

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. Raises UsageError where it cannot be used, or another process uses it."""
        self._path = path
        self._number = self._locked(path)
        self._frames = self._read()
        self._lines = len(self._frames) + SPARE_LINES + 1  # whatever is in it, the first `keep` makes it right

    def __contains__(self, frame: Frame) -> bool:
        return frame in self._frames

    def __len__(self) -> int:
        return len(self._frames)

    def close(self) -> None:
        """The file may be opened again."""
        os.close(self._number)

    def add(self, frame: Frame) -> None:
        """Raises UsageError where it cannot be written."""
        self._frames.add(frame)
        self._write(self._number, [frame])
        self._lines += 1

    def keep(self, there: set[Frame]) -> None:
        """Forgets frames that are not among those in the folder. Raises UsageError where it cannot be written."""
        self._frames &= there
        if self._lines <= len(self._frames) + SPARE_LINES:
            return
        anew = self._path.with_name(f"{self._path.name}.new")
        with suppress(FileNotFoundError):
            anew.unlink()
        number = self._locked(anew)
        self._write(number, sorted(self._frames))
        anew.replace(self._path)
        os.close(self._number)
        self._number, self._lines = number, len(self._frames)

    def _locked(self, path: Path) -> int:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--state {path}: another process uses it", hint="give each its own") from None
        except OSError as error:
            raise UsageError(f"--state {path}: {error.strerror}") from None
        return number

    def _write(self, number: int, frames: list[Frame]) -> None:
        lines = "".join(json.dumps([frame.modified_ns, frame.name, frame.size]) + "\n" for frame in frames)
        try:
            with open(number, "ab", closefd=False) as file:
                file.write(lines.encode())
            os.fdatasync(number)
        except OSError as error:
            raise UsageError(f"--state {self._path}: {error.strerror}", hint="is the disk full?") from None

    def _read(self) -> set[Frame]:
        """All whole lines. The last one is half written where the power went."""
        frames = set()
        with open(self._number, "rb", closefd=False) as file:
            file.seek(0)
            for line in file:
                with suppress(ValueError, TypeError):
                    modified_ns, name, size = json.loads(line)
                    frames.add(Frame(modified_ns, name, size))
        return frames
