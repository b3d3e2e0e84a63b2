"""Attacks by who has the base model: each reads what has no protection, and reads little with its step broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from export.audit import base
from export.audit.base import (
    ALIGNMENTS,
    ATTACKS,
    Pair,
    by_moments,
    by_norms,
    by_sorted_entries,
    fine_tuned,
    match_features,
    misfit,
    reading_rows,
    spectrum,
)
from export.rotation import random_orthogonal
from export.scheme import SchemeName, random_permutation
from shared.wire import Array
from tests.export.audit.conftest import Scenes, as_it_is, at_random, control, named, unit_basis

NAMES = [attack.name for attack in ATTACKS]
SCHEMES: list[SchemeName] = ["permutation", "rotation"]

Steps = dict[str, Callable[..., Any]]


def to(replacement: Callable[..., Any]) -> Callable[..., Any]:
    return lambda step: replacement


# attack → the steps that it stands on, and what takes their place
BROKEN: list[tuple[str, Steps]] = [
    ("base-sorted-entries", {"sorted_entries": to(as_it_is)}),
    ("base-sorted-entries", {"_permutation": to(unit_basis)}),
    ("base-norms", {"norms": at_random}),
    ("base-norms", {"procrustes": to(unit_basis)}),
    ("base-moments", {"_moments": at_random}),
    ("base-moments", {"refine": to(lambda pairs, basis: np.roll(basis, 1, axis=0))}),
    ("base-arrows", {"match_features": at_random}),
    ("base-arrows", {"by_norms": at_random}),
    ("base-singular-values", {"spectrum": at_random}),
    ("base-fine-tuned", {"sorted_entries": to(as_it_is), "procrustes": to(unit_basis)}),
]


@pytest.fixture(autouse=True)
def few_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "STRENGTHS", (0.0, 0.1, 0.5))


@pytest.mark.parametrize("kind", ["llama-tied", "llama-biases"])
@pytest.mark.parametrize("name", NAMES)
def test_an_attack_reads_what_is_not_protected(name: str, kind: str, scenes: Scenes) -> None:
    assert control(named(ATTACKS, name), scenes(kind, "rotation")).share >= 0.99


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_reads_what_is_not_protected_in_bfloat16(name: str, scenes: Scenes) -> None:
    assert control(named(ATTACKS, name), scenes("llama-tied", "rotation", "bfloat16")).share >= 0.99


@pytest.mark.parametrize(("name", "steps"), BROKEN, ids=[f"{name}-{'-'.join(steps)}" for name, steps in BROKEN])
def test_with_its_step_broken_it_reads_little(
    name: str, steps: Steps, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, replaced in steps.items():
        monkeypatch.setattr(base, step, replaced(getattr(base, step)))
    assert control(named(ATTACKS, name), scenes("llama-tied", "rotation")).share < 0.9


def test_every_attack_here_is_broken_above() -> None:
    assert list(dict.fromkeys(name for name, _ in BROKEN)) == NAMES


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["base-norms", "base-moments", "base-arrows", "base-singular-values"])
def test_who_has_the_weights_reads_both_schemes(name: str, scheme: SchemeName, scenes: Scenes) -> None:
    assert named(ATTACKS, name).run(scenes("llama-tied", scheme)).share >= 0.99


@pytest.mark.parametrize("name", ["base-norms", "base-moments", "base-arrows"])
def test_who_has_the_weights_reads_a_rotation_in_bfloat16(name: str, scenes: Scenes) -> None:
    assert named(ATTACKS, name).run(scenes("llama-tied", "rotation", "bfloat16")).share >= 0.99


def test_sorted_entries_align_a_permutation_and_no_rotation(scenes: Scenes) -> None:
    attack = named(ATTACKS, "base-sorted-entries")
    assert attack.run(scenes("llama-tied")).share == 1.0
    assert attack.run(scenes("llama-tied", "rotation")).share < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_without_the_base_no_attack_here_applies(name: str, scenes: Scenes) -> None:
    assert "--model" in str(named(ATTACKS, name).applies(scenes("llama-tied", base=False)))


def test_a_victim_ever_further_from_the_base_is_read_ever_less(scenes: Scenes) -> None:
    outcome = named(ATTACKS, "base-fine-tuned").run(scenes("llama-tied", "rotation"))
    assert outcome.figures["strengths"] == [0.0, 0.1, 0.5]
    assert list(outcome.figures["curves"]) == list(ALIGNMENTS)
    assert outcome.figures["recovered"][0] == 1.0
    assert outcome.figures["recovered"][-1] < 0.5


def test_noise_on_a_base_is_of_the_strength_said_and_spares_gains(scenes: Scenes) -> None:
    scene = scenes("llama-tied")
    near = fine_tuned(scene, 0.1)
    assert scene.base is not None and near.base is not None
    gate, gain = "model.layers.0.mlp.gate_proj.weight", "model.norm.weight"
    off = near.base.read(gate) - scene.base.read(gate)
    assert float(off.std() / scene.base.read(gate).std()) == pytest.approx(0.1, rel=0.1)
    assert (near.base.read(gate) == near.base.read(gate)).all()  # the same each time it is read
    assert (near.base.read(gain) == scene.base.read(gain)).all()
    assert (near.table == near.base.read("lm_head.weight").numpy()).all()  # tied, on both sides


# --- steps ---


def pairs_of(basis: Array, layers: int = 4, rows: int = 60) -> list[Pair]:
    """Tensors whose rows were reordered and turned. Their columns differ in spread, as a trained model's do."""
    generator = np.random.default_rng(0)
    width = len(basis)
    spread = generator.uniform(0.5, 2, (layers, 1, width))
    public = (generator.normal(size=(layers, rows, width)) * spread).astype(np.float32)
    turned = [(one[random_permutation(rows)] @ basis).astype(np.float32) for one in public]
    return [Pair(f"w{layer}", one, other) for layer, (one, other) in enumerate(zip(public, turned, strict=True))]


@pytest.mark.parametrize("align", [by_norms, by_moments])
def test_an_alignment_finds_the_basis_whatever_it_is(align: Callable[[list[Pair]], Array]) -> None:
    for _ in range(8):  # of eigenvectors only the axis is known: all signs may come out turned round
        basis = random_orthogonal(1, 16)[0]
        pairs = pairs_of(basis)
        found = align(pairs)
        assert np.abs(found - basis).max() < 1e-3
        assert misfit(pairs, found) < 1e-3 < 0.1 < misfit(pairs, -found)


def test_sorted_entries_find_a_permutation_and_no_other_basis() -> None:
    order = np.eye(16)[random_permutation(16)]
    assert (by_sorted_entries(pairs_of(order)) == order).all()
    pairs = pairs_of(random_orthogonal(1, 16)[0])
    assert misfit(pairs, by_sorted_entries(pairs)) > 0.1


def test_rows_are_matched_by_direction_whatever_their_scale_and_sign() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)
    order, scale = random_permutation(30), np.linspace(-2, 2, 30, dtype=np.float32)
    match, found = match_features(rows[order] * scale[:, None], rows)
    assert (match == order).all() and np.allclose(found, scale, atol=1e-5)


def test_a_spectrum_survives_any_basis_on_either_side() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 16))
    turned = random_orthogonal(1, 30)[0] @ rows @ random_orthogonal(1, 16)[0]
    assert np.allclose(spectrum(rows), spectrum(turned))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_read_the_stream_are_the_same_function_however_gains_are_kept(
    scheme: SchemeName, scenes: Scenes
) -> None:
    scene = scenes("llama-tied", scheme)
    pairs = reading_rows(scene)
    assert [pair.tensor for pair in pairs] == [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in range(3)]
    for pair in pairs:
        assert pair.public.shape == pair.hidden.shape == (80, 48)
        lengths = [np.sort(np.linalg.norm(rows, axis=1)) for rows in (pair.public, pair.hidden)]
        assert np.allclose(*lengths, rtol=1e-5)
