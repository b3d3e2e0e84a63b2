"""The queue between whoever looks at the folder and whoever asks the cloud."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from examples.cabin.frames import Frame
from examples.cabin.record import Record


class Waiting:
    """Frames that wait to be described, at most `most` of them; for several threads.

    Where more frames come than are described, the newest win: the oldest that wait are dropped. With `oldest_wait`
    nothing is dropped: what finds no room stays in the folder until there is some.
    """

    def __init__(self, record: Record, most: int, *, oldest_wait: bool, on_drop: Callable[[Frame], None]) -> None:
        """on_drop: called with each frame that is dropped, before the record has it."""
        self._record = record
        self._most = most
        self._oldest_wait = oldest_wait
        self._on_drop = on_drop
        self._changed = threading.Condition()
        self._frames: deque[Frame] = deque()
        self._taken: Frame | None = None
        self._failure: BaseException | None = None

    def __len__(self) -> int:
        with self._changed:
            return len(self._frames) + (self._taken is not None)

    def offer(self, whole: Sequence[Frame], there: set[Frame]) -> list[Frame]:
        """Takes in what is new of the folder's whole frames, oldest first. Gives those that were dropped for it.

        there: all frames in the folder; others need not be remembered.
        """
        with self._changed:
            self._record.keep(there)
            held = {*self._frames, self._taken}
            new = [frame for frame in whole if frame not in held and frame not in self._record]
            if self._oldest_wait:
                new = new[: self._most - len(self._frames)]
            self._frames.extend(new)
            dropped = [self._frames.popleft() for _ in range(len(self._frames) - self._most)]
            for frame in dropped:
                self._on_drop(frame)
                self._record.add(frame)
            if new:
                self._changed.notify()
            return dropped

    def take(self) -> Frame:
        """The next frame, once there is one; it is this caller's until it is `done`. Raises what `fail` was given."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._failure)
            if self._failure is not None:
                raise self._failure
            self._taken = self._frames.popleft()
            return self._taken

    def done(self) -> None:
        """The frame that was taken needs no more work."""
        with self._changed:
            assert self._taken is not None
            self._record.add(self._taken)
            self._taken = None

    def fail(self, failure: BaseException) -> None:
        """Whoever waits for a frame waits in vain."""
        with self._changed:
            self._failure = failure
            self._changed.notify()
