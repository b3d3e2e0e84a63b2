"""KV memory: every page has one holder, nothing is lost, and what cannot be had changes nothing."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cloud_backend.kv_cache import PAGE, KVCache, Last, PagePool, Pages
from cloud_backend.tensor_pool import RESERVED, LayerShape, TensorPool
from shared.errors import UsageError

SHAPE = LayerShape(heads=2, key_size=3, value_size=5)
PAGE_BYTES = PAGE * 4 * 2 * (3 + 5)  # of SHAPE in float32


def pool_of(pages: int, layers: int = 1) -> TensorPool:
    return TensorPool([SHAPE] * layers, torch.float32, torch.device("cpu"), pages * PAGE_BYTES * layers)


def holding(pool: PagePool, *pages: int) -> Pages:
    """A sequence that holds just these pages, in this order."""
    taken = [pool.take() for _ in range(pool.free)]
    pool.give([page for page in taken if page not in pages])
    held = Pages(pool)
    held._held = list(pages)
    held._number()
    return held


# --- sessions that come, grow, are cut and go ---


class Sessions(RuleBasedStateMachine):
    """Three sequences over one pool, each page of which is followed."""

    @initialize(pages=st.integers(1, 12))
    def open(self, pages: int) -> None:
        self.pool = pool_of(pages)
        self.sequences = [Pages(self.pool) for _ in range(3)]

    @rule(which=st.integers(0, 2), positions=st.integers(0, 13 * PAGE))
    def reserve(self, which: int, positions: int) -> None:
        pages, free = self.sequences[which], self.pool.free
        held, rows, lacking = len(pages), pages.rows.tolist(), pages.lacking(positions)
        assert pages.reserve(positions) == (lacking <= free)
        taken = lacking if lacking <= free else 0
        assert (len(pages), self.pool.free) == (held + taken, free - taken)
        assert pages.rows[: held * PAGE].tolist() == rows  # where its positions lie already, they stay

    @rule(which=st.integers(0, 2), positions=st.integers(0, 13 * PAGE))
    def trim(self, which: int, positions: int) -> None:
        pages, rows = self.sequences[which], self.sequences[which].rows.tolist()
        pages.trim(positions)
        assert pages.rows.tolist() == rows[: -(-positions // PAGE) * PAGE]

    @invariant()
    def no_page_is_held_twice(self) -> None:
        rows = list(chain.from_iterable(pages.rows.tolist() for pages in self.sequences))
        assert len(set(rows)) == len(rows)

    @invariant()
    def no_page_is_lost(self) -> None:
        assert sum(map(len, self.sequences)) + self.pool.free == self.pool.pages

    @invariant()
    def used_counts_what_is_held(self) -> None:
        assert self.pool.used == sum(map(len, self.sequences)) * PAGE_BYTES

    @invariant()
    def rows_are_in_the_pool_behind_what_is_reserved(self) -> None:
        end = self.pool.keys[0].shape[1]
        for row in chain.from_iterable(pages.rows.tolist() for pages in self.sequences):
            assert RESERVED * PAGE <= row < end

    @invariant()
    def a_span_is_the_rows_or_nothing(self) -> None:
        for pages in self.sequences:
            for positions in (0, 1, len(pages.rows) // 2, len(pages.rows)):
                check_span(pages, min(positions, len(pages.rows)))


def check_span(pages: Pages, positions: int) -> None:
    wanted, span = pages.rows[:positions].tolist(), pages.span(positions)
    side_by_side = wanted == list(range(wanted[0], wanted[0] + positions)) if wanted else False
    assert (list(range(span.start, span.stop)) if span else None) == (wanted if side_by_side else None)


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


# --- where sequences lie ---


@given(st.permutations(range(RESERVED, RESERVED + 5)), st.integers(0, 5 * PAGE))
def test_a_span_is_given_just_where_the_pages_follow_each_other(order: list[int], positions: int) -> None:
    check_span(holding(pool_of(5), *order), positions)


def test_pages_in_another_order_are_no_span_though_the_first_and_last_fit() -> None:
    first, second, third, fourth = range(RESERVED, RESERVED + 4)
    assert holding(pool_of(4), first, third, second, fourth).span(4 * PAGE) is None


def test_one_sequence_that_grows_alone_stays_one_span() -> None:
    pages = Pages(pool_of(20))
    for positions in range(1, 20 * PAGE, PAGE):
        assert pages.reserve(positions)
    assert pages.span(19 * PAGE) is not None


def test_two_sequences_that_are_given_back_leave_neighbours_for_the_next() -> None:
    pool = pool_of(6)
    one, other = Pages(pool), Pages(pool)
    assert one.reserve(3 * PAGE) and other.reserve(3 * PAGE)
    one.trim(0)
    other.trim(0)
    again = Pages(pool)
    assert again.reserve(3 * PAGE) and again.span(3 * PAGE) is not None


def test_the_page_behind_the_last_is_preferred() -> None:
    pool = pool_of(6)
    one, other = Pages(pool), Pages(pool)
    assert one.reserve(PAGE) and other.reserve(PAGE) and one.reserve(2 * PAGE)
    other.trim(0)  # is the next to be taken now
    assert one.reserve(3 * PAGE)
    assert np.diff(one.rows[PAGE:]).tolist() == [1] * (2 * PAGE - 1)


# --- the budget ---


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("extra", "pages"), [(0, 4), (PAGE_BYTES - 1, 4), (-1, 3)])
def test_as_many_pages_as_the_budget_holds(layers: int, extra: int, pages: int) -> None:
    pool = TensorPool([SHAPE] * layers, torch.float32, torch.device("cpu"), (4 * PAGE_BYTES + extra) * layers)
    assert (pool.pages, pool.positions, pool.budget) == (pages, pages * PAGE, pages * PAGE_BYTES * layers)


def test_a_budget_of_less_than_a_page_is_refused() -> None:
    with pytest.raises(UsageError, match=f"seen {PAGE_BYTES - 1} bytes, wanted at least {PAGE_BYTES}") as refused:
        TensorPool([SHAPE], torch.float32, torch.device("cpu"), PAGE_BYTES - 1)
    assert refused.value.hint


@pytest.mark.parametrize("budget", [2**50, 2**62, 10**30])
def test_a_budget_that_no_machine_has_is_refused(budget: int) -> None:
    with pytest.raises(UsageError, match="bytes, which cannot be allocated") as refused:
        TensorPool([SHAPE], torch.float32, torch.device("cpu"), budget)
    assert refused.value.hint == "a smaller --kv-bytes or --context"


def test_half_the_bytes_a_value_make_twice_the_pages() -> None:
    assert TensorPool([SHAPE], torch.bfloat16, torch.device("cpu"), 4 * PAGE_BYTES).pages == 8


def test_all_tensors_hold_every_row_of_the_budget() -> None:
    pool = TensorPool([SHAPE, LayerShape(4, 2, 2)], torch.float32, torch.device("cpu"), 2**16)
    rows = (pool.pages + RESERVED) * PAGE
    assert [tuple(tensor.shape) for tensor in pool.keys] == [(2, rows, 3), (4, rows, 2)]
    assert [tuple(tensor.shape) for tensor in pool.values] == [(2, rows, 5), (4, rows, 2)]


def test_row_0_is_zero_in_every_layer() -> None:
    pool = pool_of(3, layers=2)
    assert not any(bool(tensor[:, 0].any()) for tensor in (*pool.keys, *pool.values))


# --- one session's cache ---


def filled(pool: PagePool, length: int) -> KVCache:
    cache = KVCache(pool)
    assert cache.pages is not None and cache.pages.reserve(length)
    cache.length = length
    cache.last = Last(np.zeros((1, 4), np.float32), torch.zeros(1, 4))
    return cache


@pytest.mark.parametrize("keep", [0, 1, PAGE, 2 * PAGE - 1])
def test_a_cut_forgets_the_last_position_and_keeps_pages_until_they_are_trimmed(keep: int) -> None:
    pool = pool_of(4)
    cache = filled(pool, 3 * PAGE)
    cache.cut(keep)
    assert (cache.length, cache.last, cache.held) == (keep, None, 3)
    cache.trim()
    assert (cache.held, pool.free) == (-(-keep // PAGE), 4 - -(-keep // PAGE))


@pytest.mark.parametrize("keep", [70, 71, 10**6])
def test_a_cut_beyond_the_end_is_none(keep: int) -> None:
    cache = filled(pool_of(4), 70)
    cache.cut(keep)
    assert cache.length == 70 and cache.last is not None


def test_a_cleared_cache_holds_nothing() -> None:
    pool = pool_of(4)
    cache = filled(pool, 70)
    cache.clear()
    assert (cache.length, cache.last, cache.held, pool.used) == (0, None, 0, 0)


@pytest.mark.parametrize("act", [KVCache.trim, KVCache.clear])
def test_a_cache_without_a_pool_holds_nothing_and_does_not_mind(act: Any) -> None:
    cache = KVCache(None)
    act(cache)
    assert (cache.length, cache.held, cache.reserve_source(9)) == (0, 0, True)
