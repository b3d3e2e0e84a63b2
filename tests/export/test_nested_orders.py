"""Orders that keep blocks together, as quantised matrices need them: what is drawn, and among how many."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.permutation import Permutation
from export.scheme import log2_orders, random_permutation
from export.spaces import Features, Gated, Heads
from shared.errors import FamilyError
from shared.key import Index

CHAINS = [(), (2,), (3,), (4, 2), (6, 3), (6, 2), (8, 4, 2), (12, 6, 2)]


def keeps(index: Index, levels: tuple[int, ...]) -> bool:
    """Whether an order is one, and every block of it comes from one block."""
    together = all(
        (index.reshape(-1, size) // size == index[::size, None] // size).all() for size in levels if size <= index.size
    )
    return together and sorted(index) == list(range(index.size))


def heads(query: int, key_value: int, dim: int) -> Heads:
    return Heads("query", "key", "value", "attended", query, key_value, dim)


@given(st.sampled_from(CHAINS), st.integers(1, 5))
def test_an_order_keeps_every_block_of_every_level(levels: tuple[int, ...], count: int) -> None:
    assert keeps(random_permutation(count * (levels or (1,))[0], levels=levels), levels)


def test_blocks_move_and_so_does_what_is_in_them() -> None:
    levels = (256, 32, 16)
    index = random_permutation(256 * 16, levels=levels)
    for larger, smaller in zip((index.size, *levels), (*levels, 1), strict=True):
        places = (index[::smaller] // smaller % (larger // smaller)).reshape(-1, larger // smaller)
        assert (places != np.arange(larger // smaller)).mean() > 0.4


@pytest.mark.parametrize(("size", "levels"), [(4, ()), (4, (2,)), (6, (2,)), (6, (3,)), (8, (4, 2))])
@pytest.mark.parametrize("moves", [False, True])
def test_every_order_that_keeps_the_blocks_is_drawn_and_counted(
    size: int, levels: tuple[int, ...], moves: bool
) -> None:
    wanted = {order for order in permutations(range(size)) if keeps(np.array(order), levels)}
    if moves:
        wanted.remove(tuple(range(size)))
    drawn = {tuple(random_permutation(size, levels=levels, moves=moves)) for _ in range(20 * len(wanted))}
    assert drawn == wanted
    assert 2 ** log2_orders(size, levels, moves=moves) == pytest.approx(len(wanted))


def test_orders_beyond_counting_are_counted_too() -> None:
    # 18 blocks of 32: 18! · 32!^18
    assert log2_orders(576, (32,), moves=True) == pytest.approx(52.5 + 18 * 117.66, abs=0.2)
    assert log2_orders(576, moves=True) > 2 * log2_orders(576, (32,))


def test_a_space_keeps_its_blocks_and_the_others_are_free() -> None:
    drawn = Permutation(
        [Features("residual", 64), Gated("gate", "up", "product", 64), Features("vocab", 64)],
        blocks={"residual": (32, 16), "product": (32,)},
    )
    assert keeps(drawn.index("residual"), (32, 16)) and keeps(drawn.index("product"), (32,))
    assert (drawn.index("gate") == drawn.index("product")).all() and (drawn.index("up") == drawn.index("gate")).all()
    assert not keeps(drawn.index("vocab"), (32,))


def test_the_key_space_is_told_with_blocks_and_without() -> None:
    drawn = Permutation([Features("residual", 4), Features("vocab", 3)], blocks={"residual": (2,)})
    assert drawn.log2_keys == pytest.approx(np.log2((2 * 2 * 2 - 1) * 5))
    assert drawn.log2_keys_free == pytest.approx(np.log2(23 * 5))
    assert Permutation([Features("residual", 4)]).log2_keys_free is None


def follows(drawn: Permutation, key_value: int, group: int, dim: int) -> bool:
    """Whether query heads follow their key/value head, and attended features the values that they mix."""
    key, query = drawn.index("key").reshape(key_value, dim), drawn.index("query").reshape(key_value, group, dim)
    value = drawn.index("value").reshape(key_value, 1, dim)
    attended = drawn.index("attended").reshape(key_value, group, dim)
    return bool(
        (query // dim // group == key[:, None] // dim).all()
        and (attended // dim == query // dim).all()
        and (attended % dim == value % dim).all()
        and (value // dim == key[:, None] // dim).all()
    )


# key/value heads, group, head dim, blocks of attended features
NESTED = [
    pytest.param(3, 3, 64, (32,), id="SmolLM2, Q4_1: blocks in heads"),
    pytest.param(8, 4, 128, (256, 32), id="LLaMA 3 8B, Q4_K: pairs of heads in a group"),
    pytest.param(8, 1, 128, (256, 16), id="LLaMA 2 7B, Q6_K: pairs of groups"),
    pytest.param(4, 4, 16, (256,), id="blocks of all heads"),
    pytest.param(8, 2, 16, (256, 64, 32, 16), id="many levels"),
    pytest.param(2, 4, 64, (64,), id="blocks that are heads"),
    pytest.param(8, 3, 128, (256, 32), id="LLaMA 3.2 3B, Q4_K: blocks astride groups"),
    pytest.param(4, 7, 128, (256, 16), id="Qwen 2.5 7B, Q6_K: blocks astride groups"),
    pytest.param(8, 5, 128, (256, 32), id="Qwen 3 14B, Q4_K: blocks astride groups"),
    pytest.param(6, 2, 16, (48,), id="blocks of more than a group, astride"),
]


@pytest.mark.parametrize(("key_value", "group", "dim", "levels"), NESTED)
def test_heads_and_blocks_stay_together(key_value: int, group: int, dim: int, levels: tuple[int, ...]) -> None:
    for _ in range(5):
        drawn = Permutation([heads(key_value * group, key_value, dim)], blocks={"attended": levels})
        assert keeps(drawn.index("attended"), levels)
        assert follows(drawn, key_value, group, dim)


@pytest.mark.parametrize(
    ("key_value", "group", "dim", "levels", "keys"),
    [
        (2, 2, 2, (2,), (2 - 1) * 2**2 * 2**2),  # head orders · orders in groups · orders of features
        (2, 2, 2, (4,), (2 - 1) * 2**2 * 2**2),  # a block is a group: nothing is lost
        (1, 4, 1, (2,), 2 * 2 * 2 - 1),  # pairs of query heads
        (4, 1, 1, (2,), 2 * 2 * 2 - 1),  # pairs of key/value heads
        (1, 1, 4, (2,), 2 * 2 * 2),
        (2, 3, 1, (2,), 2 * 2),  # the third head of each group shares a block with the other's
        (4, 3, 1, (2,), (2 - 1) * 2**4),
    ],
)
def test_all_keys_of_heads_with_blocks_are_drawn_and_counted(
    key_value: int, group: int, dim: int, levels: tuple[int, ...], keys: int
) -> None:
    seen = set()
    for _ in range(20 * keys):
        drawn = Permutation([heads(key_value * group, key_value, dim)], blocks={"attended": levels})
        seen.add((*drawn.index("attended"), *drawn.index("value")))
    assert len(seen) == keys == round(2 ** (drawn.log2_keys or 0.0))


def test_heads_that_do_not_nest_are_named() -> None:
    with pytest.raises(FamilyError, match=r"'attended': blocks of 32 features, heads of 80 in groups of 1"):
        Permutation([heads(32, 32, 80)], blocks={"attended": (32,)})
    with pytest.raises(FamilyError, match=r"'attended': seen 96 features, wanted a multiple of 64"):
        Permutation([heads(3, 3, 32)], blocks={"attended": (64,)})


def test_a_space_that_does_not_fill_its_blocks_is_named() -> None:
    with pytest.raises(FamilyError, match=r"'residual': seen 960 features, wanted a multiple of 256"):
        Permutation([Features("residual", 960)], blocks={"residual": (256, 32)})


@pytest.mark.parametrize("space", ["value", "gate", "elsewhere"])
def test_blocks_where_no_matrix_reads_are_refused(space: str) -> None:
    structures = [heads(2, 2, 32), Gated("gate", "up", "product", 32)]
    with pytest.raises(FamilyError, match=f"blocks of {space}"):
        Permutation(structures, blocks={space: (32,)})
