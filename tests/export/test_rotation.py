"""The scheme `rotation`: the laws that make it exact, and that every draw is another."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from export import rotation
from export.families import LLAMA
from export.permutation import Order
from export.rotation import Blocks, Rotation, Scaled, orthogonal_keeping_ones, random_orthogonal, random_uniform
from export.shards import Shards
from export.spaces import After, Axis, Features, Fixed, Gain, Gated, Heads, Stream
from shared.errors import FamilyError
from tests.checkpoints import SIZES, TINY

few = settings(max_examples=25, deadline=None)
group_shapes = {"key_value": st.integers(1, 4), "group": st.integers(1, 4), "half": st.integers(1, 5)}


def heads(query: int, key_value: int, dim: int, *, normed: bool = False) -> Heads:
    return Heads("query", "key", "value", "attended", query, key_value, dim, normed)


def no_other(name: str) -> torch.Tensor:
    raise AssertionError("nothing else is read")


def blocks(drawn: Rotation, space: str) -> Blocks:
    secret = drawn._secrets[space]
    assert isinstance(secret, Blocks)
    return secret


def in_full(secret: Blocks) -> np.ndarray:
    """The one matrix [size, size] that a secret of blocks stands for."""
    count, dim, _ = secret.matrices.shape
    full = np.zeros((count * dim,) * 2)
    for place, head in enumerate(secret.order):
        full[head * dim : (head + 1) * dim, place * dim : (place + 1) * dim] = secret.matrices[place]
    return full


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# --- bases ---


@few
@given(count=st.integers(1, 4), size=st.integers(1, 30))
def test_a_random_basis_is_orthogonal(count: int, size: int) -> None:
    bases = random_orthogonal(count, size)
    assert bases.shape == (count, size, size)
    assert np.abs(bases @ bases.transpose(0, 2, 1) - np.eye(size)).max() < 1e-12


def test_random_bases_favour_no_direction() -> None:
    # Over all orthogonal matrices of size n an entry has mean 0, variance 1/n and fourth moment 3/(n(n+2)), and the
    # determinant is -1 as often as 1. Without the signs of R, the diagonal of QR's own Q would all be of one sign.
    draws = random_orthogonal(4000, 3, random.Random(0).randbytes)
    error = 4 / np.sqrt(len(draws))  # four standard errors of a mean of numbers no larger than 1
    assert np.abs(draws.mean(0)).max() < error / np.sqrt(3)
    assert np.abs((draws**2).mean(0) - 1 / 3).max() < error
    assert np.abs((draws**4).mean(0) - 1 / 5).max() < error
    assert abs(np.linalg.det(draws).mean()) < error


def test_random_numbers_are_even_and_never_0_or_1() -> None:
    numbers = random_uniform(20000, random.Random(0).randbytes)
    assert np.histogram(numbers, 10, (0, 1))[0].min() > 1800
    assert 0 < random_uniform(1, lambda count: b"\x00" * count)[0] < 1e-15
    assert 1 - 1e-15 < random_uniform(1, lambda count: b"\xff" * count)[0] <= 1


@few
@given(size=st.integers(1, 30))
def test_a_basis_for_layer_norms_keeps_the_ones(size: int) -> None:
    basis = orthogonal_keeping_ones(size)
    assert np.abs(basis @ basis.T - np.eye(size)).max() < 1e-12
    assert np.abs(np.ones(size) @ basis - 1).max() < 1e-12 and np.abs(basis @ np.ones(size) - 1).max() < 1e-12


def test_layer_norm_commutes_with_a_basis_that_keeps_the_ones_and_with_no_other() -> None:
    states = 3 + normal(7, 24)
    kept, any_other = torch.from_numpy(orthogonal_keeping_ones(24)), torch.from_numpy(random_orthogonal(1, 24)[0])

    def norm(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(values, (24,))

    assert torch.allclose(norm(states @ kept), norm(states) @ kept, atol=1e-10)
    assert not torch.allclose(norm(states @ any_other), norm(states) @ any_other, atol=1e-2)
    assert (kept - torch.eye(24)).abs().max() > 0.1


def test_rms_norm_commutes_with_any_basis() -> None:
    states, basis = 3 + normal(7, 24), torch.from_numpy(random_orthogonal(1, 24)[0])
    norm = LlamaRMSNorm(24, eps=1e-6)
    states, basis = states.float(), basis.float()
    assert torch.allclose(norm(states @ basis), norm(states) @ basis, atol=1e-5)


# --- streams ---


def test_where_a_gain_sits_between_norm_and_stream_places_alone_change() -> None:
    drawn = Rotation([Stream("residual", 24, "post"), Features("vocab", 9)])
    residual = drawn._secrets["residual"]
    assert isinstance(residual, Order)
    gain, weight, axes = normal(24).float(), normal(5, 24).float(), (Fixed("out"), After("residual", "gain"))
    assert drawn.folded(axes) is None
    assert torch.equal(drawn.act("gain", gain, (Gain("residual"),), no_other), gain[residual.index])
    assert torch.equal(drawn.act("w", weight, axes, no_other), weight[:, residual.index])
    key = drawn.user_key("k")
    assert not key.rotates and (key.residual == residual.index).all()


def test_layer_norm_streams_get_a_basis_that_keeps_the_ones() -> None:
    basis = blocks(Rotation([Stream("residual", 24, "layer")]), "residual").matrices[0]
    assert np.abs(np.ones(24) @ basis - 1).max() < 1e-12
    basis = blocks(Rotation([Stream("residual", 24, "rms")]), "residual").matrices[0]
    assert np.abs(np.ones(24) @ basis - 1).max() > 0.01


def test_gains_become_ones_and_go_into_what_reads_them() -> None:
    drawn = Rotation([Stream("residual", 24, "rms")])
    gain, weight, states = 1 + normal(24).float(), normal(5, 24).float(), normal(7, 24).float()
    axes: tuple[Axis, ...] = (Fixed("out"), After("residual", "the.gain"))
    asked = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return gain

    assert torch.equal(drawn.act("the.gain", gain, (Gain("residual"),), read), torch.ones(24))
    assert asked == []
    transformed = drawn.act("w", weight, axes, read)
    assert asked == ["the.gain"] and drawn.folded(axes) == After("residual", "the.gain")
    basis = torch.from_numpy(blocks(drawn, "residual").matrices[0]).float()
    assert torch.allclose((states * gain) @ weight.T, (states @ basis) @ transformed.T, atol=1e-4)


def test_what_reads_no_norm_folds_none() -> None:
    drawn = Rotation([Stream("residual", 24, "rms"), Features("a", 5)])
    assert drawn.folded(("residual", "a")) is None
    drawn.act("w", normal(24, 5), ("residual", "a"), no_other)


# --- attention ---


def rotary(states: torch.Tensor, positions: torch.Tensor, dim: int) -> torch.Tensor:
    """[1, heads, tokens, dim] with rotary positions, by transformers' own code."""
    config = type(TINY["llama"])(**SIZES | {"head_dim": dim})
    cos, sin = LlamaRotaryEmbedding(config)(states, positions[None])
    return apply_rotary_pos_emb(states, states, cos.to(states), sin.to(states))[0]


@few
@given(**group_shapes, normed=st.booleans(), tokens=st.integers(1, 6))
def test_no_attention_score_changes(key_value: int, group: int, half: int, normed: bool, tokens: int) -> None:
    dim, count = 2 * half, key_value * group
    drawn = Rotation([heads(count, key_value, dim, normed=normed)])
    queries, keys = normal(tokens, count * dim), normal(tokens, key_value * dim)
    positions = torch.randperm(500, generator=torch.Generator().manual_seed(tokens))[:tokens]

    def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """[heads, tokens, tokens]"""
        by_head = query.view(1, tokens, count, dim).transpose(1, 2)
        shared = key.view(1, tokens, key_value, dim).transpose(1, 2).repeat_interleave(group, 1)
        return (rotary(by_head, positions, dim) @ rotary(shared, positions, dim).transpose(2, 3))[0]

    query, key = blocks(drawn, "query"), blocks(drawn, "key")
    seen = scores(query.act(queries, 1), key.act(keys, 1))
    expected = scores(queries, keys)[torch.from_numpy(query.order)]
    assert torch.allclose(seen, expected, atol=1e-4)  # cos and sin come as float32


def test_a_plane_turned_by_another_angle_in_the_key_changes_scores() -> None:
    drawn = Rotation([heads(1, 1, 8)])
    turned, other = blocks(drawn, "query").matrices[0], blocks(Rotation([heads(1, 1, 8)]), "key").matrices[0]
    assert np.abs(turned @ blocks(drawn, "key").matrices[0].T - np.eye(8)).max() < 1e-12
    assert np.abs(turned @ other.T - np.eye(8)).max() > 0.1


def test_planes_turn_and_are_scaled() -> None:
    query = blocks(Rotation([heads(40, 40, 4)]), "query").matrices
    scale = np.sqrt(query[:, 0, 0] ** 2 + query[:, 2, 0] ** 2)
    assert scale.min() >= 0.5 and scale.max() <= 2 and scale.min() < 0.8 and scale.max() > 1.25
    assert (query[:, 0, 0] < 0).any() and (query[:, 0, 0] > 0).any()
    assert (query[:, [0, 0, 1, 1], [1, 3, 0, 2]] == 0).all()  # planes do not mix


def test_a_norm_inside_heads_lets_them_change_places_alone() -> None:
    drawn = Rotation([heads(6, 3, 8, normed=True)])
    assert (blocks(drawn, "query").matrices == np.eye(8)).all() and (blocks(drawn, "key").matrices == np.eye(8)).all()
    assert not np.allclose(blocks(drawn, "value").matrices, np.eye(8))


@few
@given(**group_shapes)
def test_query_heads_follow_their_key_value_head_and_share_its_matrices(key_value: int, group: int, half: int) -> None:
    drawn = Rotation([heads(key_value * group, key_value, 2 * half)])
    query, key, value, attended = (blocks(drawn, space) for space in ("query", "key", "value", "attended"))
    assert sorted(query.order) == list(range(key_value * group)) and (query.order == attended.order).all()
    assert (query.order.reshape(key_value, group) // group == key.order[:, None]).all()
    assert (key.order == value.order).all()
    for place in range(key_value * group):
        assert (attended.matrices[place] == value.matrices[place // group]).all()
        assert np.abs(query.matrices[place] @ key.matrices[place // group].T - np.eye(2 * half)).max() < 1e-12


@few
@given(**group_shapes)
def test_what_attention_mixes_is_what_the_output_projection_undoes(key_value: int, group: int, half: int) -> None:
    dim, count = 2 * half, key_value * group
    drawn = Rotation([heads(count, key_value, dim)])
    values, mix = normal(4, key_value * dim), torch.softmax(normal(count, 4, 4), -1)
    output = normal(10, count * dim)
    secret = blocks(drawn, "attended")

    def attend(values: torch.Tensor, mix: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        shared = values.view(4, key_value, dim).transpose(0, 1).repeat_interleave(group, 0)
        return (mix @ shared).transpose(0, 1).reshape(4, count * dim) @ output.T

    seen = attend(blocks(drawn, "value").act(values, 1), mix[torch.from_numpy(secret.order)], secret.act(output, 1))
    assert torch.allclose(seen, attend(values, mix, output), atol=1e-10)


# --- feed-forward blocks ---


def test_scaling_up_and_back_leaves_the_block_as_it_was() -> None:
    drawn = Rotation([Gated("gate", "up", "product", 40)])
    states, gate, up, down = normal(6, 10), normal(40, 10), normal(40, 10), normal(10, 40)
    secret = {name: drawn._secrets[name].act(weight, axis) for name, weight, axis in [("gate", gate, 0), ("up", up, 0)]}
    inner = torch.nn.functional.silu(states @ secret["gate"].T) * (states @ secret["up"].T)
    seen = inner @ drawn._secrets["product"].act(down, 1).T
    expected = (torch.nn.functional.silu(states @ gate.T) * (states @ up.T)) @ down.T
    assert torch.allclose(seen, expected, atol=1e-10)


def test_factors_are_from_a_half_to_two_of_both_signs() -> None:
    drawn = Rotation([Gated("gate", "up", "product", 400)])
    up, product = drawn._secrets["up"], drawn._secrets["product"]
    assert isinstance(up, Scaled) and isinstance(product, Scaled)
    assert np.abs(up.factors * product.factors - 1).max() < 1e-12
    size = np.abs(up.factors)
    assert 0.5 <= size.min() < 0.6 and 1.8 < size.max() <= 2
    assert 150 < (up.factors < 0).sum() < 250
    assert isinstance(drawn._secrets["gate"], Order)  # the activation's input is not scaled


# --- acting ---


@pytest.mark.parametrize("block", [1, 60, 2**22])
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_acting_is_the_block_diagonal_matrix_on_reordered_heads(
    dimension: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "BLOCK", block)
    secret = Blocks(np.array([2, 0, 1]), random_orthogonal(3, 4) * np.array([0.5, 1, 2])[:, None, None])
    tensor = normal(12, 12, 12)
    expected = torch.tensordot(tensor, torch.from_numpy(in_full(secret)), ([dimension], [0])).movedim(-1, dimension)
    assert torch.allclose(secret.act(tensor, dimension), expected, atol=1e-12)
    assert torch.allclose(secret.act(tensor.float(), dimension).double(), expected, atol=1e-5)


def test_each_axis_turns_by_its_own_space() -> None:
    drawn = Rotation([Stream("residual", 6, "rms"), heads(3, 3, 4)])
    weight = normal(12, 6).float()
    seen = drawn.act("w", weight, ("value", "residual"), no_other).double()
    value, residual = in_full(blocks(drawn, "value")), in_full(blocks(drawn, "residual"))
    assert np.abs(value.T @ weight.double().numpy() @ residual - seen.numpy()).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tensor_in_16_bits_is_computed_in_more(dtype: torch.dtype) -> None:
    drawn = Rotation([Stream("residual", 48, "rms")])
    weight = normal(7, 48).to(dtype)
    seen = drawn.act("w", weight, (Fixed("out"), "residual"), no_other)
    assert seen.dtype is torch.float32
    exact = weight.double().numpy() @ blocks(drawn, "residual").matrices[0]
    assert np.abs(seen.numpy() - exact).max() < 1e-6


def test_a_shape_that_does_not_fit_its_space_is_named() -> None:
    drawn = Rotation([Stream("residual", 6, "rms")])
    with pytest.raises(FamilyError, match=r"'w': seen 4 on axis 0, wanted 6 \(residual\)"):
        drawn.act("w", torch.zeros(4), ("residual",), no_other)
    with pytest.raises(FamilyError, match=r"'w': seen 2 axes, wanted 1"):
        drawn.act("w", torch.zeros(6, 6), ("residual",), no_other)


# --- what it leaves and gives ---


def test_the_user_key_is_the_basis_of_the_classifiers_columns_and_the_order_of_its_rows() -> None:
    drawn = Rotation(LLAMA.spaces(TINY["llama"]))
    table, gain = normal(320, 48).float(), 1 + normal(48).float()
    key = drawn.user_key("k")
    assert key.rotates and key.residual.dtype == np.float32 and key.vocab is not None
    moved = drawn.act("table", table, ("vocab", "residual"), no_other).numpy()
    assert np.abs(key.hide(table.numpy())[key.vocab] - moved).max() < 1e-5
    # logits of a state = hidden state · classifier, both hidden
    state = normal(3, 48).float()
    classifier = drawn.act("c", table, ("vocab", After("residual", "gain")), lambda name: gain)
    rows = key.reveal_rows(key.hide(state.numpy()) @ classifier.numpy().T)
    assert np.abs(rows - ((state * gain) @ table.T).numpy()).max() < 1e-3
    assert np.abs(key.reveal_hidden(key.hide(state.numpy())) - state.numpy()).max() < 1e-5
    assert drawn.user_key("k", head="device").vocab is None


def test_a_tensor_that_stays_says_why() -> None:
    drawn = Rotation([heads(1, 1, 4, normed=True), Stream("residual", 6, "rms"), Features("a", 50)])
    assert drawn.unmoved((Fixed("because"),)) == "because"
    assert "whole heads" in str(drawn.unmoved(("key",)))  # one head, and a norm inside it
    assert drawn.unmoved(("value",)) is None and drawn.unmoved(("residual",)) is None
    assert drawn.unmoved(("key", "a")) is None and drawn.unmoved((Gain("residual"),)) is None


def test_a_seed_gives_the_same_draws_and_no_seed_does_not() -> None:
    structures = list(LLAMA.spaces(TINY["llama"]))
    one, two = (Rotation(structures, random.Random(7).randbytes).user_key("k") for _ in range(2))
    assert (one.residual == two.residual).all() and np.array_equal(one.vocab, two.vocab)
    three = Rotation(structures).user_key("k")
    assert np.abs(one.residual - three.residual).max() > 0.1 and not np.array_equal(one.vocab, three.vocab)


def test_every_layer_has_its_own_draws() -> None:
    drawn = Rotation(LLAMA.spaces(TINY["llama"]))
    for space in ("query", "key", "value"):
        assert not np.allclose(blocks(drawn, f"{space}[0]").matrices, blocks(drawn, f"{space}[2]").matrices)
    assert not np.allclose(drawn._secrets["up[0]"].factors, drawn._secrets["up[1]"].factors)  # type: ignore[attr-defined]


def test_an_export_turns_with_the_stored_key(
    tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[..., Path]
) -> None:
    from shared.key import UserKey

    out = tiny_exports("llama-tied", "rotation")
    key = UserKey.load(out / "device" / "key.safetensors")
    original, cloud = Shards(tiny_checkpoints("llama-tied")), Shards(out / "cloud")
    folded = original.read("model.embed_tokens.weight") * original.read("model.norm.weight")
    assert key.vocab is not None
    assert np.abs(key.hide(folded.numpy())[key.vocab] - cloud.read("lm_head.weight").numpy()).max() < 1e-5
