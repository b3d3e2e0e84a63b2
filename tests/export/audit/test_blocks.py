"""Look-ups by blocks: what an order that keeps blocks together lets through, and that the step is what does it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from export.audit import blocks
from export.audit.attack import carry_out
from export.audit.blocks import (
    ATTACKS,
    by_all_blocks,
    by_as_many_entries,
    by_entries,
    by_lengths,
    by_one_block,
)
from export.audit.scene import Scene
from export.scheme import random_permutation
from shared.key import UserKey
from shared.wire import Array
from tests.export.audit.conftest import Scenes, as_it_is

BLOCK = 16
[ATTACK] = ATTACKS


def table_of(rows: int, width: int) -> Array:
    table: Array = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    return table


@pytest.fixture
def scene(scenes: Scenes) -> Scene:
    """A tiny model's, whose residual stream of 48 is ordered in blocks of 16."""
    plain = scenes("llama-tied", base=False)
    key = UserKey(plain.target.key.key_id, random_permutation(48, levels=(BLOCK,), moves=True), plain.target.key.vocab)
    every_token = replace(plain.text, secret=np.tile(np.arange(320), 5))
    return replace(plain, target=replace(plain.target, key=key, block=BLOCK), text=every_token)


def test_one_block_of_a_vector_names_its_token(scene: Scene) -> None:
    finding = carry_out(ATTACK, scene)
    assert finding.recovered == finding.control == 1.0
    assert finding.figures["features_in_a_block"] == BLOCK and finding.figures["by_all_blocks"] == 1.0


def test_in_a_free_order_one_block_names_no_token(scene: Scene) -> None:
    key = UserKey(scene.target.key.key_id, random_permutation(48, moves=True), scene.target.key.vocab)
    free = replace(scene, target=replace(scene.target, key=key))
    assert ATTACK.run(free).share < 0.1


def test_with_its_step_broken_it_reads_little(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "sorted_entries", as_it_is)
    assert ATTACK.run(scene).share < 0.1


def test_where_features_move_freely_there_is_nothing_to_look_up(scenes: Scenes) -> None:
    finding = carry_out(ATTACK, scenes("llama-tied"))
    assert finding.recovered is None and "no weights are stored quantised" in str(finding.skipped)


@pytest.mark.parametrize("match", [by_one_block, by_all_blocks, by_lengths, by_as_many_entries, by_entries])
def test_every_way_names_rows_that_were_reordered(match: blocks.Match) -> None:
    table = table_of(200, 64)
    sent = table[:, random_permutation(64, levels=(16,))]
    assert (match(sent[::-1], table, 16) == np.arange(200)[::-1]).all()


def test_blocks_are_matched_whichever_comes_first() -> None:
    """Noise makes blocks change places in any list of them by size: they are matched all the same."""
    table = table_of(200, 64)
    noise = 0.1 * np.random.default_rng(1).normal(size=table.shape).astype(np.float32)
    sent = (table + noise)[:, random_permutation(64, levels=(16,))]
    assert (by_all_blocks(sent, table, 16) == np.arange(200)).all()
