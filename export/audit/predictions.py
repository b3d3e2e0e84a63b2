"""What a stock model predicts of a text, and how well."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.key import Index
from shared.wire import Array

Real = npt.NDArray[np.float32]


def windows(ids: Index, count: int, length: int) -> Index:
    """Pieces [count, length] of a text, evenly spread, that do not overlap where it is long enough."""
    starts = np.linspace(0, max(0, ids.size - length), count).astype(np.int64)
    return np.stack([np.resize(ids[start : start + length], length) for start in starts])


@torch.inference_mode()
def forward(model: Any, inputs: Array) -> Real:
    """Logits [sequences, positions, vocab] of a stock model for inputs [sequences, positions, hidden]."""
    rows = [model(inputs_embeds=torch.from_numpy(one[None]), use_cache=False).logits.numpy()[0] for one in inputs]
    return np.stack(rows)


def perplexity(logits: Real, ids: Index) -> float:
    """Of ids [sequences, positions] under the logits [sequences, positions, vocab] before each."""
    scores = torch.from_numpy(logits[:, :-1].reshape(-1, logits.shape[-1]))
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(ids[:, 1:].reshape(-1)))
    return float(loss.exp())
