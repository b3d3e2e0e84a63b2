"""How heads move where the output projection is stored quantised, in blocks of what attention mixed.

Blocks and heads are two ways to cut one axis, and an order of it must keep both together. Blocks inside a head nest in
it. A block of several heads holds them together: inside one key/value head's group, or as whole groups. Where neither
divides the other (blocks of two heads, groups of three or seven: Llama 3.2 3B, Qwen 2.5 7B), every few groups some
block lies astride two of them; then as many groups as fill whole blocks move together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from export.spaces import Heads
from shared.errors import FamilyError


@dataclass(frozen=True)
class HeadBlocks:
    """Which parts of an attention block stay together, as sizes of nested blocks, the largest first."""

    inside: tuple[int, ...]  # features of a head
    members: tuple[int, ...]  # query heads of a group
    groups: tuple[int, ...]  # groups, and so key/value heads
    astride: int | None  # query heads of a block where such blocks lie across groups

    @classmethod
    def of(cls, heads: Heads, levels: tuple[int, ...]) -> HeadBlocks:
        """What `levels`, the sizes of blocks of attended features, mean for heads. Raises FamilyError where they do
        not nest."""
        group = heads.query_heads // heads.key_value_heads
        several = [size // heads.dim for size in levels if size > heads.dim]
        astride = [count for count in several if count % group and group % count]
        odd = [size for size in levels if size % heads.dim and heads.dim % size]
        if odd or (astride and len(several) > 1):
            raise FamilyError(
                f"space {heads.attended!r}: blocks of {' and '.join(map(str, levels))} features, heads of {heads.dim} "
                f"in groups of {group}: wanted blocks and heads of which one divides the other",
                hint="store the output projection unquantised, or in a quantisation of other blocks",
            )
        return cls(
            inside=tuple(size for size in levels if size <= heads.dim),
            members=tuple(count for count in several if count < group),
            groups=tuple(count // group for count in several if count >= group),
            astride=astride[0] if astride else None,
        )

    def bunch(self, heads: Heads) -> int:
        """Groups that fill whole blocks, where blocks lie astride groups."""
        assert self.astride is not None
        group = heads.query_heads // heads.key_value_heads
        return math.lcm(self.astride, group) // group

    def runs(self, first: int, group: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The runs of a group's query heads that may change places among themselves, where blocks lie astride groups:
        how many, in which blocks. `first` is the number of the group's first head."""
        assert self.astride is not None
        left = min(-first % self.astride, group)  # the end of a block that begins in an earlier group
        whole = (group - left) // self.astride * self.astride
        for size, levels in ((left, ()), (whole, (self.astride,)), (group - left - whole, ())):
            if size:
                yield size, levels
