"""The equivalence check that ends every export (STIP theorem 1, tried on what was written).

The original model reads ids and its own weights. The transformed one is what the two folders hold: embedding.onnx,
key.safetensors, the cloud's shards, and classifier.onnx where the classifier is on the device. Both run layer by layer
in float32 from weights in the exported dtype, so the figures show what the transformation costs and nothing else.

A permutation moves values and rounds none. A rotation computes new ones: in float32 that is checked like a permutation;
in 16 bits the map is checked before it is rounded, and what rounding costs is measured and reported.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import torch
from transformers import AutoConfig

from export.classifier import CLASSIFIER
from export.families import Axis, Dropped, Family
from export.scheme import Head, Scheme
from export.shards import Shards
from export.source import Source
from export.streaming import streamed_hidden, streamed_logits
from shared.errors import EquivalenceError
from shared.key import UserKey

POSITIONS = 64  # a sequence
# Permuted sums round differently. Through 30 layers of float32 that was 5e-6 of the largest logit; ten times it fails.
TOLERANCE = 1e-4
# Rounded new values, in units of roundoff of the largest logit: mean and greatest difference. SmolLM2 came to 0.5 and 4
# in bfloat16, tiny models to 0.7 and 7.
ROUNDING_TOLERANCE = 4.0, 64.0


class Check(msgspec.Struct, frozen=True):
    """Differences of float32 logits, original against transformed and revealed."""

    positions: int
    max_difference: float
    mean_difference: float
    largest_logit: float
    same_top_token: int  # of `positions`
    near_ties: int  # top tokens that differ where the original's margin is below twice max_difference
    rounded: bool = False  # whether the differences are those of storing new values in 16 bits


def sample_ids(vocab_size: int, text_ids: list[int]) -> np.ndarray:
    """Two sequences [2, POSITIONS]: text (repeated to length), and ids drawn evenly from the whole vocabulary."""
    even = np.random.default_rng(0).integers(0, vocab_size, POSITIONS)
    text = np.resize(text_ids, POSITIONS) if text_ids else even[::-1]
    return np.stack([text, even]).astype(np.int64)


def check_equivalence(
    source: Source,
    family: Family,
    scheme: Scheme,
    dtype: torch.dtype,
    cloud: Path,
    device: Path,
    ids: np.ndarray,
    head: Head = "cloud",
) -> Check:
    """Compares both models on `ids` [sequences, positions]. Raises EquivalenceError beyond the tolerance."""

    def read_original(name: str) -> torch.Tensor:
        stored = name if name in source.shapes else family.embedding  # a tied classifier
        return source.read(stored).to(dtype)

    rounded = not scheme.moves_only and dtype is not torch.float32
    if rounded:
        _check_before_rounding(source, family, scheme, cloud, ids, head)
    expected = streamed_logits(source.config, read_original, input_ids=torch.from_numpy(ids))
    check = _compared(expected, written_logits(cloud, device, ids, head), rounded)
    unit = torch.finfo(dtype).eps / 2
    if rounded:
        mean, greatest = (units * unit * check.largest_logit for units in ROUNDING_TOLERANCE)
        good = check.mean_difference <= mean and check.max_difference <= greatest
    else:
        good = check.max_difference <= TOLERANCE * max(1.0, check.largest_logit)
        good = good and check.same_top_token + check.near_ties == check.positions
    if not good:
        raise EquivalenceError(
            f"equivalence check: logits differ by up to {check.max_difference:.2e} (mean {check.mean_difference:.2e}) "
            f"where the largest is {check.largest_logit:.1f}, more than {dtype} explains; "
            f"{check.same_top_token} of {check.positions} top tokens agree",
            hint="nothing was written; this is a defect of the table or the scheme, please report it",
        )
    return check


def _check_before_rounding(
    source: Source, family: Family, scheme: Scheme, cloud: Path, ids: np.ndarray, head: Head
) -> None:
    """The transformation itself, in float32, against the original: logits, or hidden states if the cloud has none."""
    config, key = AutoConfig.from_pretrained(cloud), scheme.user_key("check", head=head)
    table = source.read(family.embedding).float()[torch.from_numpy(ids)]

    def read_original(name: str) -> torch.Tensor:
        return source.read(name if name in source.shapes else family.embedding).float()  # a tied classifier

    def read_transformed(name: str) -> torch.Tensor:
        return scheme.act(name, read_original(name), _axes(family, name), source.read)

    sent = torch.from_numpy(key.hide(table.numpy()))
    if head == "cloud":
        expected = streamed_logits(source.config, read_original, inputs_embeds=table)
        revealed = key.reveal_rows(streamed_logits(config, read_transformed, inputs_embeds=sent))
    else:
        expected = streamed_hidden(source.config, read_original, inputs_embeds=table)
        revealed = key.reveal_hidden(streamed_hidden(config, read_transformed, inputs_embeds=sent))
        if gain := scheme.folded(_axes(family, family.classifier)):
            revealed = revealed * source.read(gain).float().numpy()
    worst, largest = float(np.abs(revealed - expected).max()), float(np.abs(expected).max())
    if not worst <= TOLERANCE * largest:
        raise EquivalenceError(
            f"equivalence check, before rounding: results differ by up to {worst:.2e} where the largest is "
            f"{largest:.1f}, wanted at most {TOLERANCE:.0e} of it",
            hint="nothing was written; this is a defect of the table or the scheme, please report it",
        )


def _axes(family: Family, name: str) -> tuple[Axis, ...]:
    axes = family.axes(name)
    assert not isinstance(axes, Dropped)
    return axes


def written_logits(cloud: Path, device: Path, ids: np.ndarray, head: Head) -> np.ndarray:
    """Logits [sequences, positions, vocab_size] that the two folders give together, revealed."""
    key = UserKey.load(device / "key.safetensors")
    config, read = AutoConfig.from_pretrained(cloud), Shards(cloud).read
    embeddings = _onnx(device / "embedding.onnx", ids=ids.reshape(-1)).reshape(*ids.shape, -1)
    sent = torch.from_numpy(key.hide(embeddings))
    if head == "cloud":
        return key.reveal_rows(streamed_logits(config, read, inputs_embeds=sent))
    hidden = key.reveal_hidden(streamed_hidden(config, read, inputs_embeds=sent))
    rows = hidden.reshape(-1, hidden.shape[-1])
    return _onnx(device / CLASSIFIER, hidden=rows).reshape(*ids.shape, -1)


def _onnx(path: Path, **inputs: np.ndarray) -> np.ndarray:
    """The one output of a model that is run once: folding its constants first would hold the table twice."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    output: np.ndarray = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    return output


def _compared(expected: np.ndarray, revealed: np.ndarray, rounded: bool) -> Check:
    difference = np.abs(expected - revealed)
    worst = float(difference.max())
    top = np.partition(expected, -2, axis=-1)[..., -2:]
    margin = top[..., 1] - top[..., 0]
    same = expected.argmax(-1) == revealed.argmax(-1)
    return Check(
        positions=same.size,
        max_difference=worst,
        mean_difference=float(difference.mean()),
        largest_logit=float(np.abs(expected).max()),
        same_top_token=int(same.sum()),
        near_ties=int((~same & (margin <= 2 * worst)).sum()),
        rounded=rounded,
    )
