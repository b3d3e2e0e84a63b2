"""The attention block that all families have, in the tables' terms."""

from __future__ import annotations

from typing import Any

from export.spaces import Heads


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
