"""Look-ups by who knows the embedding table: each reads what has no protection, by the step it is named for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.audit import look_up
from export.audit.inputs import Tokens
from export.audit.look_up import ATTACKS, decode_by_known, match_inner_products, norms, solve, sorted_entries
from export.rotation import random_orthogonal
from export.scheme import SchemeName, random_permutation
from shared.wire import Array, FloatName
from tests.export.audit.conftest import Scenes, as_it_is, at_random, control, named

NAMES = [attack.name for attack in ATTACKS]
SCHEMES: list[SchemeName] = ["permutation", "rotation"]


def of_other_vectors(grow: Callable[..., Any]) -> Callable[..., Any]:
    """In place of growing from seeds: inner products of vectors that nobody sent."""
    return lambda vectors, *rest: grow(np.random.default_rng(0).normal(size=vectors.shape), *rest)


# attack → the steps that it stands on, and what takes their place. Known prompts are read in two ways: both must fail.
BROKEN: dict[str, dict[str, Callable[..., Any]]] = {
    "table-sorted-entries": {"sorted_entries": lambda step: as_it_is},
    "table-norms": {"norms": at_random},
    "table-gram": {"_grow": of_other_vectors},
    "known-prompt": {"solve": at_random, "match_columns": at_random},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_an_attack_reads_what_is_not_protected(name: str, dtype: FloatName, scenes: Scenes) -> None:
    assert control(named(ATTACKS, name), scenes("llama-tied", "rotation", dtype)).share >= 0.99


@pytest.mark.parametrize("name", BROKEN)
def test_with_its_step_broken_it_reads_little(name: str, scenes: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, replaced in BROKEN[name].items():
        monkeypatch.setattr(look_up, step, replaced(getattr(look_up, step)))
    assert control(named(ATTACKS, name), scenes("llama-tied")).share < 0.5


def test_every_attack_here_is_broken_above() -> None:
    assert list(BROKEN) == NAMES


@pytest.mark.parametrize(("broken", "left"), [("solve", "column_matching"), ("match_columns", "least_squares")])
def test_a_known_prompt_reads_on_in_two_ways(
    broken: str, left: str, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look_up, broken, at_random(getattr(look_up, broken)))
    figures = named(ATTACKS, "known-prompt").run(scenes("llama-tied")).figures
    assert figures[left][-2] >= 0.99
    assert figures["least_squares" if left == "column_matching" else "column_matching"][-2] < 0.5


def test_sorted_entries_read_a_permutation_and_no_rotation(scenes: Scenes) -> None:
    attack = named(ATTACKS, "table-sorted-entries")
    # All tokens equally often: one that is a fifth of a text would make a fifth of the score by chance.
    text = replace(scenes("llama-tied").text, secret=np.tile(np.arange(320), 5))
    assert attack.run(replace(scenes("llama-tied"), text=text)).share == 1.0
    assert attack.run(replace(scenes("llama-tied", "rotation"), text=text)).share < 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["table-norms", "table-gram", "known-prompt"])
def test_lengths_and_angles_read_both_schemes(name: str, scheme: SchemeName, scenes: Scenes) -> None:
    assert named(ATTACKS, name).run(scenes("llama-tied", scheme)).share >= 0.99


def test_inner_products_read_a_rotation_in_bfloat16(scenes: Scenes) -> None:
    assert named(ATTACKS, "table-gram").run(scenes("llama-tied", "rotation", "bfloat16")).share >= 0.99


def test_the_table_alone_is_enough(scenes: Scenes) -> None:
    scene = scenes("llama-tied", base=False)
    for attack in ATTACKS:
        assert attack.applies(scene) is None
        assert attack.run(scene).share == control(attack, scene).share == 1.0


# --- steps ---


def table_of(rows: int, width: int) -> Array:
    table: Array = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    return table


def test_reordering_leaves_sorted_entries_and_turning_leaves_norms() -> None:
    table = table_of(9, 16)
    assert (sorted_entries(table[:, random_permutation(16)]) == sorted_entries(table)).all()
    turned = table @ random_orthogonal(1, 16)[0]
    assert np.allclose(norms(turned), norms(table)) and norms(table).shape == (9, 1)


@pytest.mark.parametrize("sent", [1, 5, 60])
def test_inner_products_name_the_rows_in_any_basis(sent: int) -> None:
    table = table_of(200, 16)
    rows = random_permutation(200)[:sent]
    vectors = (table[rows] @ random_orthogonal(1, 16)[0]).astype(np.float32)
    assert (match_inner_products(vectors, table, 1e-6) == rows).all()


def test_inner_products_name_rows_of_equal_norm() -> None:
    table = table_of(200, 16)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    rows = random_permutation(200)[:40]
    vectors = (table[rows] @ random_orthogonal(1, 16)[0]).astype(np.float32)
    assert (match_inner_products(vectors, table, 1e-6) == rows).all()


def test_vectors_of_no_row_are_said_to_be_none() -> None:
    assert (match_inner_products(3 * table_of(6, 16), table_of(200, 16), 1e-6) == -1).all()


def test_least_squares_find_the_basis_from_as_many_pairs_as_the_space_is_wide() -> None:
    table, basis = table_of(40, 16), random_orthogonal(1, 16)[0].astype(np.float32)
    assert np.abs(solve(table[:16] @ basis, table[:16]) - basis.T).max() < 1e-3


def test_fewer_pairs_show_the_part_that_they_span() -> None:
    table, basis = table_of(200, 16), random_orthogonal(1, 16)[0].astype(np.float32)
    assert (decode_by_known(table @ basis, table[:4] @ basis, table[:4], Tokens(table)) == np.arange(200)).mean() > 0.9


def test_nothing_known_reads_nothing() -> None:
    empty = np.empty((0, 16), np.float32)
    assert (decode_by_known(table_of(3, 16), empty, empty, Tokens(table_of(9, 16))) == -1).all()
