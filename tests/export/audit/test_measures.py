"""The papers' measure: the statistics against hand-computed cases, and what they say of permutations and rotations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from export.audit.measures import (
    PUBLISHED,
    TRANSFORMATIONS,
    by_width,
    corrected_distance_correlation,
    distance_correlation,
    entrywise,
    measure,
    paper_distance,
)
from export.audit.scene import open_scene

numbers = st.floats(-10, 10, width=16)


@pytest.fixture
def draws() -> np.random.Generator:
    return np.random.default_rng(0)


def test_distance_correlation_by_hand() -> None:
    # x = 0, 1, 2 and y = 0, 1, 0. Their doubly centred distances are
    #   A = (-10 2 8; 2 -4 2; 8 2 -10) / 9 and B = (-2 4 -2; 4 -8 4; -2 4 -2) / 9,
    # so Σ A·B = 72/81, Σ A² = 360/81, Σ B² = 144/81, and 72 / √(360·144) = 1/√10.
    assert distance_correlation(np.array([0.0, 1, 2]), np.array([0.0, 1, 0])) == pytest.approx(10**-0.25)


def test_two_samples_always_depend() -> None:
    assert distance_correlation(np.array([0.0, 1]), np.array([5.0, -3])) == pytest.approx(1)


def test_what_is_linear_in_the_other_has_correlation_1(draws: np.random.Generator) -> None:
    x = draws.standard_normal(50)
    assert distance_correlation(x, 3 - 2 * x) == pytest.approx(1)


def test_independent_samples_tend_to_0(draws: np.random.Generator) -> None:
    values = [distance_correlation(*draws.standard_normal((2, size))) for size in (100, 10_000)]
    assert values[1] < 0.03 < values[0] < 0.3


def test_a_constant_correlates_with_nothing() -> None:
    assert distance_correlation(np.ones(5), np.arange(5.0)) == 0


@given(arrays(np.float64, (2, 17), elements=numbers))
def test_the_fast_statistic_is_the_plain_one(pair: np.ndarray) -> None:
    x, y = pair
    plain = distance_correlation(x[:, None], y[:, None])
    assert entrywise(x[None], y[None])[0] == pytest.approx(plain, abs=1e-6)


def test_rows_moved_by_a_permutation_or_rotation_have_correlation_1(draws: np.random.Generator) -> None:
    rows = draws.standard_normal((20, 48))
    rotation, _ = np.linalg.qr(draws.standard_normal((48, 48)))
    for moved in (rows[:, draws.permutation(48)], rows @ rotation):
        assert distance_correlation(rows, moved) == pytest.approx(1)
        assert corrected_distance_correlation(rows, moved) == pytest.approx(1)


def test_drawn_rotations_keep_every_length_and_angle(draws: np.random.Generator) -> None:
    rows = draws.standard_normal((20, 48))
    rotated = TRANSFORMATIONS["rotation"](rows, draws)
    np.testing.assert_allclose(rotated @ rotated.T, rows @ rows.T, atol=1e-10)
    assert np.abs(rotated - rows).max() > 1


def test_without_its_bias_the_statistic_of_unrelated_wide_rows_is_small(draws: np.random.Generator) -> None:
    rows, others = draws.standard_normal((2, 64, 1024))
    assert distance_correlation(rows, others) > 0.95
    assert corrected_distance_correlation(rows, others) < 0.3


def test_the_printed_distance() -> None:
    x = np.array([1.0, 2, 3])
    assert paper_distance(x, 5 * x + 7) == pytest.approx(0)
    assert paper_distance(x, -x) == pytest.approx(2)
    assert paper_distance(x, np.array([1.0, 0, 1])) == pytest.approx(1)
    assert paper_distance(x, np.ones(3)) == 1


def test_the_published_figures_are_szekelys_entry_by_entry_and_those_of_unrelated_vectors() -> None:
    curves = by_width((128, 8192), np.random.default_rng(0))["entries"]
    for name in ("permutation", "rotation", "nothing in common"):
        assert curves["szekely"][name] == pytest.approx(PUBLISHED["permutation"], rel=0.25)
        assert curves["printed"][name] == pytest.approx([1, 1], abs=0.1)


def test_the_measure_of_an_export(tiny: Path, tiny_checkpoints: Callable[[str], Path]) -> None:
    measured = measure(open_scene(tiny, str(tiny_checkpoints("llama"))), widths=(128,))
    assert measured["traffic"]["by_tokens"]["szekely"] == pytest.approx(1)
    assert measured["traffic"]["by_entries"]["szekely"] < 0.5
    names = {parameter["name"] for parameter in measured["parameters"]}
    assert {"lm_head.weight", "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"} <= names
    assert not any(".0." in name or ".2." in name for name in names)


def test_without_a_public_model_no_parameters_are_compared(tiny: Path) -> None:
    assert measure(open_scene(tiny, None), widths=(128,))["parameters"] == []
