"""The check that ends every export: what it lets pass in each dtype, and that it catches a map that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import bundle
from export.bundle import export_model
from export.check import ROUNDING_TOLERANCE, Check
from export.rotation import Blocks, Rotation, Scaled
from export.samples import sample_ids
from export.scheme import Head, random_permutation
from export.spaces import After, Gain
from shared.errors import EquivalenceError
from shared.wire import FloatName

KIND = "llama-tied"


@pytest.fixture
def exported(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[..., Check]:
    """Exports and gives the figures of the check."""

    def export(**options: Any) -> Check:
        return export_model(str(tiny_checkpoints(KIND)), tmp_path / "outputs" / "out", **options).check

    return export


@pytest.mark.parametrize("head", ["cloud", "device"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rotation_in_16_bits_passes_and_says_that_it_rounded(
    dtype: FloatName, head: Head, exported: Callable[..., Check]
) -> None:
    check = exported(scheme="rotation", dtype=dtype, head=head)
    assert check.rounded
    unit = torch.finfo(bundle.DTYPES[dtype]).eps / 2 * check.largest_logit
    # Seen over all tiny kinds: 0.3 to 0.65 of a unit on average, at most 7; the tolerances are 4 and 64.
    mean, greatest = ROUNDING_TOLERANCE
    assert 0.05 < check.mean_difference / unit < mean / 2
    assert check.max_difference / unit < greatest / 2
    assert check.same_top_token > 0.9 * check.positions


@pytest.mark.parametrize("head", ["cloud", "device"])
def test_a_rotation_in_float32_is_held_to_the_function(head: Head, exported: Callable[..., Check]) -> None:
    check = exported(scheme="rotation", dtype="float32", head=head)
    assert not check.rounded
    assert check.max_difference <= 1e-4 * check.largest_logit
    assert check.same_top_token + check.near_ties == check.positions


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_permutation_rounds_nothing_in_any_dtype(dtype: FloatName, exported: Callable[..., Check]) -> None:
    check = exported(scheme="permutation", dtype=dtype)
    assert not check.rounded
    assert check.max_difference <= 1e-4 * check.largest_logit


# --- what is wrong is caught ---


def _key_turned_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = Rotation._planes

    def wrong(self: Rotation, heads: int, dim: int) -> Any:
        return planes(self, heads, dim)[0], planes(self, heads, dim)[1]

    monkeypatch.setattr(Rotation, "_planes", wrong)


def _gains_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    act = Rotation.act

    def wrong(self: Rotation, name: str, tensor: torch.Tensor, axes: Any, read: Any) -> torch.Tensor:
        bare = tuple(axis.space if isinstance(axis, After) else axis for axis in axes)
        return act(self, name, tensor, bare, read)

    monkeypatch.setattr(Rotation, "act", wrong)


def _one_gain_not_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    act = Rotation.act

    def wrong(self: Rotation, name: str, tensor: torch.Tensor, axes: Any, read: Any) -> torch.Tensor:
        kept = isinstance(axes[0], Gain) and name == "model.layers.1.input_layernorm.weight"
        return tensor if kept else act(self, name, tensor, axes, read)

    monkeypatch.setattr(Rotation, "act", wrong)


def _attended_otherwise_than_values(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Rotation._draw_heads

    def wrong(self: Rotation, heads: Any) -> None:
        draw(self, heads)
        attended = self._secrets[heads.attended]
        assert isinstance(attended, Blocks)
        self._secrets[heads.attended] = Blocks(attended.order, attended.matrices.transpose(0, 2, 1))

    monkeypatch.setattr(Rotation, "_draw_heads", wrong)


def _product_not_scaled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Rotation._draw_gated

    def wrong(self: Rotation, gated: Any) -> None:
        draw(self, gated)
        product = self._secrets[gated.product]
        assert isinstance(product, Scaled)
        self._secrets[gated.product] = product.order

    monkeypatch.setattr(Rotation, "_draw_gated", wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "broken",
    [
        _key_turned_otherwise,
        _gains_not_folded,
        _one_gain_not_taken_out,
        _attended_otherwise_than_values,
        _product_not_scaled_back,
    ],
)
def test_a_broken_rotation_is_caught_and_leaves_nothing_behind(
    broken: Callable[[pytest.MonkeyPatch], None],
    dtype: FloatName,
    exported: Callable[..., Check],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(monkeypatch)
    with pytest.raises(EquivalenceError, match="logits differ" if dtype == "float32" else "before rounding"):
        exported(scheme="rotation", dtype=dtype)
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_classifier_in_another_order_than_the_key_says_is_caught(
    dtype: FloatName, exported: Callable[..., Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hidden states are right: what catches it is the comparison of logits, in 16 bits before they are rounded.
    act = Rotation.act

    def wrong(self: Rotation, name: str, tensor: torch.Tensor, axes: Any, read: Any) -> torch.Tensor:
        moved = act(self, name, tensor, axes, read)
        return moved[random_permutation(len(moved))] if name == "lm_head.weight" else moved

    monkeypatch.setattr(Rotation, "act", wrong)
    with pytest.raises(EquivalenceError, match="logits differ" if dtype == "float32" else "before rounding"):
        exported(scheme="rotation", dtype=dtype)
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.parametrize("head", ["cloud", "device"])
def test_a_key_of_another_basis_is_caught(
    head: Head, exported: Callable[..., Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Rotation.user_key

    def wrong(self: Rotation, key_id: str, *, head: Head = "cloud") -> Any:
        right = key(self, key_id, head=head)
        return type(right)(right.key_id, right.residual[:, ::-1].copy(), right.vocab)

    monkeypatch.setattr(Rotation, "user_key", wrong)
    with pytest.raises(EquivalenceError, match="before rounding"):
        exported(scheme="rotation", dtype="bfloat16", head=head)
    assert list((tmp_path / "outputs").iterdir()) == []


def test_two_tokens_that_change_places_are_caught(
    exported: Callable[..., Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In 16 bits two rows of many weigh little in a mean: the logits before rounding tell.
    act = Rotation.act

    def wrong(self: Rotation, name: str, tensor: torch.Tensor, axes: Any, read: Any) -> torch.Tensor:
        moved = act(self, name, tensor, axes, read)
        if name == "lm_head.weight":
            moved[[0, 1]] = moved[[1, 0]]
        return moved

    monkeypatch.setattr(Rotation, "act", wrong)
    with pytest.raises(EquivalenceError, match="before rounding"):
        exported(scheme="rotation", dtype="bfloat16")


# --- what is tried ---


def test_the_sample_is_text_and_an_even_draw_from_the_vocabulary() -> None:
    ids = sample_ids(320, [5, 6, 7])
    assert ids.shape == (2, 64) and ids.dtype == np.int64
    assert list(ids[0, :5]) == [5, 6, 7, 5, 6]
    assert ids[1].min() >= 0 and ids[1].max() < 320 and len(set(ids[1])) > 40
    assert (sample_ids(320, [])[0] == sample_ids(320, [])[1][::-1]).all()
