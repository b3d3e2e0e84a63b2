"""Steps of fixed shapes: what a graph would capture computes what the step as it is does. Capturing needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloud_backend.decoder import DecoderEngine
from cloud_backend.graphs import COUNTS, SHORTEST, FixedStep, shape_of
from cloud_backend.kv_cache import PAGE, KVCache
from cloud_backend.opening import open_context
from cloud_backend.step import Span, step_of


@pytest.fixture(scope="module", params=["llama", "mistral-window", "gemma2", "gpt2"])
def engine(request: pytest.FixtureRequest, tiny_exports: Callable[[str], Path]) -> Any:
    return open_context(tiny_exports(request.param) / "cloud", device="cpu", kv_bytes=2**24)[1]


def filled(engine: DecoderEngine, lengths: list[int]) -> list[KVCache]:
    """Caches whose pages hold values of the right size, as after a prompt."""
    torch.manual_seed(3)
    for memory in (*engine.pool.keys, *engine.pool.values):
        memory[:, PAGE:] = torch.randn_like(memory[:, PAGE:])
    caches = [engine.new_cache() for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        assert cache.pages is not None and cache.pages.reserve(length)
        cache.length = length
    return caches


def spans_of(caches: list[KVCache], tokens: int) -> list[Span]:
    return [Span(cache.pages, cache.length - tokens, tokens) for cache in caches if cache.pages is not None]


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("lengths", [[9], [30, 12, 31], [40, 8, 8, 33, 17]])
def test_a_fixed_step_gives_the_states_of_the_step_as_it_is(
    engine: DecoderEngine, lengths: list[int], tokens: int
) -> None:
    spans = spans_of(filled(engine, lengths), tokens)
    embeddings = torch.randn(len(spans) * tokens, engine.hidden_size)
    wanted = [
        engine._through(step_of(engine.pool, [span]), embeddings[at * tokens : (at + 1) * tokens])
        for at, span in enumerate(spans)
    ]
    shape = shape_of(spans, engine.context)
    assert shape is not None
    fixed = FixedStep(engine.pool, shape, engine.hidden_size, torch.float32)
    fixed.fill(spans, embeddings)
    states = engine._through(fixed.step, fixed.embeddings)[: len(embeddings)]
    torch.testing.assert_close(states, torch.cat(wanted), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_fixed_step_can_be_filled_again_with_fewer(engine: DecoderEngine) -> None:
    caches = filled(engine, [20, 25, 30])
    fixed = FixedStep(engine.pool, (4, 1, SHORTEST), engine.hidden_size, torch.float32)
    fixed.fill(spans_of(caches, 1), torch.randn(3, engine.hidden_size))
    fixed.step.groups[0].forget_masks()  # a graph computes them in every run
    (span,) = spans_of(caches[:1], 1)
    embedding = torch.randn(1, engine.hidden_size)
    fixed.fill([span], embedding)
    states = engine._through(fixed.step, fixed.embeddings)[:1]
    torch.testing.assert_close(states, engine._through(step_of(engine.pool, [span]), embedding), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_padding_touches_nobodys_page_alone(engine: DecoderEngine) -> None:
    spans = spans_of(filled(engine, [20]), 1)
    before = [memory.clone() for memory in engine.pool.keys]
    fixed = FixedStep(engine.pool, (8, 1, SHORTEST), engine.hidden_size, torch.float32)
    fixed.fill(spans, torch.randn(1, engine.hidden_size))
    engine._through(fixed.step, fixed.embeddings)
    row = int(spans[0].pages.rows[spans[0].start])
    for memory, old in zip(engine.pool.keys, before, strict=True):
        changed = (memory != old).any(-1).any(0).nonzero().ravel().tolist()
        assert set(changed) <= {row, *range(PAGE, 2 * PAGE)}


def test_shapes_hold_what_they_are_for() -> None:
    def span(tokens: int, end: int) -> Span:
        return Span(None, end - tokens, tokens)  # type: ignore[arg-type]  # nothing is read of it

    assert shape_of([span(1, 10)], 4096) == (1, 1, SHORTEST)
    assert shape_of([span(1, 200)] * 3 + [span(1, 257)], 4096) == (4, 1, 384)
    assert shape_of([span(4, 1400)] * 17, 2048) == (24, 4, 1536)
    assert shape_of([span(4, 2000)] * 9, 2048) == (16, 4, 2048)
    assert shape_of([span(1, 300)] * 31 + [span(1, 4000)], 4096) is None  # each would read 4,096
    assert shape_of([span(1, 10), span(2, 10)], 4096) is None
    assert shape_of([span(3, 10)], 4096) is None
    assert shape_of([span(1, 10)] * (COUNTS[-1] + 1), 4096) is None


def test_a_context_that_is_no_power_of_two_is_the_longest() -> None:
    spans = [Span(None, 899, 1)]  # type: ignore[arg-type]
    assert shape_of(spans, 900) == (1, 1, 900)
    assert np.prod(shape_of(spans, 5000) or ()) == 1024
