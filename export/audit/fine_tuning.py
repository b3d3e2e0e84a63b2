"""The stolen model, trained: what it is worth to a thief who has a little text, against starting from nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from export.audit.attack import Attack, Outcome, needs, needs_no_positions
from export.audit.corpus import Text
from export.audit.predictions import Real, perplexity, windows
from export.audit.scene import Scene, Weights, unprotected
from export.audit.theft import name_rows, needs_model, own_table
from export.audit.traffic import needs_tied
from shared.key import Index
from shared.wire import Array

STEPS = (0, 2, 5)  # after which perplexity is measured
TOKENS = 128  # a step
HELD_OUT = 2  # windows of TOKENS
NAMED = "stolen, own classifier as its table, names from traffic"
# The thief's first two were the best of 1e-3, 3e-3 and 1e-2.
RATES = {"original": 1e-3, "scratch": 1e-2, "stolen": 1e-2, "stolen body, learned tables": 1e-2, NAMED: 1e-3}


def thief_tables(scene: Scene, *, keyed: bool) -> tuple[Array, Array]:
    """What a thief puts before and behind the stolen body: input table and classifier [vocab, hidden], plain ids.

    Without the key: the public table, and the stolen classifier's rows taken for plain ids. `keyed` is for the control.
    """
    rows, key = scene.target.weights.read(scene.classifier).numpy(), scene.target.key
    if not keyed:
        return scene.table, rows
    assert key.vocab is not None
    return scene.target.vectors(scene.table), rows[np.argsort(key.vocab)]


def _assembled(scene: Scene, weights: Weights, table: Array, rows: Array) -> Any:
    """A trainable model with a body, an input table, in which the model's scale is, and a classifier of its own."""
    own = {scene.embedding: table / np.float32(scene.tokens.scale), scene.classifier: rows}

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(own[name], np.float32)) if name in own else weights.read(name)

    shapes = {name: shape for name, shape in weights.shapes.items() if name not in own}
    return Weights(scene.target.weights.config, shapes | {name: own[name].shape for name in own}, read).model()


def train(model: Any, text: Text, rate: float, only: tuple[str, ...] = ()) -> list[float]:
    """Perplexity of held-out secret text after STEPS of training on public text. `only`: what learns; () for all.

    Adafactor (arXiv 1804.04235), whose state is a row and a column for each matrix: Adam's would double the memory.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not only or name in only)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.Adafactor(learned, lr=rate, weight_decay=0.0)
    lessons = torch.from_numpy(windows(text.public, STEPS[-1], TOKENS))
    exam = windows(text.secret, HELD_OUT, TOKENS)
    results = []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            results.append(perplexity(_examined(model, exam), exam))
        if step < STEPS[-1]:
            lesson = lessons[step : step + 1]
            optimizer.zero_grad()
            scores = model(input_ids=lesson, use_cache=False).logits[0, :-1]
            loss: Any = torch.nn.functional.cross_entropy(scores, lesson[0, 1:])
            loss.backward()
            optimizer.step()
    return [round(result, 2) for result in results]


@torch.inference_mode()
def _examined(model: Any, ids: Index) -> Real:
    logits: Real = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    return logits


@lru_cache(maxsize=1)  # the attack and its control measure by the same, on the same scene
def yardsticks(scene: Scene) -> tuple[list[float], list[float]]:
    """Perplexities of training the original, and a model of its sizes from scratch."""
    assert scene.base is not None
    rows = scene.base.read(scene.classifier).numpy()
    original = train(_assembled(scene, scene.base, scene.table, rows), scene.text, RATES["original"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = AutoModelForCausalLM.from_config(scene.target.weights.config).float().eval()
    return original, train(fresh, scene.text, RATES["scratch"])


def fine_tune(scene: Scene) -> Outcome:
    """What training the stolen model is worth, between training the original and starting from nothing."""
    original, scratch = yardsticks(scene)
    tables = thief_tables(scene, keyed=False)
    learned = (scene.embedding, scene.classifier)
    weights = scene.target.weights

    def trained(name: str, tables: tuple[Array, Array], only: tuple[str, ...] = ()) -> list[float]:
        return train(_assembled(scene, weights, *tables), scene.text, RATES[name], only)

    thieves = {
        "stolen": trained("stolen", tables),
        "stolen body, learned tables": trained("stolen body, learned tables", tables, learned),
    }
    if needs_tied(scene) is None:
        thieves[NAMED] = trained(NAMED, named_tables(scene))
    figures = {
        "steps": list(STEPS),
        "tokens_a_step": TOKENS,
        "perplexity": {"original": original, "scratch": scratch} | thieves,
    }
    return Outcome(worth(min(curve[-1] for curve in thieves.values()), original[-1], scratch[-1]), figures)


def named_tables(scene: Scene) -> tuple[Array, Array]:
    """Input table and classifier [vocab, hidden] of a tied stolen model, in the names that its traffic gave away."""
    table = own_table(scene)
    names = name_rows(scene, table)
    row = np.full(len(table), -1)  # of each token
    row[names[names >= 0]] = np.flatnonzero(names >= 0)
    row[row < 0] = np.setdiff1d(np.arange(len(table)), row)  # the others' names are anyone's guess
    rows: Array = scene.target.weights.read(scene.classifier).numpy()
    return table[row], rows[row]


def worth(stolen: float, original: float, scratch: float) -> float:
    """How far from scratch (0) to the original (1) a perplexity is, in logarithms."""
    return float(np.clip((np.log(scratch) - np.log(stolen)) / (np.log(scratch) - np.log(original)), 0.0, 1.0))


def fine_tune_in_order(scene: Scene) -> Outcome:
    """The control: a model whose features are in the open and whose names the traffic gives away, or the key."""
    original, scratch = yardsticks(scene)
    bare = scene.with_target(unprotected(scene))
    if needs_tied(scene) is None:  # the cipher's statistics are those of the text itself, so that every name is found
        tables = named_tables(replace(bare, text=replace(scene.text, public=scene.text.secret)))
    else:
        tables = thief_tables(bare, keyed=True)
    stolen = train(_assembled(bare, bare.target.weights, *tables), scene.text, RATES["original"])
    # Tokens of the lessons that were never sent have no name, so training may also lose a little: the best step counts.
    return Outcome(max(map(worth, stolen, original, scratch)), {"perplexity": stolen})


def _needs_text_alone(scene: Scene) -> str | None:
    kind = scene.family.kind
    return None if kind == "decoder" else f"tried on decoders of text alone, and this is a model of kind {kind}"


FINE_TUNING = Attack(
    name="theft-fine-tuning",
    title="The stolen model, fine-tuned",
    knows="the tokenizer, the public table and a little public text; for a tied model its traffic; matches no weights",
    after="the way from a fresh model's log-perplexity to the original's after the same short training",
    source="STIP (NDSS 2026), table 5, at a small scale",
    run=fine_tune,
    control=fine_tune_in_order,
    applies=needs(_needs_text_alone, needs_no_positions, needs_model),
)

ATTACKS = (FINE_TUNING,)
