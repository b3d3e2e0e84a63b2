"""Each theft works where nothing protects, and stops working when its key step is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from export.audit import fine_tuning, theft
from export.audit.attack import Attack, carry_out
from export.audit.predictions import windows
from export.audit.scene import Scene, open_scene
from export.bundle import export_model
from shared.key import Index
from shared.wire import Array
from tests.checkpoints import TINY, tiny_tokenizer
from tests.export.audit.conftest import Scenes, control

ATTACKS = (*theft.ATTACKS, *fine_tuning.ATTACKS)


def trained(folder: Path, text: Index, steps: int = 60) -> Path:
    """A tiny tied checkpoint that has learnt something, as there is nothing to steal in a random one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY["llama-tied"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lessons = torch.from_numpy(windows(text, 8 * steps, 64))
    for step in range(steps):
        optimizer.zero_grad()
        lesson = lessons[8 * step : 8 * step + 8]
        model(input_ids=lesson, labels=lesson).loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + 0.2 * torch.randn(48))  # a gain that is worth undoing
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained"), scenes("llama-tied").text.public)


@pytest.fixture(scope="module", params=["permutation", "rotation"])
def scene(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    out = tmp_path_factory.mktemp("stolen") / "out"
    export_model(str(checkpoint), out, scheme=request.param)
    opened = open_scene(out, str(checkpoint))
    short = replace(opened.text, secret=opened.text.secret[:6_000], public=opened.text.public[:6_000])
    yield replace(opened, text=short)
    fine_tuning.yardsticks.cache_clear()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: str(attack.name))
def test_the_control_succeeds(attack: Attack, scene: Scene) -> None:
    assert control(attack, scene).share >= 0.99


def random_space(rows: Array) -> Array:
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((rows.shape[1], 48)))
    return basis.T


def plain_tables(scene: Scene) -> tuple[Array, Array]:
    return scene.table, scene.target.weights.read(scene.family.classifier).numpy()


def random_scores(hidden: Array, vectors: Array) -> Array:
    return np.random.default_rng(0).random((len(hidden), len(vectors)))


BROKEN = [
    (theft.FULL_LOGITS, "classifier_space", random_space),
    (theft.UNAUTHORIZED, "enter", lambda scene, ids: scene.table[ids][..., ::-1].copy()),
    (theft.OWN_TABLE, "own_table", lambda scene: scene.table),
    (theft.NO_CLASSIFIER, "classify_by_traffic", random_scores),
    (fine_tuning.FINE_TUNING, "named_tables", plain_tables),
]


@pytest.mark.parametrize(("attack", "step", "wrong"), BROKEN, ids=lambda value: getattr(value, "name", None))
def test_the_control_fails_when_a_step_is_broken(
    attack: Attack, step: str, wrong: Callable[..., object], scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theft if hasattr(theft, step) else fine_tuning, step, wrong)
    assert control(attack, scene).share < 0.9


def test_every_attack_here_is_broken_above() -> None:
    assert [attack for attack, _, _ in BROKEN] == list(ATTACKS)


def test_a_classifier_on_the_device_is_scored_by_traffic(checkpoint: Path, tmp_path: Path) -> None:
    export_model(str(checkpoint), tmp_path / "out", head="device")
    opened = open_scene(tmp_path / "out", str(checkpoint))
    short = replace(opened, text=replace(opened.text, secret=opened.text.secret[:6_000]))
    finding = carry_out(theft.NO_CLASSIFIER, short)
    assert finding.recovered is not None and finding.recovered >= 0.99
    assert all(carry_out(attack, short).skipped for attack in ATTACKS if attack is not theft.NO_CLASSIFIER)


def test_a_tied_model_is_stolen_whole_but_for_names(scene: Scene) -> None:
    outcome = theft.run_on_own_table(scene)
    assert outcome.share >= 0.99
    stolen = outcome.figures["perplexity_stolen_in_renamed_ids"]
    assert stolen == pytest.approx(outcome.figures["perplexity_original"], rel=0.01)


def test_full_rows_tell_the_hidden_size(scene: Scene) -> None:
    outcome = theft.read_classifier(scene)
    assert outcome.figures["rank"] == outcome.figures["hidden_size"]
    assert outcome.share >= 0.99
