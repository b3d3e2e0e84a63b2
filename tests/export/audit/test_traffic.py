"""Each attack on traffic works where nothing protects, and stops working when its key step is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.audit import lengths, traffic
from export.audit.attack import Attack, carry_out
from export.audit.scene import Scene, open_scene
from shared.key import Index
from shared.wire import Array

ATTACKS = (*traffic.ATTACKS, *lengths.ATTACKS)


def open_tiny(kind: str, exports: Callable[[str], Path], checkpoints: Callable[[str], Path]) -> Scene:
    """A tiny export before an attacker with its public weights, and a text short enough for a test."""
    scene = open_scene(exports(kind), str(checkpoints(kind)))
    text = replace(scene.text, secret=scene.text.secret[:20_000], public=scene.text.public[:20_000])
    return replace(scene, text=text)


@pytest.fixture(scope="module")
def scene(tiny_exports: Callable[[str], Path], tiny_checkpoints: Callable[[str], Path]) -> Scene:
    return open_tiny("llama-tied", tiny_exports, tiny_checkpoints)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: str(attack.name))
def test_the_control_succeeds(attack: Attack, scene: Scene) -> None:
    finding = carry_out(attack, scene)
    assert finding.skipped is None
    assert finding.control is not None and finding.control >= 0.99


def fresh_labels(vectors: Array, *_: float) -> Index:
    return np.arange(len(vectors)) // 2


def no_profiles(seen: list[object], known: list[object], labelled: Index, tokens: Index) -> Array:
    shape = (seen[0].shape[0], known[0].shape[0])  # type: ignore[attr-defined]
    return np.random.default_rng(0).random(shape, np.float32)


def first_rows(vectors: Array, rows: Array) -> tuple[Index, Array]:
    return np.arange(len(vectors)) % len(rows), np.ones(len(vectors), bool)


BROKEN = [
    (traffic.FREQUENCY, "labels", fresh_labels),
    (traffic.FREQUENCY, "match_profiles", no_profiles),
    (traffic.KNOWN_TEXT, "labels", fresh_labels),
    (traffic.TIED_HEAD, "nearest_rows", first_rows),
    (lengths.LENGTHS, "rows_in", lambda size, width: size // (width + 16)),
]


@pytest.mark.parametrize(("attack", "step", "wrong"), BROKEN, ids=lambda value: getattr(value, "name", None))
def test_the_control_fails_when_a_step_is_broken(
    attack: Attack, step: str, wrong: Callable[..., object], scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(scene, text=replace(scene.text, secret=scene.text.secret[:3_000], public=scene.text.public[:3_000]))
    monkeypatch.setattr(traffic if hasattr(traffic, step) else lengths, step, wrong)
    finding = carry_out(attack, short)
    assert finding.control is not None and finding.control < 0.9


def test_every_attack_here_is_broken_above() -> None:
    assert {attack.name for attack, _, _ in BROKEN} == {attack.name for attack in ATTACKS}


def test_what_was_known_is_read_wherever_it_is_sent_again(scene: Scene) -> None:
    outcome = traffic.KNOWN_TEXT.run(scene)
    assert outcome.figures["recovered"] == sorted(outcome.figures["recovered"])
    assert 0.2 < outcome.share < 1.0


def test_rounding_does_not_part_equal_tokens() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, 2_000)
    vectors = random.standard_normal((50, 32), np.float32)[tokens]
    noisy = vectors * (1 + 1e-7 * random.standard_normal(vectors.shape, np.float32))
    found = traffic.labels(noisy)
    assert len(np.unique(np.stack([tokens, found]), axis=1)[0]) == np.unique(tokens).size == np.unique(found).size


def test_a_folded_gain_is_undone_exactly() -> None:
    random = np.random.default_rng(0)
    plain = random.standard_normal((300, 16))
    basis, _ = np.linalg.qr(random.standard_normal((16, 16)))
    gain = 1 + 0.3 * random.standard_normal(16)
    rows, inputs = ((plain * gain) @ basis).astype(np.float32), (plain @ basis).astype(np.float32)
    assert np.allclose(traffic.undo_gain(inputs[:100], rows), inputs, atol=1e-3)


def test_an_untied_model_has_no_tied_head(
    tiny_exports: Callable[[str], Path], tiny_checkpoints: Callable[[str], Path]
) -> None:
    finding = carry_out(traffic.TIED_HEAD, open_tiny("llama", tiny_exports, tiny_checkpoints))
    assert finding.recovered is None and "not tied" in str(finding.skipped)
