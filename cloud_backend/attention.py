"""Attention of stock models over paged KV memory: all sequences of a step in one packed row of tokens.

A step's tokens go through the stock model side by side, [1, tokens, hidden]: its projections, norms and experts look at
each by itself. Where it attends, transformers' own interfaces call here. New keys and values are written to the rows of
the pool that the step names, and each sequence reads its own.

    with running(step):
        model(inputs_embeds=…, position_ids=step.positions, past_key_values=pooled_cache(pool))
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cloud_backend.step import MOST_TOGETHER, Group, Step
from cloud_backend.tensor_pool import TensorPool

NAME = "stip"  # of this attention among transformers' own
FEW = 64  # queries that read the same keys


class _Thread(threading.local):
    step: Step | None = None


_thread = _Thread()


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Within it, attention of this thread is the step's."""
    _thread.step = step
    try:
        yield
    finally:
        _thread.step = None


class PooledLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """One layer as the stock model sees it: takes new keys and values, and leaves reading them to `attend`."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Writes states [1, heads, tokens, size] where the step says, and gives them as they came."""
        assert _thread.step is not None
        self.keys.index_copy_(1, _thread.step.written, key_states[0])
        self.values.index_copy_(1, _thread.step.written, value_states[0])
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0  # the positions are given

    def get_max_length(self) -> int:
        return -1


def pooled_cache(pool: TensorPool, *, sources: bool = False) -> Cache:
    """What a stock model takes as past_key_values. sources: of a decoder with cross-attention, whose pages are full."""
    cache = Cache(layers=[PooledLayer(*layer) for layer in zip(pool.keys, pool.values, strict=True)])
    if not sources:
        return cache
    both = EncoderDecoderCache(
        cache, Cache(layers=[PooledLayer(*one) for one in zip(pool.keys, pool.values, strict=True)])
    )
    both.is_updated = dict.fromkeys(range(len(pool.keys)), True)
    return both


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' interface: query [1, heads, tokens, size] to outputs [1, tokens, heads, size].

    attention_mask: the sliding window, or None, as `window_of` gave it.
    """
    step = _thread.step
    if step is None:  # an encoder, or a model that is tried out
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **options
        )
        return output, None
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = step.pool.keys[layer], step.pool.values[layer]
    # Of a source sequence the stock model hands on what the cache has: the pool itself.
    reads = step.sources if key is keys else step.groups
    window = attention_mask
    outputs = [_attend(group, query[0], keys, values, window, scaling, softcap) for group in reads]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _attend(
    group: Group,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Outputs [count × tokens, heads, size] of a group; query [heads, tokens of the step, size]."""
    heads, shared = len(keys), query.shape[0] // len(keys)  # query heads that read the same keys
    rows = query[:, group.first : group.first + group.count * group.tokens]
    queries = rows.reshape(heads, shared, group.count, group.tokens, -1)
    key, value = group.read(keys), group.read(values)  # [heads, count, longest, size]
    if group.tokens > MOST_TOGETHER:  # alone
        key, value = (states.expand(-1, shared, -1, -1) for states in (key, value))
        whole = group.causal and group.tokens == group.longest and window is None and softcap is None
        mask = None if whole else group.mask(window, query.dtype)  # [1, tokens, longest]
        output = _product(queries[:, :, 0], key, value, mask, scaling, softcap, causal=whole)
        return output.flatten(0, 1).transpose(0, 1)
    # The heads that share keys become queries beside each other, so that the keys are read once.
    together = queries.transpose(1, 2).flatten(2, 3)  # [heads, count, shared × tokens, size]
    mask = group.mask(window, query.dtype)  # [count, tokens, longest]
    if mask is not None:
        mask = mask[:, None].expand(-1, shared, -1, -1).flatten(1, 2)
    output = _product(together, key, value, mask, scaling, softcap)
    apart = output.view(heads, group.count, shared, group.tokens, -1).permute(1, 3, 0, 2, 4)
    return apart.reshape(group.count * group.tokens, heads * shared, -1)


def _product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of query [a, b, tokens, size] over key and value [a, b, longest, size], mask [b, tokens, longest]."""
    bias = None if mask is None else mask[None]
    # Over padded keys, few queries each, torch's fused kernel takes nearly twice the time on a processor.
    in_parts = softcap is not None or (query.device.type == "cpu" and bias is not None and query.shape[2] <= FEW)
    if not in_parts:
        output: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=causal, scale=scaling
        )
        return output
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return weights.to(query.dtype) @ value


def window_of(*, local_size: int | None = None, **options: Any) -> Any:
    """The mask in transformers' interface. In a step it is the layer's sliding window alone."""
    return sdpa_mask(local_size=local_size, **options) if _thread.step is None else local_size


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, window_of)
