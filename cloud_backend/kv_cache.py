"""A KV cache that can be cut back at no cost, for the stock model's cache interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_CAPACITY = 256  # positions


class GrowingLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one layer in storage that doubles when full. Every position is kept, so that any length can
    be cut back to; a sliding window is the mask's business."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], FIRST_CAPACITY, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states [1, key/value heads, n, dim] and gives all states up to now."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            capacity = max(end, 2 * self.keys.shape[2])
            self.keys, self.values = (
                torch.cat([old, old.new_empty((*old.shape[:2], capacity - old.shape[2], old.shape[3]))], dim=2)
                for old in (self.keys, self.values)
            )
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class Last:
    """The last position of a sequence: what went in and what came out, each [1, hidden_size]."""

    embedding: torch.Tensor
    hidden: torch.Tensor


class KVCache:
    """The KV cache of one session: one sequence, cut back and appended to. With 0 layers it stays empty."""

    def __init__(self, layers: int) -> None:
        self._layers = [GrowingLayer() for _ in range(layers)]
        self.stock = Cache(layers=self._layers)  # what the stock model takes as past_key_values
        self.last: Last | None = None

    @property
    def length(self) -> int:
        """Positions held."""
        return self._layers[0].length if self._layers else 0

    @property
    def ready(self) -> bool:
        """Whether a decoder can go on from here: one that reads a source sequence needs it first."""
        return True

    def cut(self, keep: int) -> None:
        """Forgets every position from `keep` on."""
        if keep < self.length:
            self.last = None
        for layer in self._layers:
            layer.length = min(layer.length, keep)
