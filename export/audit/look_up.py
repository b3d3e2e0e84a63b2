"""Attacks by who knows the embedding table: what travels is one of its rows, reordered or turned."""

from __future__ import annotations

import numpy as np
import torch

from export.audit.attack import Attack, Outcome
from export.audit.matching import nearest, nearest_number
from export.audit.scene import Scene
from shared.key import Index
from shared.wire import Array

TOKENS = 1000  # of real text that an attack reads
LATER = 500  # tokens that are read with what was learnt
KNOWN_PROMPT = 100  # tokens
SEEDS = 12  # vectors that are first brought into agreement, before all others follow


def sorted_entries(vectors: Array) -> Array:
    """What every reordering of a vector's entries leaves as it is."""
    return np.sort(vectors, axis=1)


def norms(vectors: Array) -> Array:
    """What every rotation of a vector leaves as it is. [n, 1]"""
    lengths: Array = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return lengths


def _sorted_look_up(scene: Scene) -> Outcome:
    ids, sent, table = _traffic(scene)
    found = nearest(sorted_entries(sent), sorted_entries(table))
    return Outcome(float((found == ids).mean()), _what_follows(scene, sent, found))


def _norm_look_up(scene: Scene) -> Outcome:
    ids, sent, table = _traffic(scene)
    found = nearest_number(norms(sent)[:, 0], norms(table)[:, 0])
    return Outcome(float((found == ids).mean()), _what_follows(scene, sent, found))


def _gram_look_up(scene: Scene) -> Outcome:
    ids, sent, table = _traffic(scene)
    vectors, where = np.unique(sent, axis=0, return_inverse=True)
    found = match_inner_products(vectors, table, _rounding(scene.target.dtype))[where.reshape(-1)]
    return Outcome(float((found == ids).mean()), _what_follows(scene, sent, found))


def match_inner_products(vectors: Array, table: Array, rounding: float) -> Index:
    """The rows of `table` [vocab, width] that distinct `vectors` [n, width] are, in whatever orthogonal basis.

    Norms and pairwise inner products survive any rotation. A few vectors are brought into agreement by depth-first
    search over rows of the right norm; each further one is the row whose inner products with those fit best.
    rounding: relative error of each stored entry. Where no agreement is found, -1.
    """
    vectors, table = vectors.astype(np.float64), table.astype(np.float64)
    long, rows = np.linalg.norm(vectors, axis=1), np.linalg.norm(table, axis=1)
    # A rounded sum of `width` products is off by about the entries' error over the square root of the width.
    slack = 6 * rounding / np.sqrt(table.shape[1])
    candidates = [np.flatnonzero(np.abs(rows - one) <= slack * one) for one in long]
    order = sorted(range(len(vectors)), key=lambda at: (len(candidates[at]) == 0, len(candidates[at])))
    chosen: list[int] = []
    budget = [200_000]

    def fits(at: int, row: int) -> bool:
        before = order[: len(chosen)]
        seen, wanted = vectors[before] @ vectors[at], table[chosen] @ table[row]
        return bool((np.abs(seen - wanted) <= 2 * slack * long[before] * long[at]).all())

    def search() -> bool:
        if len(chosen) == min(SEEDS, len(order)):
            return True
        at = order[len(chosen)]
        for row in candidates[at]:
            budget[0] -= 1
            if budget[0] < 0:
                return False
            if fits(at, int(row)):
                chosen.append(int(row))
                if search():
                    return True
                chosen.pop()
        return False

    if not search():
        return np.full(len(vectors), -1)
    return _grow(vectors, table, order[: len(chosen)], chosen)


def _grow(vectors: Array, table: Array, seeds: list[int], rows: list[int]) -> Index:
    """From a few matched vectors to all: more known vectors are more coordinates, and these find more."""
    found = np.full(len(vectors), -1)
    found[seeds] = rows
    known = list(seeds)
    while True:
        coordinates = vectors @ vectors[known].T
        public = table @ table[found[known]].T
        guess = nearest(
            np.hstack([coordinates, (vectors**2).sum(1, keepdims=True)]),
            np.hstack([public, (table**2).sum(1, keepdims=True)]),
        )
        if len(known) == len(vectors):
            return guess
        # the best-fitting ones are trusted for the next round, twice as many each time
        misfit = np.abs(coordinates - public[guess]).max(1)
        known = list(np.argsort(misfit, kind="stable")[: min(2 * len(known), len(vectors))])
        found = guess


def _what_follows(scene: Scene, sent: Array, found: Index) -> dict[str, float]:
    """What the recovered tokens give away of the text after them."""
    right = found >= 0
    later = scene.text.secret[TOKENS : TOKENS + LATER]
    seen = decode_by_known(scene.sent(later), sent[right], scene.table[found[right]], scene.table)
    return {"later_tokens": float((seen == later).mean())}


def decode_by_known(vectors: Array, hidden: Array, plain: Array, table: Array) -> Index:
    """Rows of `table` that `vectors` are, from pairs `hidden` ↔ `plain` [n, width]: least squares on what they span.

    With pairs that span all of the space this is the basis itself; with fewer it is the part of it that they show.
    """
    if not len(hidden):
        return np.full(len(vectors), -1)
    solution = solve(hidden, plain)
    return nearest(vectors @ solution, _within(plain, table))


def solve(hidden: Array, plain: Array) -> Array:
    """The matrix of least norm that takes rows of `hidden` to rows of `plain`."""
    solution: Array = np.linalg.lstsq(hidden, plain, rcond=1e-4)[0]
    return solution


def _within(plain: Array, table: Array) -> Array:
    """Rows of `table`, projected to the span of `plain`."""
    _, size, directions = np.linalg.svd(plain, full_matrices=False)
    kept = directions[size > 1e-4 * size[0]]
    projected: Array = table @ kept.T @ kept
    return projected


def match_columns(hidden: Array, plain: Array) -> Index:
    """The feature that each position holds, if what was done to the rows of `plain` is a permutation."""
    return nearest(hidden.T, plain.T)


def _known_prompt(scene: Scene) -> Outcome:
    secret = scene.text.secret
    later = secret[TOKENS : TOKENS + LATER]
    sent = scene.sent(later)
    counts = [1, 2, 5, 10, 20, KNOWN_PROMPT, TOKENS]
    recovered, order = [], []
    for count in counts:
        known = secret[:count]
        hidden, plain = scene.sent(known), scene.table[known]
        recovered.append(float((decode_by_known(sent, hidden, plain, scene.table) == later).mean()))
        order.append(float((nearest(sent, scene.table[:, match_columns(hidden, plain)]) == later).mean()))
    best = recovered if scene.target.scheme == "rotation" else order  # the cloud's stip.json names the scheme
    return Outcome(
        best[counts.index(KNOWN_PROMPT)],
        {"tokens": counts, "recovered": best, "least_squares": recovered, "column_matching": order},
    )


def _traffic(scene: Scene) -> tuple[Index, Array, Array]:
    """True ids, the vectors that travelled for them, and the table in the values that travel."""
    ids = scene.text.secret[:TOKENS]
    table = torch.from_numpy(scene.table).to(scene.target.dtype).float().numpy()
    return ids, scene.sent(ids), table


def _rounding(dtype: torch.dtype) -> float:
    return max(float(torch.finfo(dtype).eps) / 2, 2e-6)  # float32: what a product with the basis adds


_TABLE = "the embedding table"
_READ = f"{TOKENS} tokens of real text"
ATTACKS = (
    Attack(
        name="table-sorted-entries",
        title="Look-up by sorted entries",
        knows=_TABLE,
        after=_READ,
        source="found while building STIP",
        run=_sorted_look_up,
    ),
    Attack(
        name="table-norms",
        title="Look-up by norm",
        knows=_TABLE,
        after=_READ,
        source="norms survive rotations",
        run=_norm_look_up,
    ),
    Attack(
        name="table-gram",
        title="Look-up by inner products, norms as a seed",
        knows=_TABLE,
        after=_READ,
        source="Gram matrices survive rotations",
        run=_gram_look_up,
    ),
    Attack(
        name="known-prompt",
        title="One known prompt, then everything after",
        knows=f"the embedding table and one prompt of {KNOWN_PROMPT} tokens",
        after=f"the {LATER} tokens after {TOKENS} others",
        source="STIP §5.3 (known plaintext); least squares",
        run=_known_prompt,
    ),
)
