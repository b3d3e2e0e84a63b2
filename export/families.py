"""Families: for every tensor of an architecture, the space in which each of its axes lives.

A *space* is a coordinate system that axes of several tensors share. A scheme draws one secret for each space and acts
on axes, so a new architecture is a new table and not new code. `{i}` in names stands for the layer.
(The idea of a table from axis to permutation is Git Re-Basin's, the STIP paper's reference [3].)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from optimum.utils import NormalizedConfigManager
from transformers import PretrainedConfig

from export.progress import listed
from shared.errors import FamilyError


@dataclass(frozen=True)
class Features:
    """A space whose features may change places freely."""

    name: str
    size: int


@dataclass(frozen=True)
class Stream:
    """The residual stream: features may change places, and where the norms allow it, turn into one another.

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
    may turn in its plane, and be scaled in the query and back in the key, unless a norm sits inside the heads.
    Features inside a value head may change basis if the output projection follows, for every query head of the group.
    """

    query: str  # space of query_heads × dim
    key: str  # space of key_value_heads × dim
    value: str  # space of key_value_heads × dim
    attended: str  # space of query_heads × dim: what attention mixed from the values, before the output projection
    query_heads: int
    key_value_heads: int
    dim: int
    normed: bool = False  # a norm inside query and key heads (Qwen3)


@dataclass(frozen=True)
class Gain:
    """The axis of a norm's weight, along the space that the norm reads."""

    space: str


@dataclass(frozen=True)
class After:
    """An axis that reads a space through a norm; `gain` names the tensor with that norm's weight."""

    space: str
    gain: str


@dataclass(frozen=True)
class Fixed:
    """An axis that cannot move, and why."""

    reason: str


@dataclass(frozen=True)
class Dropped:
    """A tensor that is not needed in the cloud, and why."""

    reason: str


Structure = Features | Stream | Gated | Heads
Axis = str | Gain | After | Fixed


def space_of(axis: Axis) -> str | None:
    """The space in which an axis lives; None for one that cannot move."""
    if isinstance(axis, Fixed):
        return None
    return axis if isinstance(axis, str) else axis.space


@dataclass(frozen=True)
class Family:
    """One table: which architectures it covers, their tensors' axes, and the structure of their spaces."""

    name: str
    model_types: tuple[str, ...]
    tensors: dict[str, tuple[Axis, ...] | Dropped]
    structures: Callable[[PretrainedConfig], tuple[Structure, ...]]
    embedding: str  # this tensor goes to the device, never to the cloud
    classifier: str

    def axes(self, tensor: str) -> tuple[Axis, ...] | Dropped:
        """The space of each axis of `tensor`, layer numbers filled in. Raises FamilyError for a tensor in no row."""
        for pattern, axes in self.tensors.items():
            match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)"), tensor)
            if not match:
                continue
            if isinstance(axes, Dropped):
                return axes
            layer = match.groupdict().get("i", "")
            return tuple(_in_layer(axis, layer) for axis in axes)
        raise FamilyError(
            f"tensor {tensor!r} is named by no row of the {self.name} table; nothing is passed through untransformed",
            hint="the architecture differs from the stock one; its table in export/families.py needs a row",
        )

    def spaces(self, config: PretrainedConfig) -> Iterator[Structure]:
        """Every structure of a model, one for each layer where its name has a layer."""
        for structure in self.structures(config):
            layers = range(normalized(config).num_layers) if "{i}" in repr(structure) else range(1)
            for layer in layers:
                yield _in_layer(structure, str(layer))


def _in_layer(row: Any, layer: str) -> Any:
    """A structure or axis with its layer number filled in."""
    if isinstance(row, str):
        return row.replace("{i}", layer)
    filled = {key: _in_layer(value, layer) if isinstance(value, str) else value for key, value in vars(row).items()}
    return type(row)(**filled)


def normalized(config: PretrainedConfig) -> Any:
    """Sizes under the same names for every architecture (num_layers, hidden_size, …)."""
    return NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)


def _llama_structures(config: PretrainedConfig) -> tuple[Structure, ...]:
    sizes = normalized(config)
    return (
        Stream("residual", sizes.hidden_size, "rms"),
        Features("vocab", sizes.vocab_size),
        Gated("gate[{i}]", "up[{i}]", "product[{i}]", config.intermediate_size),
        Heads(
            query="query[{i}]",
            key="key[{i}]",
            value="value[{i}]",
            attended="attended[{i}]",
            query_heads=sizes.num_attention_heads,
            key_value_heads=sizes.num_key_value_heads,
            dim=getattr(config, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads,
            normed=config.model_type == "qwen3",
        ),
    )


_HEAD_NORM = Fixed(
    "one weight for each feature of a head, shared by all heads; features inside query and key heads are fixed by RoPE"
)
_LAYER = "model.layers.{i}."
_ATTENTION_INPUT = After("residual", _LAYER + "input_layernorm.weight")
_FFN_INPUT = After("residual", _LAYER + "post_attention_layernorm.weight")

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    tensors={
        "model.embed_tokens.weight": ("vocab", "residual"),
        _LAYER + "input_layernorm.weight": (Gain("residual"),),
        _LAYER + "self_attn.q_proj.weight": ("query[{i}]", _ATTENTION_INPUT),
        _LAYER + "self_attn.q_proj.bias": ("query[{i}]",),
        _LAYER + "self_attn.k_proj.weight": ("key[{i}]", _ATTENTION_INPUT),
        _LAYER + "self_attn.k_proj.bias": ("key[{i}]",),
        _LAYER + "self_attn.v_proj.weight": ("value[{i}]", _ATTENTION_INPUT),
        _LAYER + "self_attn.v_proj.bias": ("value[{i}]",),
        _LAYER + "self_attn.o_proj.weight": ("residual", "attended[{i}]"),
        _LAYER + "self_attn.o_proj.bias": ("residual",),
        _LAYER + "self_attn.q_norm.weight": (_HEAD_NORM,),  # Qwen3
        _LAYER + "self_attn.k_norm.weight": (_HEAD_NORM,),
        _LAYER + "self_attn.rotary_emb.inv_freq": Dropped("the stock model computes it from its config"),
        _LAYER + "post_attention_layernorm.weight": (Gain("residual"),),
        # Both inner projections move with the inner features; the paper's printed rule leaves W₁ out and is wrong.
        _LAYER + "mlp.gate_proj.weight": ("gate[{i}]", _FFN_INPUT),
        _LAYER + "mlp.gate_proj.bias": ("gate[{i}]",),
        _LAYER + "mlp.up_proj.weight": ("up[{i}]", _FFN_INPUT),
        _LAYER + "mlp.up_proj.bias": ("up[{i}]",),
        _LAYER + "mlp.down_proj.weight": ("residual", "product[{i}]"),
        _LAYER + "mlp.down_proj.bias": ("residual",),
        "model.norm.weight": (Gain("residual"),),
        "lm_head.weight": ("vocab", After("residual", "model.norm.weight")),
    },
    structures=_llama_structures,
    embedding="model.embed_tokens.weight",
    classifier="lm_head.weight",
)

FAMILIES: tuple[Family, ...] = (LLAMA,)


def family_of(config: PretrainedConfig) -> Family:
    """The table for an architecture. Raises FamilyError naming it and what is supported."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    supported = listed(name for family in FAMILIES for name in family.model_types)
    raise FamilyError(
        f"architecture {config.model_type!r} is in no table; supported: {supported}",
        hint="a family is a table from tensor name to the space of each axis: see export/families.py",
    )
