"""What a device knows of the KV cache that the cloud holds for it, also where an answer got lost (PROTOCOL.md, 4.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Held:
    """A KV cache that begins with `ids` and is `length` long at most, and the source sequence beside it.

    It is longer than `ids` where the device does not know how it goes on.
    """

    ids: list[int] = field(default_factory=list)
    source: list[int] | None = None
    length: int = 0

    @property
    def known(self) -> tuple[list[int], list[int] | None]:
        """All of it that the device knows for sure."""
        return self.ids, self.source

    def cut(self, length: int) -> Held:
        """What is left of it where the KV cache is only so long."""
        return Held(self.ids[:length], self.source, min(self.length, length))

    def left(self, length: int) -> Held:
        """What is left of it where the cloud may have lost some, and says that so long a KV cache is there.

        Of an empty one nobody can tell whether its source sequence is there still.
        """
        return self.cut(length) if length else Held()


def in_common(states: Sequence[Held]) -> Held:
    """What is sure where the cloud holds one of `states`, or the beginning of one, and nobody knows which."""
    first, *others = states
    longest = max(state.length for state in states)
    if any(state.source != first.source for state in others):
        return Held(length=longest)
    common = min((common_prefix(first.ids, state.ids) for state in others), default=len(first.ids))
    return Held(first.ids[:common], first.source, longest)


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many ids both begin with."""
    if one[: len(other)] == other:  # by far the most frequent, and quick
        return len(other)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
