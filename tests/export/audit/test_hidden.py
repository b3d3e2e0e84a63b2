"""Prompts from hidden states: they are read from inner products, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from export.audit import hidden
from export.audit.hidden import ATTACKS, States, invariants, misfits, shallow
from export.rotation import random_orthogonal
from export.scheme import SchemeName
from tests.export.audit.conftest import Scenes, at_random, control, named

NAMES = [attack.name for attack in ATTACKS]
# attack → the steps that it stands on, one at a time
BROKEN = [("hidden-vocabulary", "misfits"), ("hidden-vocabulary", "invariants")]


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "PREFIX", 5)
    monkeypatch.setattr(hidden, "PROMPTS", 1)
    monkeypatch.setattr(hidden, "BATCH", 100)  # some of the 320 tokens at a time, and a last batch that is smaller


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_an_attack_reads_what_is_not_protected(name: str, dtype: Any, scenes: Scenes) -> None:
    assert control(named(ATTACKS, name), scenes("llama-tied", "rotation", dtype)).share >= 0.99


@pytest.mark.parametrize(("name", "step"), BROKEN)
def test_with_its_step_broken_it_reads_little(
    name: str, step: str, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden, step, at_random(getattr(hidden, step)))
    assert control(named(ATTACKS, name), scenes("llama-tied", "rotation")).share < 0.5


def test_every_attack_here_is_broken_above() -> None:
    assert list(dict.fromkeys(name for name, _ in BROKEN)) == NAMES


@pytest.mark.parametrize("scheme", ["permutation", "rotation"])
def test_who_has_the_weights_reads_hidden_states_of_both_schemes(scheme: SchemeName, scenes: Scenes) -> None:
    outcome = named(ATTACKS, "hidden-vocabulary").run(scenes("llama-tied", scheme))
    assert outcome.share == 1.0
    assert (outcome.figures["tokens"], outcome.figures["layers"]) == (5, hidden.LAYERS)
    assert outcome.figures["tried_per_token"] <= 320


@pytest.mark.parametrize("layers", [1, 5])  # the model has 3
def test_it_reads_from_as_many_layers_as_there_are(
    layers: int, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden, "LAYERS", layers)
    outcome = named(ATTACKS, "hidden-vocabulary").run(scenes("llama-tied", "rotation"))
    assert outcome.share == 1.0 and outcome.figures["layers"] == min(layers, 3)


def test_without_the_base_the_attack_does_not_apply(scenes: Scenes) -> None:
    assert "--model" in str(ATTACKS[0].applies(scenes("llama-tied", base=False)))


# --- steps ---


def test_states_are_those_of_the_stock_model_token_by_token_or_at_once(
    scenes: Scenes, tiny_checkpoints: Callable[[str], Any]
) -> None:
    scene = scenes("llama-tied")
    assert scene.base is not None
    ids = [5, 300, 17, 5]
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints("llama-tied"), dtype=torch.float32)
        expected = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    states = States(shallow(scene.base, 2))
    table = torch.from_numpy(scene.table)
    whole, _ = states(table[ids][None])
    assert whole.shape == (1, 4, 2, 48)
    for layer in range(2):
        assert torch.allclose(whole[:, :, layer], expected[layer + 1], atol=1e-4)
    cache, one_by_one = None, []
    for token in ids:
        state, cache = states(table[[token]][None], cache)
        one_by_one.append(state)
    assert torch.allclose(torch.cat(one_by_one, 1), whole, atol=1e-4)


def test_a_basis_changes_no_inner_product_and_no_misfit() -> None:
    generator = torch.Generator().manual_seed(0)
    states, earlier = torch.randn(7, 3, 16, generator=generator), torch.randn(5, 16, generator=generator)
    basis = torch.from_numpy(random_orthogonal(1, 16)[0]).float()
    assert torch.allclose(invariants(states @ basis, earlier @ basis), invariants(states, earlier), atol=1e-4)
    fits = misfits(states, states[3] @ basis, earlier, earlier @ basis)
    assert int(fits.argmin()) == 3 and fits[3] < 1e-5 and np.sort(fits.numpy())[1] > 0.1
