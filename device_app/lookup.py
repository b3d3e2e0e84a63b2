"""What followed the same tokens before: an index of every run of a few tokens, which grows with the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RUN = 4  # tokens of the longest run that is indexed: longer ones find hardly more
MOST_KEPT = 32_768  # tokens, of this conversation and earlier ones
END = -1  # between sequences; no text


@dataclass(frozen=True)
class Found:
    """A token that came next, and after how many of the last tokens it did."""

    token: int
    length: int


class Lookup:
    """Finds where the last tokens stood before, and what came then: the latest of the longest matches.

    Negative numbers among the ids stand for images, and are not found.
    """

    def __init__(self, *, longest: int) -> None:
        """longest: matches are not followed further back."""
        self._longest = longest
        self._text: list[int] = []  # everything taken in, in order
        self._length = 0  # of the sequence at its end
        self._next: dict[tuple[int, ...], int] = {}  # runs of up to RUN tokens → where in the text the next one stands

    def take(self, ids: list[int], known: int) -> None:
        """Takes in ids[known:]; the sequence taken in last begins with ids[:known] too."""
        if len(self._text) > MOST_KEPT:
            self._forget()
        if known < self._length:
            # Another sequence, or this one from an earlier place on: with enough before it that runs are whole.
            self._text += [END, *ids[max(0, known - self._longest) : known]]
        start = len(self._text)
        self._text += ids[known:]
        self._length = len(ids)
        for at in range(start, len(self._text)):
            self._add(at)

    def find(self, before: Sequence[int]) -> Found | None:
        """What may follow `before`, which may end in tokens that were not taken in."""
        for run in range(min(RUN, len(before)), 0, -1):
            at = self._next.get(tuple(before[-run:]))
            if at is not None:
                return Found(self._text[at], self._matched(before, at, run))
        return None

    def _matched(self, before: Sequence[int], at: int, length: int) -> int:
        most = min(self._longest, len(before), at)
        while length < most and self._text[at - 1 - length] == before[-1 - length]:
            length += 1
        return length

    def _add(self, at: int) -> None:
        if self._text[at] < 0:
            return
        for run in range(1, RUN + 1):
            start = at - run
            if start < 0 or self._text[start] < 0:
                return
            self._next[tuple(self._text[start:at])] = at

    def _forget(self) -> None:
        """Keeps the latest half."""
        self._text = self._text[-MOST_KEPT // 2 :]
        self._next.clear()
        for at in range(len(self._text)):
            self._add(at)
