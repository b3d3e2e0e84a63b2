"""Attacks on images: a class token that is always the same gives an order away, and weights give any basis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.audit import images
from export.audit.attack import carry_out
from export.audit.images import ATTACKS, order_of
from export.audit.scene import open_scene
from export.bundle import export_model
from export.scheme import SchemeName, random_permutation
from tests.export.audit.conftest import KindExports, Scenes, control, named


@pytest.mark.parametrize(("kind", "scheme"), [("vit", "permutation"), ("llava", "permutation"), ("llava", "rotation")])
def test_the_class_token_tells_the_order_of_features(kind: str, scheme: SchemeName, scenes: Scenes) -> None:
    outcome = named(ATTACKS, "image-class-token").run(scenes(kind, scheme))  # CLIP's stream is only reordered
    assert outcome.share == 1.0 and outcome.figures["first_row_is_the_same_in_all"]


def test_the_class_token_tells_no_basis_but_the_weights_do(scenes: Scenes) -> None:
    seen = scenes("vit", "rotation")
    assert named(ATTACKS, "image-class-token").run(seen).share == 0.0
    assert named(ATTACKS, "image-base-norms").run(seen).share == 1.0


@pytest.mark.parametrize(
    ("name", "step", "wrong"),
    [
        ("image-class-token", "order_of", lambda hidden, plain: np.arange(hidden.size)),
        ("image-base-norms", "by_norms", lambda pairs: np.eye(pairs[0].public.shape[1], dtype=np.float32)),
    ],
)
def test_with_its_step_broken_an_attack_on_images_reads_nothing(
    name: str, step: str, wrong: Callable[..., object], scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, step, wrong)
    assert control(named(ATTACKS, name), scenes("vit")).share == 0.0


def test_an_order_is_found_from_one_vector() -> None:
    plain, order = np.random.default_rng(0).normal(size=40), random_permutation(40)
    assert (order_of(plain[order], plain) == order).all()


def test_in_16_bits_the_class_token_is_not_tried(kind_exports: KindExports, tmp_path: Path) -> None:
    model = str(kind_exports("vit") / "model")
    export_model(model, tmp_path / "out", dtype="bfloat16")
    seen = open_scene(tmp_path / "out", model)
    assert "in 16 bits" in str(named(ATTACKS, "image-class-token").applies(seen))
    assert carry_out(named(ATTACKS, "image-base-norms"), seen).recovered == 1.0
