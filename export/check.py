"""The equivalence check that ends every export (STIP theorem 1, tried on what was written).

The original model reads ids and pixels, and its own weights. The transformed one is what the two folders hold:
embedding.onnx, image.onnx, key.safetensors, the cloud's weights, and classifier.onnx where the classifier is on the
device. Both run layer by layer in float32 from weights in the exported dtype, so the figures show what the
transformation costs and nothing else.

A permutation moves values and rounds none. A rotation computes new ones: in float32 that is checked like a permutation;
in 16 bits the map is checked before it is rounded, and what rounding costs is measured and reported.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import torch
from transformers import AutoConfig, PretrainedConfig

from export.classifier import CLASSIFIER
from export.cloud_weights import cloud_weights
from export.embedding import IMAGE
from export.families import Family, Read
from export.original import folded_gain, has_pooler, original
from export.outputs import Sent, from_sent, hidden_from_sent, plain
from export.samples import IMAGE_AT, Samples
from export.scheme import Head, Scheme
from export.source import Source
from export.spaces import Dropped, OnDevice
from export.streaming import streamed
from shared.errors import EquivalenceError
from shared.key import UserKey
from shared.wire import Array

# Permuted sums round differently. Through 30 layers of float32 that was 5e-6 of the largest logit; ten times it fails.
TOLERANCE = 1e-4
# Rounded new values, in units of roundoff of the largest logit: mean and greatest difference. SmolLM2 came to 0.5 and 4
# in bfloat16, tiny models to 0.7 and 7.
ROUNDING_TOLERANCE = 4.0, 64.0


class Check(msgspec.Struct, frozen=True):
    """Differences of float32 logits, original against transformed and revealed. Where a model has no classifier they
    are hidden states, and the top token is the greatest feature."""

    positions: int
    max_difference: float
    mean_difference: float
    largest_logit: float
    same_top_token: int  # of `positions`
    near_ties: int  # top tokens that differ where the original's margin is below twice max_difference
    rounded: bool = False  # whether the differences are those of storing new values in 16 bits


def check_equivalence(
    source: Source,
    family: Family,
    scheme: Scheme,
    dtype: torch.dtype,
    cloud: Path,
    device: Path,
    samples: Samples,
    head: Head = "cloud",
    stored: Read | None = None,
) -> Check:
    """Compares both models on `samples`. Raises EquivalenceError beyond the tolerance.

    dtype: in which new values are rounded. stored: reads the original with the values that the export stores; by
    default they are rounded to `dtype`.
    """
    stored = stored or original(source, family, dtype)
    try:
        return _check_once(source, family, scheme, dtype, cloud, device, samples, head, stored)
    except EquivalenceError:
        if not family.routes or samples.ids is None:
            raise
    # A router may have met two experts that are equally good but for rounding; other texts will not all do so.
    other = replace(samples, ids=np.roll(samples.ids, 1, axis=1)[:, ::-1].copy())
    return _check_once(source, family, scheme, dtype, cloud, device, other, head, stored)


def _check_once(
    source: Source,
    family: Family,
    scheme: Scheme,
    dtype: torch.dtype,
    cloud: Path,
    device: Path,
    samples: Samples,
    head: Head,
    stored: Read,
) -> Check:
    rounded = not scheme.moves_only and dtype is not torch.float32
    pooled = has_pooler(source)
    if rounded:
        _check_before_rounding(source, family, scheme, cloud, device, samples, head)
    expected = streamed(source.config, stored, plain(samples.inputs(), pooled=pooled))
    check = _compared(expected, written_rows(family, cloud, device, samples, head, pooled=pooled), rounded)
    unit = torch.finfo(dtype).eps / 2
    if rounded:
        mean, greatest = (units * unit * check.largest_logit for units in ROUNDING_TOLERANCE)
        good = check.mean_difference <= mean and (check.max_difference <= greatest or family.routes)
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
    source: Source, family: Family, scheme: Scheme, cloud: Path, device: Path, samples: Samples, head: Head
) -> None:
    """The transformation itself, in float32, against the original: logits, or hidden states if the cloud has none.

    Both get what the device's graphs give, hidden or not.
    """
    config, key = _config(cloud), scheme.user_key("check", head=head)
    read_plain = original(source, family, torch.float32)

    def read_original(name: str) -> torch.Tensor:
        row = family.axes(name)
        tensor = read_plain(name)
        return torch.zeros_like(tensor) if isinstance(row, OnDevice) else tensor

    def read_transformed(name: str) -> torch.Tensor:
        row, tensor = family.axes(name), read_original(name)
        return tensor if isinstance(row, OnDevice | Dropped) else scheme.act(name, tensor, row, source.read)

    bare, sent = _sent(device, samples, None), _sent(device, samples, key)
    if head == "cloud":
        pooled = has_pooler(source)
        expected = streamed(config, read_original, from_sent(family, bare, pooled=pooled))
        revealed = _revealed(key, streamed(config, read_transformed, from_sent(family, sent, pooled=pooled)))
    else:
        expected = streamed(config, read_original, hidden_from_sent(bare))
        revealed = key.reveal_hidden(streamed(config, read_transformed, hidden_from_sent(sent)))
        if (gain := folded_gain(source, family, scheme)) is not None:
            revealed = revealed * gain.numpy()
    worst, largest = float(np.abs(revealed - expected).max()), float(np.abs(expected).max())
    if not worst <= TOLERANCE * largest:
        raise EquivalenceError(
            f"equivalence check, before rounding: results differ by up to {worst:.2e} where the largest is "
            f"{largest:.1f}, wanted at most {TOLERANCE:.0e} of it",
            hint="nothing was written; this is a defect of the table or the scheme, please report it",
        )


def written_rows(
    family: Family, cloud: Path, device: Path, samples: Samples, head: Head = "cloud", *, pooled: bool = True
) -> np.ndarray:
    """Rows [n, width] that the two folders give together, revealed."""
    key = UserKey.load(device / "key.safetensors")
    config, weights, sent = _config(cloud), cloud_weights(cloud), _sent(device, samples, key)

    def read_written(name: str) -> torch.Tensor:
        # What is absent is not used either: modules that embed are not called, and nothing reads their tables.
        if name not in weights.shapes:
            raise EquivalenceError(f"equivalence check: the stock model reads {name!r}, which is not in the cloud")
        return weights.read(name)

    if head == "cloud":
        return _revealed(key, streamed(config, read_written, from_sent(family, sent, pooled=pooled)))
    rows = key.reveal_hidden(streamed(config, read_written, hidden_from_sent(sent)))
    return run_onnx(device / CLASSIFIER, hidden=rows)


def _config(cloud: Path) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(cloud)
    return config


def _revealed(key: UserKey, rows: Array) -> Array:
    """Logits where the key reveals any, else hidden states."""
    return key.reveal_rows(rows) if key.vocab is not None else key.reveal_hidden(rows)


def _sent(device: Path, samples: Samples, key: UserKey | None) -> Sent:
    """What a device makes of the samples; without a key, in plain."""

    def hide(embeddings: Array, name: str = "hide") -> torch.Tensor:
        return torch.from_numpy(embeddings if key is None else getattr(key, name)(embeddings))

    if samples.ids is None:
        assert samples.images is not None
        return Sent(hide(_patches(device, samples.images)))
    text = _embedded(device, samples.ids)
    if samples.target is not None:
        return Sent(hide(_embedded(device, samples.target)), hide(text, "hide_encoder"))
    if samples.images is not None:
        images = hide(_patches(device, samples.images), "hide_encoder")
        return Sent(hide(text), images, IMAGE_AT, samples.image_tokens)
    return Sent(hide(text))


def _embedded(device: Path, ids: np.ndarray) -> Array:
    """embedding.onnx's rows for ids [sequences, positions]."""
    sequences, positions = ids.shape
    rows = run_onnx(device / "embedding.onnx", ids=ids.reshape(-1), positions=np.tile(np.arange(positions), sequences))
    return rows.reshape(*ids.shape, -1)


def _patches(device: Path, images: np.ndarray) -> Array:
    return np.stack([run_onnx(device / IMAGE, pixels=image) for image in images])


def run_onnx(path: Path, **inputs: np.ndarray) -> np.ndarray:
    """The one output of a graph that is run once: folding its constants first would hold its table twice. Inputs that
    the graph does not have are left out."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    known = {one.name for one in session.get_inputs()}
    output: np.ndarray = session.run(None, {name: value for name, value in inputs.items() if name in known})[0]
    return output


def _compared(expected: np.ndarray, revealed: np.ndarray, rounded: bool) -> Check:
    difference = np.abs(expected - revealed)
    worst = float(difference.max())
    top = np.partition(expected, -2, axis=-1)[..., -2:] if expected.shape[-1] > 1 else expected
    margin = top[..., -1] - top[..., 0]
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
