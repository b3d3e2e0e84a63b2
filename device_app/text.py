"""From token ids to text that is safe to show: whole characters, no terminal control, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from device_app.tokenizer import Detokenizer

# C0 but line feed and tab, DEL, and C1: an answer comes from a machine we do not trust and may not move the cursor,
# colour the screen or set the window's title.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def without_control(text: str) -> str:
    """`text` without terminal control characters."""
    return text.translate(_CONTROL)


def printable(text: str) -> str:
    """`text`, a file's name say, with ? for all that is not printable."""
    return "".join(character if character.isprintable() else "?" for character in text)


def one_line(text: str) -> str:
    """`text` in one line: white space of any kind is a blank, and nothing that controls a terminal is left."""
    return " ".join(without_control(" ".join(text.split())).split())


class TextStream:
    """The text of one answer as it becomes certain."""

    def __init__(self, detokenizer: Detokenizer, hidden_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._hidden = frozenset(hidden_ids)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stop_text: str | None = None  # the stop string that was met; nothing comes after it

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self.stop_text is not None

    def push(self, token: int) -> str:
        """Text that is now certain. Special tokens are not shown."""
        if token in self._hidden or self.stopped:
            return ""
        return self._release(self._detokenizer.push(token))

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        text = self._release(self._detokenizer.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        self._held += without_control(text)
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stop_text = min(found)
            return self._held[:at]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that could be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
