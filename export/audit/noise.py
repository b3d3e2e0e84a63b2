"""What noise on the embeddings would buy, and its price in accuracy: why there is no noisy scheme."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.audit.attack import Attack, Outcome, needs, needs_base, needs_next_tokens
from export.audit.base import by_norms, reading_rows
from export.audit.inputs import Tokens
from export.audit.matching import nearest, turn
from export.audit.predictions import forward, perplexity
from export.audit.scene import Scene, unprotected
from shared.key import Index
from shared.wire import Array

SIGMAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)  # of the noise, in spreads of the embedding table
TOKENS = 512
PRICE = 1.1  # a perplexity that many times the original's is a price a user would notice


def decode(vectors: Any, table: Any) -> Any:
    """The likeliest tokens under Gaussian noise: the nearest rows."""
    return nearest(vectors, table)


def _noise(scene: Scene, sigmas: tuple[float, ...]) -> Outcome:
    longest = TOKENS if scene.tokens.positions is None else min(TOKENS, len(scene.tokens.positions))
    prompt = scene.text.secret[None, :longest]
    ids, places = prompt[0], scene.tokens.places(*prompt.shape)[0]
    basis = by_norms(reading_rows(scene))
    plain = turn(scene.sent(prompt)[0], basis)
    model = scene.public.model()
    spread = float(scene.table.std())
    noise = np.random.default_rng(0).normal(size=plain.shape).astype(np.float32)
    recovered, perplexities = [], []
    for sigma in sigmas:
        noisy = plain + sigma * spread * noise
        recovered.append(float((_decoded(noisy, scene.tokens, places) == ids).mean()))
        perplexities.append(perplexity(forward(model, noisy[None]), prompt))
    affordable = [at for at, value in enumerate(perplexities) if value <= PRICE * perplexities[0]][-1]
    figures = {"sigma": list(sigmas), "recovered": recovered, "perplexity": perplexities, "at": sigmas[affordable]}
    return Outcome(recovered[affordable], figures)


def _decoded(noisy: Array, tokens: Tokens, places: Index) -> Index:
    return tokens.look_up(places, lambda here, rows: decode(noisy[here], rows))


ATTACKS = (
    Attack(
        name="noise",
        title="Gaussian noise on embeddings, read all the same",
        knows="the public base model",
        after=f"{TOKENS} tokens at the strongest noise that costs at most 10 % of perplexity",
        source="nearest neighbour, the likeliest token under such noise",
        run=lambda scene: _noise(scene, SIGMAS),
        control=lambda scene: _noise(scene.with_target(unprotected(scene)), SIGMAS[:2]),
        applies=needs(needs_next_tokens, needs_base),
    ),
)
