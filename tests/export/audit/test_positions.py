"""Positions cancel out of traffic, for who has the vectors alone."""

from __future__ import annotations

import numpy as np
import pytest

from export.audit.inputs import PROMPT
from export.audit.positions import common_step, without_positions
from export.audit.traffic import labels
from export.rotation import random_orthogonal
from export.scheme import SchemeName
from tests.export.audit.conftest import Scenes

SCHEMES: list[SchemeName] = ["permutation", "rotation"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_positions_cancel_out_of_traffic(scheme: SchemeName, scenes: Scenes) -> None:
    seen = scenes("gpt2", scheme)
    ids = seen.text.secret[:3_000]
    places = seen.tokens.places(ids.size)
    sent = seen.sent(ids)
    assert places.max() == PROMPT - 1
    apart, together = labels(sent), labels(without_positions(sent, places, 1e-4), 1e-4)
    pairs = len(np.unique(np.stack([ids, together]), axis=1)[0])
    assert np.unique(apart).size > 5 * np.unique(ids).size
    assert pairs == np.unique(ids).size == np.unique(together).size


def test_a_step_is_found_among_the_differences_of_other_tokens() -> None:
    random = np.random.default_rng(0)
    table, step = random.normal(size=(200, 16)), random.normal(size=16)
    basis = random_orthogonal(1, 16)[0]
    before, after = table[:60] @ basis, (table[40:120] + step) @ basis  # 20 tokens in both
    assert np.abs(common_step(before, after, 1e-4) - step @ basis).max() < 1e-6
