"""The folder that a camera fills: which frames are whole, and what is in them."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff", ".avif")
MOST_FILES = 10_000  # in the folder: what is kept in memory of each is little, but not nothing
MOST_BYTES = 16 * 2**20  # of a frame


@dataclass(frozen=True, order=True, slots=True)
class Frame:
    """A file of the folder as it was at one time. One that is written over is another frame. The order is by age."""

    modified_ns: int
    name: str
    size: int


class ReplacedError(Exception):
    """A frame is not there any more: its file was deleted, or written over."""


class Folder:
    """Looks at a folder again and again.

    A frame is whole once its file has stayed as it is for `settle` seconds, by our own clock: the file's may be wrong.
    Files that begin with a dot, or whose name is not that of an image, are left alone, and so may be written at leisure
    and renamed at the end.
    """

    def __init__(self, path: Path, settle: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._settle = settle
        self._clock = clock
        self._first_seen: dict[Frame, float] = {}

    def look(self) -> tuple[list[Frame], set[Frame]]:
        """Whole frames, the oldest first, and all that are there. Raises UsageError for a folder that is not as it
        must be."""
        now = self._clock()
        self._first_seen = {frame: self._first_seen.get(frame, now) for frame in self._listed()}
        whole = [frame for frame, since in self._first_seen.items() if now - since >= self._settle]
        return sorted(whole), set(self._first_seen)

    def read(self, frame: Frame) -> bytes:
        """The file's bytes. Raises ReplacedError where they are not this frame's, UsageError for too many."""
        if frame.size > MOST_BYTES:
            raise UsageError(f"frame: seen {frame.size} bytes, wanted at most {MOST_BYTES}")
        try:
            # Whatever took the frame's place meanwhile, nothing is followed and nothing is waited for.
            number = os.open(self._path / frame.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(number, "rb") as file:
                data = file.read(frame.size + 1)
                after = os.fstat(file.fileno())
        except OSError as error:
            raise ReplacedError from error
        if len(data) != frame.size or not _is(after, frame):
            raise ReplacedError
        return data

    def unchanged(self, frame: Frame) -> bool:
        """Whether the file is still this frame's."""
        try:
            return _is((self._path / frame.name).lstat(), frame)
        except OSError:
            return False

    def remove(self, frame: Frame) -> None:
        """Deletes the file, unless it is another frame by now. Raises UsageError where it may not be deleted."""
        if not self.unchanged(frame):
            return
        try:
            (self._path / frame.name).unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"folder {self._path}: {error.strerror}", hint="may we delete files there?") from None

    def _listed(self) -> list[Frame]:
        frames: list[Frame] = []
        try:
            with os.scandir(self._path) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or not entry.name.lower().endswith(SUFFIXES):
                        continue
                    if (frame := _frame_of(entry)) is not None:
                        frames.append(frame)
                    if len(frames) > MOST_FILES:
                        raise UsageError(
                            f"folder {self._path}: seen more than {MOST_FILES} frames, wanted fewer",
                            hint="let --remove delete what was described, or whatever writes them delete old ones",
                        )
        except OSError as error:
            raise UsageError(
                f"folder {self._path}: {error.strerror}", hint="is it there, and may we read it?"
            ) from None
        return frames


def _frame_of(entry: os.DirEntry[str]) -> Frame | None:
    """None for what is no regular file, or was deleted meanwhile."""
    try:
        seen = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return Frame(seen.st_mtime_ns, entry.name, seen.st_size) if stat.S_ISREG(seen.st_mode) else None


def _is(seen: os.stat_result, frame: Frame) -> bool:
    return stat.S_ISREG(seen.st_mode) and (seen.st_mtime_ns, seen.st_size) == (frame.modified_ns, frame.size)
