"""Log-probabilities of a model's own distribution: at temperature 1, before bias, penalties and grammar."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from device_app.sampler import Row


@dataclass(frozen=True)
class TokenLogprobs:
    """The natural log of a chosen token's probability, and the most likely tokens with theirs, best first."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


def logprobs_of(row: Row, token: int, top: int) -> TokenLogprobs | None:
    """Those of `token` and of the `top` most likely, equal ones by plain id; None where only the full row can tell."""
    [places] = np.nonzero(row.ids == token)
    if not places.size:
        return None
    values, ids = row.values, row.ids
    if 0 < top <= len(values):
        edge = np.partition(values, -top)[-top]
        likely = np.flatnonzero(values >= edge)
        values, ids = values[likely], ids[likely]
    if top and not row.full and (top > len(values) or values.min() == row.values.min()):
        return None  # of those that were not sent, some may be among them, or equal to the last
    best = np.lexsort((ids, -values))[:top]
    logprobs = (values[best].astype(np.float64) - row.log_sum_exp_at_one).tolist()
    chosen = float(row.values[places[0]]) - row.log_sum_exp_at_one
    return TokenLogprobs(token, chosen, list(zip(ids[best].tolist(), logprobs, strict=True)))
