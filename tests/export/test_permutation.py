"""The scheme: what it draws, and that no tensor stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.families import LLAMA
from export.permutation import Permutation
from export.scheme import random_permutation
from export.spaces import Features, Fixed, Heads
from shared.errors import FamilyError
from tests.checkpoints import TINY


def heads(query: int, key_value: int, dim: int) -> Heads:
    return Heads("query", "key", "value", "attended", query, key_value, dim)


def no_other(name: str) -> torch.Tensor:
    raise AssertionError("a permutation needs no other tensor")


@given(st.integers(1, 500))
def test_a_random_permutation_holds_every_index_once(size: int) -> None:
    assert sorted(random_permutation(size)) == list(range(size))


def test_equal_random_keys_are_drawn_again() -> None:
    draws = iter([b"\x07" * 8 * 3, bytes(range(24))])
    assert list(random_permutation(3, lambda count: next(draws))) == [0, 1, 2]


def test_every_order_of_three_comes_up_about_as_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        order = tuple(random_permutation(3))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6 and min(counts.values()) > 800


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_query_heads_follow_their_key_value_head(key_value: int, group: int, dim: int) -> None:
    permutation = Permutation([heads(key_value * group, key_value, dim)])
    index = permutation.index
    key_heads = index("key").reshape(key_value, dim) // dim
    query_heads = index("query").reshape(key_value, group, dim) // dim
    assert (query_heads // group == key_heads[:, None]).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_features_inside_query_and_key_heads_stay_for_rope(key_value: int, group: int, dim: int) -> None:
    index = Permutation([heads(key_value * group, key_value, dim)]).index
    for space in ("query", "key"):
        assert (index(space).reshape(-1, dim) % dim == np.arange(dim)).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_attended_features_move_as_the_values_they_mix(key_value: int, group: int, dim: int) -> None:
    index = Permutation([heads(key_value * group, key_value, dim)]).index
    value = index("value").reshape(key_value, 1, dim)
    attended = index("attended").reshape(key_value, group, dim)
    assert (attended % dim == value % dim).all()
    assert (attended // dim // group == value // dim).all()


def test_the_key_space_counts_heads_groups_features() -> None:
    drawn = Permutation([Features("ffn", 4), heads(4, 2, 3)])
    # (4! − 1) · ((2! − 1) head orders · (3! features · 2! group order)²): an order that moves nothing is not drawn
    assert drawn.log2_keys == pytest.approx(np.log2(23 * 1 * (6 * 2) ** 2))


def test_acting_moves_each_axis_by_its_own_space() -> None:
    drawn = Permutation([Features("a", 3), Features("b", 4)])
    tensor = torch.arange(12.0).reshape(3, 4)
    moved = drawn.act("w", tensor, ("a", "b"), no_other).numpy()
    assert (moved == tensor.numpy()[drawn.index("a")][:, drawn.index("b")]).all()


def test_a_fixed_axis_stays() -> None:
    drawn = Permutation([Features("a", 3)])
    tensor = torch.arange(3.0)
    assert torch.equal(drawn.act("w", tensor, (Fixed("reason"),), no_other), tensor)


def test_a_tensor_that_stays_says_why() -> None:
    drawn = Permutation([heads(3, 1, 4), Features("a", 50)])
    assert drawn.unmoved((Fixed("because"),)) == "because"
    assert "whole heads" in str(drawn.unmoved(("key",)))  # one key/value head: there is no other order
    assert drawn.unmoved(("key", "a")) is None


def test_a_shape_that_does_not_fit_its_space_is_named() -> None:
    drawn = Permutation([Features("a", 3)])
    with pytest.raises(FamilyError, match=r"'w': seen 4 on axis 0, wanted 3 \(a\)"):
        drawn.act("w", torch.zeros(4), ("a",), no_other)
    with pytest.raises(FamilyError, match=r"'w': seen 2 axes, wanted 1"):
        drawn.act("w", torch.zeros(3, 3), ("a",), no_other)


def test_a_seed_gives_the_same_draws_and_no_seed_does_not() -> None:
    import random

    structures = list(LLAMA.spaces(TINY["llama"]))
    one, two = (Permutation(structures, random.Random(7).randbytes).user_key("k") for _ in range(2))
    assert (one.residual == two.residual).all() and (one.vocab == two.vocab).all()
    three = Permutation(structures).user_key("k")
    assert (one.residual != three.residual).any()


def test_every_layer_has_its_own_draws() -> None:
    index = Permutation(LLAMA.spaces(TINY["llama"])).index
    assert (index("gate[0]") != index("gate[1]")).any() and (index("value[0]") != index("value[2]")).any()
