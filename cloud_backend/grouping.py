"""Which sequences of different lengths share a forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def groups(lengths: Sequence[int], most: int | None = None) -> Iterator[list[int]]:
    """Indices of the sequences that go side by side, of similar length: at most half of it is padding.

    most: positions of a group, padding included, but for a sequence that is longer by itself.
    """
    group: list[int] = []
    held = 0  # positions in the group that are no padding
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = (len(group) + 1) * lengths[at]  # as this one is the longest so far
        allowed = 2 * (held + lengths[at])
        if group and padded > (allowed if most is None else min(most, allowed)):
            yield group
            group, held = [], 0
        group.append(at)
        held += lengths[at]
    yield group
