"""Attacks by who knows the embedding table: what travels is one of its rows, reordered or turned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from export.audit.attack import Attack, Outcome, needs_text
from export.audit.inputs import Tokens
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


def _look_up(match: Callable[[Array, Array, torch.dtype], Index]) -> Callable[[Scene], Outcome]:
    """An attack that names vectors [n, hidden] by rows [vocab, hidden], both in the values that travel."""

    def run(scene: Scene) -> Outcome:
        ids, dtype = scene.text.secret[:TOKENS], scene.target.dtype
        sent = scene.sent(ids)

        def at_one_place(here: Index, rows: Array) -> Index:
            return match(sent[here], torch.from_numpy(rows).to(dtype).float().numpy(), dtype)

        found = scene.tokens.look_up(scene.tokens.places(ids.size), at_one_place)
        return Outcome(float((found == ids).mean()), _what_follows(scene, sent, found))

    return run


def _by_sorted_entries(sent: Array, rows: Array, dtype: torch.dtype) -> Index:
    return nearest(sorted_entries(sent), sorted_entries(rows))


def _by_norm(sent: Array, rows: Array, dtype: torch.dtype) -> Index:
    return nearest_number(norms(sent)[:, 0], norms(rows)[:, 0])


def _by_inner_products(sent: Array, rows: Array, dtype: torch.dtype) -> Index:
    vectors, where = np.unique(sent, axis=0, return_inverse=True)
    return match_inner_products(vectors, rows, _rounding(dtype))[where.reshape(-1)]


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
    plain = scene.tokens.embed(np.where(right, found, 0))[right]
    seen = decode_by_known(scene.sent(later), sent[right], plain, scene.tokens)
    return {"later_tokens": float((seen == later).mean())}


def decode_by_known(vectors: Array, hidden: Array, plain: Array, tokens: Tokens) -> Index:
    """Ids of a text's `vectors` [tokens, width], from pairs `hidden` ↔ `plain` [n, width]: least squares on what they
    span.

    With pairs that span all of the space this is the basis itself; with fewer it is the part of it that they show.
    """
    if not len(hidden):
        return np.full(len(vectors), -1)
    turned = vectors @ solve(hidden, plain)
    directions = _spanned(plain)
    spanned = tokens.mapped(lambda rows: rows @ directions.T @ directions)
    return spanned.look_up(tokens.places(len(vectors)), lambda here, rows: nearest(turned[here], rows))


def solve(hidden: Array, plain: Array) -> Array:
    """The matrix of least norm that takes rows of `hidden` to rows of `plain`."""
    solution: Array = np.linalg.lstsq(hidden, plain, rcond=1e-4)[0]
    return solution


def _spanned(plain: Array) -> Array:
    """An orthonormal basis [rank, width] of what rows span."""
    _, size, directions = np.linalg.svd(plain, full_matrices=False)
    kept: Array = directions[size > 1e-4 * size[0]]
    return kept


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
        hidden, plain = scene.sent(known), scene.tokens.embed(known)
        recovered.append(float((decode_by_known(sent, hidden, plain, scene.tokens) == later).mean()))
        order.append(float((_decode_by_order(sent, match_columns(hidden, plain), scene.tokens) == later).mean()))
    best = recovered if scene.turned else order
    return Outcome(
        best[counts.index(KNOWN_PROMPT)],
        {"tokens": counts, "recovered": best, "least_squares": recovered, "column_matching": order},
    )


def _decode_by_order(vectors: Array, order: Index, tokens: Tokens) -> Index:
    """Ids of a text's `vectors`, whose features stand in this order."""
    ordered = tokens.mapped(lambda rows: rows[:, order])
    return ordered.look_up(tokens.places(len(vectors)), lambda here, rows: nearest(vectors[here], rows))


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
        run=_look_up(_by_sorted_entries),
        applies=needs_text,
    ),
    Attack(
        name="table-norms",
        title="Look-up by norm",
        knows=_TABLE,
        after=_READ,
        source="norms survive rotations",
        run=_look_up(_by_norm),
        applies=needs_text,
    ),
    Attack(
        name="table-gram",
        title="Look-up by inner products, norms as a seed",
        knows=_TABLE,
        after=_READ,
        source="Gram matrices survive rotations",
        run=_look_up(_by_inner_products),
        applies=needs_text,
    ),
    Attack(
        name="known-prompt",
        title="One known prompt, then everything after",
        knows=f"the embedding table and one prompt of {KNOWN_PROMPT} tokens",
        after=f"the {LATER} tokens after {TOKENS} others",
        source="STIP §5.3 (known plaintext); least squares",
        run=_known_prompt,
        applies=needs_text,
    ),
)
