"""The equivalence check that ends every export (STIP theorem 1, tried on what was written).

The original model reads ids and its own weights. The transformed one is what the two folders hold: embedding.onnx,
key.safetensors and the cloud's shards. Both run layer by layer in float32 from weights in the exported dtype, so the
figures show what the transformation costs and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import torch
from transformers import AutoConfig

from export.families import Family
from export.shards import Shards
from export.source import Source
from export.streaming import streamed_logits
from shared.errors import EquivalenceError
from shared.key import UserKey

POSITIONS = 64  # a sequence
# Permuted sums round differently. Through 30 layers of float32 that was 5e-6 of the largest logit; ten times it fails.
TOLERANCE = 1e-4


class Check(msgspec.Struct, frozen=True):
    """Differences of float32 logits, original against transformed and revealed."""

    positions: int
    max_difference: float
    mean_difference: float
    largest_logit: float
    same_top_token: int  # of `positions`
    near_ties: int  # top tokens that differ where the original's margin is below twice max_difference


def sample_ids(vocab_size: int, text_ids: list[int]) -> np.ndarray:
    """Two sequences [2, POSITIONS]: text (repeated to length), and ids drawn evenly from the whole vocabulary."""
    even = np.random.default_rng(0).integers(0, vocab_size, POSITIONS)
    text = np.resize(text_ids, POSITIONS) if text_ids else even[::-1]
    return np.stack([text, even]).astype(np.int64)


def check_equivalence(
    source: Source, family: Family, dtype: torch.dtype, cloud: Path, device: Path, ids: np.ndarray
) -> Check:
    """Compares both models on `ids` [sequences, positions]. Raises EquivalenceError beyond the tolerance."""

    def read_original(name: str) -> torch.Tensor:
        stored = name if name in source.shapes else family.embedding  # a tied classifier
        return source.read(stored).to(dtype)

    expected = streamed_logits(source.config, read_original, input_ids=torch.from_numpy(ids))
    key = UserKey.load(device / "key.safetensors")
    session = ort.InferenceSession(device / "embedding.onnx", providers=["CPUExecutionProvider"])
    embeddings = session.run(None, {"ids": ids.reshape(-1)})[0].reshape(*ids.shape, -1)
    hidden = torch.from_numpy(key.hide(embeddings))
    permuted = streamed_logits(AutoConfig.from_pretrained(cloud), Shards(cloud).read, inputs_embeds=hidden)
    return _compare(expected, key.reveal_rows(permuted))


def _compare(expected: np.ndarray, revealed: np.ndarray) -> Check:
    difference = np.abs(expected - revealed)
    worst = float(difference.max())
    top = np.partition(expected, -2, axis=-1)[..., -2:]
    margin = top[..., 1] - top[..., 0]
    same = expected.argmax(-1) == revealed.argmax(-1)
    check = Check(
        positions=same.size,
        max_difference=worst,
        mean_difference=float(difference.mean()),
        largest_logit=float(np.abs(expected).max()),
        same_top_token=int(same.sum()),
        near_ties=int((~same & (margin <= 2 * worst)).sum()),
    )
    if not worst <= TOLERANCE * max(1.0, check.largest_logit) or same.sum() + check.near_ties < same.size:
        raise EquivalenceError(
            f"equivalence check: logits differ by up to {worst:.2e} where the largest is {check.largest_logit:.1f}, "
            f"wanted at most {TOLERANCE:.0e} of it; {same.sum()} of {same.size} top tokens agree",
            hint="nothing was written; this is a defect of the table or the scheme, please report it",
        )
    return check
