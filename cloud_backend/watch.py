"""Files that are read again when they change, without a restart: tokens, certificates."""

from __future__ import annotations

from pathlib import Path

LOOK_SECONDS = 1.0  # between two looks


class Watched:
    """Tells whether files were replaced or written since the last look, by time, size and inode."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._seen = self._state()

    def changed(self) -> bool:
        """Whether any of them is another than at the last call. Raises OSError where one cannot be looked at."""
        state = self._state()
        before, self._seen = self._seen, state
        return state != before

    def _state(self) -> list[tuple[int, int, int]]:
        stats = [path.stat() for path in self._paths]
        return [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]
