"""The language of tables: which space each axis of a tensor lives in, and the structure of the spaces.

A *space* is a coordinate system that axes of several tensors share. A scheme draws one secret for each space and acts
on axes, so a new architecture is a new table and not new code. In names `{i}` stands for the layer and `{e}` for the
expert. (The idea of a table from axis to permutation is Git Re-Basin's, the STIP paper's reference [3].)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

T = TypeVar("T")

# --- structures: what a secret of a space may be ---


@dataclass(frozen=True)
class Features:
    """A space whose features may change places freely."""

    name: str
    size: int


@dataclass(frozen=True)
class Stream:
    """A residual stream: features may change places, and where the norms allow it, turn into one another.

    rms: every reader sits behind an RMSNorm, whose gain may be folded into it: any orthogonal basis will do.
    layer: the same with LayerNorms, which subtract the mean: a basis that keeps the vector of ones.
    post: a norm's gain sits between the norm and the stream, so nothing but places may change.
    """

    name: str
    size: int
    norm: Literal["rms", "layer", "post"]


@dataclass(frozen=True)
class Gated:
    """The three spaces of a gated feed-forward block, act(gate) ⊙ up = product, which share one order.

    The activation fixes the gate's values; up may be scaled, if product is scaled back where it is read.
    """

    gate: str
    up: str
    product: str
    size: int


@dataclass(frozen=True)
class Heads:
    """The four spaces of one attention block, which share the order of their heads.

    Key/value heads may change places, and with each its group of query heads, which may change places inside the
    group. Rotary positions fix the features inside query and key heads: each feature pair has its own frequency; a pair
    may turn in its plane, and be scaled in the query and back in the key, unless a norm sits inside the heads. Features
    that no position turns may change basis, in query and key alike. Features inside a value head may change basis if
    the output projection follows, for every query head of the group.
    """

    query: str  # space of query_heads × dim
    key: str  # space of key_value_heads × dim
    value: str  # space of key_value_heads × dim
    attended: str  # space of query_heads × dim: what attention mixed from the values, before the output projection
    query_heads: int
    key_value_heads: int
    dim: int
    normed: bool = False  # a norm inside query and key heads (Qwen3)
    free: int = 0  # features at the end of each query and key head that no rotary position turns


Structure = Features | Stream | Gated | Heads

# --- axes ---


@dataclass(frozen=True)
class Gain:
    """The axis of a norm's weight, along the space that the norm reads. The norm adds `offset` to it (Gemma: 1)."""

    space: str
    offset: float = 0.0


@dataclass(frozen=True)
class Shift:
    """The axis of a norm's bias; `gain` names the tensor with that norm's weight."""

    space: str
    gain: str


@dataclass(frozen=True)
class After:
    """An axis that reads a space through a norm; `gain` names the tensor with that norm's weight."""

    space: str
    gain: str
    offset: float = 0.0


@dataclass(frozen=True)
class Fused:
    """An axis of several spaces side by side: GPT-2's query, key and value."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Each:
    """The first axis of a stack of tensors, one for each feature of a space: an expert of a mixture. The other axes are
    those of one such tensor, with its number for `{e}`."""

    space: str


@dataclass(frozen=True)
class Fixed:
    """An axis that cannot move, and why."""

    reason: str


Axis = str | Gain | Shift | After | Fused | Each | Fixed

# --- tensors that have no axes in the cloud ---


@dataclass(frozen=True)
class Dropped:
    """A tensor that nobody needs, and why."""

    reason: str


@dataclass(frozen=True)
class OnDevice:
    """A tensor that devices have in the cloud's stead. Where the stock model adds it all the same, the cloud has zeros
    in its place (a missing tensor would be drawn anew, or computed: Marian's sinusoids)."""

    zeros: bool = False


Row = tuple[Axis, ...] | Dropped | OnDevice


def spaces_of(axis: Axis) -> tuple[str, ...]:
    """The spaces in which an axis lives, side by side; none for one that cannot move."""
    if isinstance(axis, Fixed):
        return ()
    if isinstance(axis, Fused):
        return axis.parts
    return (axis,) if isinstance(axis, str) else (axis.space,)


def filled(row: T, **numbers: int | str) -> T:
    """A row, axis or name with numbers in place of `{i}`, `{e}`."""
    if isinstance(row, str):
        for letter, number in numbers.items():
            row = row.replace(f"{{{letter}}}", str(number))  # type: ignore[assignment]
        return row
    if isinstance(row, tuple):
        return tuple(filled(part, **numbers) for part in row)  # type: ignore[return-value]
    if is_dataclass(row) and not isinstance(row, type):
        return replace(row, **{field.name: filled(getattr(row, field.name), **numbers) for field in fields(row)})
    return row


def of_each(axes: tuple[Axis, ...], count: int) -> Iterator[tuple[Axis, ...]]:
    """The axes of every tensor of a stack whose first axis is an `Each`."""
    for number in range(count):
        yield filled(axes[1:], e=number)


def prefixed(row: Any, prefix: str) -> Any:
    """A row whose tensors' names (those of gains) begin with `prefix`."""
    if isinstance(row, tuple):
        return tuple(prefixed(axis, prefix) for axis in row)
    return replace(row, gain=prefix + row.gain) if isinstance(row, After | Shift) else row
