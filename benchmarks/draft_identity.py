"""Whether drafts change what is said: answers with and without, id for id, and what a difference was due to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address, Connection
from device_app.drafting import Drafting
from device_app.prompt import Prompt
from device_app.sampler import Row, Sampling, uniform
from device_app.session import Session

ROWS = 8  # of a draft, where numeric error is measured


def identity(
    bundle: Bundle, url: str, prompts: Sequence[str], tokens: int, samplings: Sequence[Sampling]
) -> list[dict[str, Any]]:
    """For each way of sampling: how many answers differ, and how many of these because two tokens were as good as
    equal: their margin in the logits (in the draw: of the random number to the border between them) is below twice the
    measured difference of logits that are asked for one by one and with a draft."""
    results = []
    for sampling in samplings:
        result = {"sampled": sampling.temperature > 0, "prompts": len(prompts), "tokens": 0, "drafted": 0}
        result |= {"accepted": 0, "differing": 0, "excused": 0}
        for number, prompt in enumerate(prompts):
            seeded = replace(sampling, seed=number)
            plain, ids, _ = _answer(bundle, url, prompt, seeded, tokens, Drafting(most=0))
            drafted, _, counters = _answer(bundle, url, prompt, seeded, tokens, Drafting())
            result["tokens"] += len(plain)
            result["drafted"] += counters.drafted
            result["accepted"] += counters.accepted
            if plain != drafted:
                at = next(at for at, pair in enumerate(zip(plain, drafted, strict=False)) if pair[0] != pair[1])
                margin, error = _margin(bundle, url, ids + plain[:at], (plain[at], drafted[at]), seeded)
                result["differing"] += 1
                result["excused"] += margin <= 2 * error
                print(f"prompt {number}: differs at token {at}, margin {margin:.1e}, numeric error {error:.1e}")
        results.append(result)
    return results


def _answer(
    bundle: Bundle, url: str, prompt: str, sampling: Sampling, tokens: int, drafting: Drafting
) -> tuple[list[int], list[int], Any]:
    """Ids of an answer, ids of its prompt, counters."""
    with Assistant(bundle, Address(url), drafting=drafting) as assistant:
        ids = assistant.prompt([{"role": "user", "content": prompt}], max_tokens=tokens).ids
        answer = assistant.answer(Prompt(ids), sampling=sampling, max_tokens=tokens).finish()
        return answer.ids, ids, answer.stats.counters


def _margin(
    bundle: Bundle, url: str, ids: list[int], either: tuple[int, int], sampling: Sampling
) -> tuple[float, float]:
    """How far the choice behind `ids` was from the other one, and the numeric error, both in logits."""
    alone, beside = _full_row(bundle, url, ids, 1), _full_row(bundle, url, ids, ROWS)
    error = float(np.abs(alone.values - beside.values).max())
    if not sampling.temperature:
        one, other = (float(alone.values[token]) for token in either)
        return abs(one - other), error
    logits = alone.values.astype(np.float64) / sampling.temperature
    order = np.lexsort((alone.ids, -logits))
    mass = np.cumsum(np.exp(logits[order] - logits.max()))
    kept = mass[np.searchsorted(mass, sampling.top_p * mass[-1])]
    borders = mass[[int(np.flatnonzero(order == token)[0]) for token in either]]
    # A logit that is off by e puts the borders off by a share e / temperature of the mass.
    draw = uniform(sampling.seed, len(ids)) * kept
    return float(np.abs(borders - draw).min() / kept) * sampling.temperature, error


def _full_row(bundle: Bundle, url: str, ids: list[int], rows: int) -> Row:
    """The logits behind `ids`, asked for as the first of some rows, or alone."""
    manifest = bundle.manifest
    session = Session(
        bundle.key, bundle.embed, bundle.classify, served_name=manifest.served_name, context=manifest.context
    )
    connection = Connection(session, Address(url))
    try:
        connection.rows(ids[:-1], top_k=1)
        following = ids + [ids[-1]] * (rows - 1)
        return connection.rows(following, rows=rows, top_k=0)[0]
    finally:
        connection.close()
