"""What noise on the embeddings would buy, and its price in accuracy: why there is no noisy scheme."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from export.audit.attack import Attack, Outcome, needs_base
from export.audit.base import by_norms, reading_rows
from export.audit.matching import nearest, turn
from export.audit.scene import Scene, unprotected

SIGMAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)  # of the noise, in spreads of the embedding table
TOKENS = 512
PRICE = 1.1  # a perplexity that many times the original's is a price a user would notice


def decode(vectors: Any, table: Any) -> Any:
    """The likeliest tokens under Gaussian noise: the nearest rows."""
    return nearest(vectors, table)


def _noise(scene: Scene, sigmas: tuple[float, ...]) -> Outcome:
    assert scene.base is not None
    ids = scene.text.secret[:TOKENS]
    basis = by_norms(reading_rows(scene, "gate"))
    plain = turn(scene.sent(ids), basis)
    model = scene.base.model()
    spread = float(scene.table.std())
    noise = np.random.default_rng(0).normal(size=plain.shape).astype(np.float32)
    recovered, perplexities = [], []
    for sigma in sigmas:
        noisy = plain + sigma * spread * noise
        recovered.append(float((decode(noisy, scene.table) == ids).mean()))
        perplexities.append(perplexity(model, torch.from_numpy(noisy), torch.from_numpy(ids)))
    affordable = [at for at, value in enumerate(perplexities) if value <= PRICE * perplexities[0]][-1]
    figures = {"sigma": list(sigmas), "recovered": recovered, "perplexity": perplexities, "at": sigmas[affordable]}
    return Outcome(recovered[affordable], figures)


@torch.inference_mode()
def perplexity(model: Any, embeddings: torch.Tensor, ids: torch.Tensor) -> float:
    """Of text [tokens] given its embeddings [tokens, hidden]."""
    logits = model(inputs_embeds=embeddings[None, :-1]).logits[0]
    return float(torch.nn.functional.cross_entropy(logits, ids[1:]).exp())


ATTACKS = (
    Attack(
        name="noise",
        title="Gaussian noise on embeddings, read all the same",
        knows="the public base model",
        after=f"{TOKENS} tokens at the strongest noise that costs at most 10 % of perplexity",
        source="nearest neighbour, the likeliest token under such noise",
        run=lambda scene: _noise(scene, SIGMAS),
        control=lambda scene: _noise(scene.with_target(unprotected(scene)), SIGMAS[:2]),
        applies=needs_base,
    ),
)
