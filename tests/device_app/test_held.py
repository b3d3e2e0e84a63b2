"""What is sure of a KV cache, where one of several states is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_app.held import Held, common_prefix, in_common

ids = st.lists(st.integers(1, 2), max_size=5)
known = st.builds(lambda ids, source: Held(ids, source, len(ids)), ids, st.sampled_from([None, [1], [2]]))


@given(st.lists(known, min_size=1, max_size=4), st.data())
def test_what_is_sure_is_true_of_the_beginning_of_every_state(states: list[Held], data: st.DataObject) -> None:
    true = data.draw(st.sampled_from(states))
    length = data.draw(st.integers(0, len(true.ids)))
    sure = in_common(states)
    assert length <= sure.length
    left = sure.left(length)
    assert left.ids == true.ids[:length][: len(left.ids)]
    assert left.source in (None, true.source)


@given(st.lists(known, min_size=1, max_size=4))
def test_being_lost_twice_leaves_no_less(states: list[Held]) -> None:
    once = in_common(states)
    assert in_common([once]) == once


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([], [1], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 3, 3], 1),
    ],
)
def test_a_common_prefix_is_how_far_two_agree(one: list[int], other: list[int], common: int) -> None:
    assert common_prefix(one, other) == common


def test_another_source_leaves_nothing_sure_but_how_long_it_can_be() -> None:
    assert in_common([Held([1, 2], [7], 2), Held([], [8], 0)]) == Held([], None, 2)


def test_of_an_empty_cache_the_source_is_not_sure() -> None:
    assert Held([1, 2], [7], 2).left(0) == Held()
    assert Held([1, 2], [7], 2).left(1) == Held([1], [7], 1)
