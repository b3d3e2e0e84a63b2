"""Noise on embeddings: what it buys and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from export.audit import noise
from export.audit.noise import ATTACKS, SIGMAS, decode
from export.audit.predictions import forward, perplexity
from export.scheme import SchemeName
from tests.export.audit.conftest import Scenes, at_random, control, named

NAMES = [attack.name for attack in ATTACKS]
# attack → the steps that it stands on, one at a time
BROKEN = [("noise", "decode"), ("noise", "by_norms")]


@pytest.fixture
def a_model_with_something_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """A price that grows with the noise. A model of random weights predicts nothing, so that noise costs it nothing:
    its perplexity stays about the size of the vocabulary, and any noise would be affordable."""
    monkeypatch.setattr(noise, "forward", lambda model, embeddings: embeddings)
    monkeypatch.setattr(noise, "perplexity", lambda embeddings, ids: float(np.linalg.norm(embeddings)))


@pytest.mark.usefixtures("a_model_with_something_to_lose")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_an_attack_reads_what_is_not_protected(name: str, dtype: Any, scenes: Scenes) -> None:
    assert control(named(ATTACKS, name), scenes("llama-tied", "rotation", dtype)).share >= 0.99


@pytest.mark.usefixtures("a_model_with_something_to_lose")
@pytest.mark.parametrize(("name", "step"), BROKEN)
def test_with_its_step_broken_it_reads_little(
    name: str, step: str, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, step, at_random(getattr(noise, step)))
    assert control(named(ATTACKS, name), scenes("llama-tied", "rotation")).share < 0.5


def test_every_attack_here_is_broken_above() -> None:
    assert list(dict.fromkeys(name for name, _ in BROKEN)) == NAMES


@pytest.mark.usefixtures("a_model_with_something_to_lose")
@pytest.mark.parametrize("scheme", ["permutation", "rotation"])
def test_the_noise_scored_is_the_strongest_within_the_price(scheme: SchemeName, scenes: Scenes) -> None:
    figures = named(ATTACKS, "noise").run(scenes("llama-tied", scheme)).figures
    prices = np.array(figures["perplexity"]) / figures["perplexity"][0]
    at = SIGMAS.index(figures["at"])
    assert prices[at] <= 1.1 < prices[at + 1]
    assert figures["at"] == 0.3  # √(1 + 0.3²) is below 1.1, √(1 + 0.5²) is not
    assert figures["recovered"][0] == 1.0 and figures["recovered"][-1] < 0.5


def test_without_the_base_the_attack_does_not_apply(scenes: Scenes) -> None:
    assert "--model" in str(ATTACKS[0].applies(scenes("llama-tied", base=False)))


# --- steps ---


def test_perplexity_is_the_stock_models_own(scenes: Scenes, tiny_checkpoints: Callable[[str], Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints("llama-tied"), dtype=torch.float32)
    scene = scenes("llama-tied")
    ids = torch.from_numpy(scene.text.secret[:100])
    with torch.inference_mode():
        expected = float(model(ids[None], labels=ids[None]).loss.exp())
    logits = forward(model, scene.table[ids.numpy()][None])
    assert perplexity(logits, ids[None].numpy()) == pytest.approx(expected, rel=1e-4)


def test_the_likeliest_token_is_the_nearest_row() -> None:
    table = np.eye(5, dtype=np.float32)
    assert list(decode(table[[3, 0]] + 0.1, table)) == [3, 0]
