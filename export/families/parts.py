"""What tables are made of: the rows of a norm, of a projection, of an attention block, and the heads of the latter."""

from __future__ import annotations

from typing import Any

from export.spaces import Axis, Gain, Heads, Row, Shift


def attention(
    config: Any, layer: int, *, block: str = "", heads: int | None = None, normed: bool = False, rotary: float = 1.0
) -> Heads:
    """The heads of one layer of a stock config. `block` names the block where a layer has several, or a model.

    rotary: share of a head's features that positions turn; 0 where positions are added to the embeddings.
    """
    query_heads = heads or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    return Heads(
        query=f"{block}query[{layer}]",
        key=f"{block}key[{layer}]",
        value=f"{block}value[{layer}]",
        attended=f"{block}attended[{layer}]",
        query_heads=query_heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or query_heads,
        dim=dim,
        normed=normed,
        free=dim - int(dim * rotary),
    )


def layer_norm(name: str, space: str = "residual") -> dict[str, Row]:
    """The two rows of a LayerNorm."""
    return {f"{name}.weight": (Gain(space),), f"{name}.bias": (Shift(space, f"{name}.weight"),)}


def linear(name: str, *, into: Axis, out: Axis, transposed: bool = False) -> dict[str, Row]:
    """The two rows of a projection from the axis `into` to the axis `out`; Conv1D stores it transposed."""
    return {f"{name}.weight": (into, out) if transposed else (out, into), f"{name}.bias": (out,)}


def projections(
    query: str, key: str, value: str, out: str, *, into: Axis, attends: Axis | None = None, stream: str, block: str = ""
) -> dict[str, Row]:
    """The rows of an attention block's four projections, by their names. into: what is read; attends: what keys and
    values are made of, if that is another; stream: where the result goes; block: as in `attention`."""
    source = into if attends is None else attends
    return {
        **linear(query, into=into, out=block + "query[{i}]"),
        **linear(key, into=source, out=block + "key[{i}]"),
        **linear(value, into=source, out=block + "value[{i}]"),
        **linear(out, into=block + "attended[{i}]", out=stream),
    }


def same(*names: str) -> dict[str, str]:
    """Classes that are served as they are."""
    return {name: name for name in names}
