"""KV memory as torch has it: one tensor of keys and one of values for each layer, in whose rows sequences lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cloud_backend.kv_cache import PAGE, PagePool, cannot_be_allocated

RESERVED = 2  # pages that no session gets: see TensorPool


@dataclass(frozen=True)
class LayerShape:
    """Of the keys and values that one position leaves in a layer."""

    heads: int
    key_size: int
    value_size: int


class TensorPool(PagePool):
    """The keys and values of all sessions of a model.

    Row 0 is zero always: where sequences of different lengths are read side by side, it stands for what the shorter
    ones lack. Whatever another session left in a page would do for finite values only, as 0 × NaN is NaN. The second
    page takes what padded rows of a batch write.
    """

    def __init__(self, layers: Sequence[LayerShape], dtype: torch.dtype, device: torch.device, budget: int) -> None:
        """budget: bytes. Memory is touched as it is used. Raises UsageError where it is too little or too much."""
        page_bytes = PAGE * dtype.itemsize * sum(one.heads * (one.key_size + one.value_size) for one in layers)
        super().__init__(page_bytes, budget, first=RESERVED)
        self.device = device
        rows = (self.pages + RESERVED) * PAGE
        try:  # [heads, rows, size] a layer
            self.keys = [torch.empty(one.heads, rows, one.key_size, dtype=dtype, device=device) for one in layers]
            self.values = [torch.empty(one.heads, rows, one.value_size, dtype=dtype, device=device) for one in layers]
        except (RuntimeError, TypeError):  # there is not so much, or it cannot even be counted
            raise cannot_be_allocated(self.budget) from None
        for tensor in (*self.keys, *self.values):
            tensor[:, :PAGE] = 0
