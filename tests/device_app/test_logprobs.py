"""Log-probabilities are those of the model's own distribution, from the top rows alone where they settle them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_app.logprobs import TokenLogprobs, logprobs_of
from device_app.sampler import Row
from shared.wire import Array
from tests.device_app.test_sampler import full_row, made_values, top_row


def expected(values: Array, token: int, top: int) -> TokenLogprobs:
    """By softmax over all, in float64."""
    logs = values.astype(np.float64) - values.max()
    logs -= np.log(np.exp(logs).sum())
    best = sorted(range(len(values)), key=lambda one: (-logs[one], one))[:top]
    return TokenLogprobs(token, logs[token], [(one, logs[one]) for one in best])


@given(
    shape=st.sampled_from(["plain", "peaked", "many ties", "flat"]),
    k=st.sampled_from([1, 16, 256]),
    top=st.integers(0, 20),
    temperature=st.sampled_from([0.0, 0.5, 1.5]),
    made_from=st.integers(0, 2**32 - 1),
)
def test_they_are_those_of_the_full_distribution_at_temperature_1_or_none(
    shape: str, k: int, top: int, temperature: float, made_from: int
) -> None:
    random = np.random.default_rng(made_from)
    values = made_values(shape, 500, random)
    partial, full = top_row(values, k, temperature, random), full_row(values, temperature)
    token = int(random.choice(partial.ids))
    right = expected(values, token, top)
    for row in (partial, full):
        seen = logprobs_of(row, token, top)
        if seen is None:
            assert not row.full
            continue
        assert seen.id == token and seen.logprob == pytest.approx(right.logprob, abs=1e-5)
        assert [one for one, _ in seen.top] == [one for one, _ in right.top]
        assert [log for _, log in seen.top] == pytest.approx([log for _, log in right.top], abs=1e-5)


def test_top_rows_nearly_always_settle_them() -> None:
    random = np.random.default_rng(0)
    values = made_values("plain", 5000, random)
    row = top_row(values, 256, 1.0, random)
    assert all(logprobs_of(row, int(token), 20) is not None for token in row.ids)


def test_a_token_that_was_not_sent_and_ties_at_the_edge_want_the_full_row() -> None:
    values = np.array([3.0, 2.0, 1.0, 1.0, 0.0], np.float32)
    row = Row(values[:3], np.arange(3), 0.0, 0.0, full=False)
    assert logprobs_of(row, 4, 0) is None
    assert logprobs_of(row, 0, 2) is not None
    assert logprobs_of(row, 0, 3) is None  # the id of the other one may be lower
    assert logprobs_of(row, 0, 4) is None


def test_more_than_the_vocabulary_are_all_of_it() -> None:
    row = full_row(np.array([1.0, 2.0, 3.0], np.float32), 1.0)
    seen = logprobs_of(row, 0, 20)
    assert seen is not None and [one for one, _ in seen.top] == [2, 1, 0]
    assert sum(np.exp(log) for _, log in seen.top) == pytest.approx(1.0)
