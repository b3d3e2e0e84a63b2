"""Positions cancel out of traffic, for who has the vectors alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.audit.inputs import PROMPT
from export.audit.positions import common_step
from export.audit.traffic import labels, sequence_of
from export.rotation import random_orthogonal
from export.scheme import SchemeName
from tests.export.audit.conftest import Scenes

SCHEMES: list[SchemeName] = ["permutation", "rotation"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_positions_cancel_out_of_traffic(scheme: SchemeName, dtype: torch.dtype, scenes: Scenes) -> None:
    seen = scenes("gpt2", scheme)
    seen = seen.with_target(replace(seen.target, dtype=dtype))  # what travels is rounded
    ids = seen.text.secret[:3_000]
    seen = replace(seen, text=replace(seen.text, secret=ids))
    assert seen.tokens.places(ids.size).max() == PROMPT - 1
    apart, together = labels(seen.sent(ids)), sequence_of(seen)
    assert np.unique(apart).size > 5 * np.unique(ids).size
    both, counts = np.unique(np.stack([ids, together]), axis=1, return_counts=True)
    named = {int(token): int(label) for token, label in both[:, np.argsort(counts)].T}  # the label it has most often
    agree = np.mean([named[int(token)] == label for token, label in zip(ids, together, strict=True)])
    if dtype is torch.float32:
        assert both.shape[1] == np.unique(ids).size == np.unique(together).size
    # What 16 bits leave of a vector may split a token in two or join two, as the draw will have it.
    assert agree >= 0.95 and len(set(named.values())) >= 0.95 * len(named)


def test_a_step_is_found_among_the_differences_of_other_tokens() -> None:
    random = np.random.default_rng(0)
    table, step = random.normal(size=(200, 16)), random.normal(size=16)
    basis = random_orthogonal(1, 16)[0]
    before, after = table[:60] @ basis, (table[40:120] + step) @ basis  # 20 tokens in both
    assert np.abs(common_step(before, after, 1e-4) - step @ basis).max() < 1e-6
