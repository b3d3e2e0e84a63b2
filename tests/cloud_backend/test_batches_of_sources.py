"""Sources and images beside other sessions' requests: each session gets what it gets alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from cloud_backend.engine import AppendWork, EncodedRows, EncodeWork, LogitRows, Outcome, Work
from cloud_backend.kv_cache import PAGE, KVCache
from cloud_backend.translation import TranslationEngine
from cloud_backend.vision import VisionEngine
from shared.errors import RequestError, UsageError
from tests.checkpoints import ALL, randomise, stock_model
from tests.cloud_backend.batches import close

KV_BYTES = 2**24
LARGE = 3e38


def stock(kind: str) -> Any:
    model = stock_model(deepcopy(ALL[kind]))
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def translation() -> TranslationEngine:
    return TranslationEngine(stock("marian"), "float32", kv_bytes=KV_BYTES)


@pytest.fixture(scope="module")
def vision() -> VisionEngine:
    return VisionEngine(stock("llava"), "float32", kv_bytes=KV_BYTES)


def drawn(seed: int, count: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def run(engine: Any, *works: Work) -> list[Outcome]:
    """Takes the memory, as turns do, and runs all as one batch."""
    for work in works:
        assert work.reserve()
    outcomes: list[Outcome] = engine.run(works)
    return outcomes


def append(cache: KVCache, embeddings: np.ndarray, keep: int | None = None, **fields: Any) -> AppendWork:
    given = {"rows": len(embeddings), "want": "logits", "top_k": 0, "temperature": 1.0, "dtype": "float32"} | fields
    return AppendWork(cache, cache.length if keep is None else keep, embeddings, **given)


def store(cache: KVCache, source: np.ndarray) -> EncodeWork:
    return EncodeWork(cache, source, (len(source),), "store", "float32")


def code(outcome: Outcome) -> str | None:
    return outcome.code if isinstance(outcome, RequestError) else None


# --- sources ---

# Of each session: positions of its source, held before, and new.
READING = [(3, 0, 1), (20, 7, 1), (PAGE + 1, 7, 1), (60, 30, 1), (20, 8, 5), (40, 3, 5), (9, 2, 20), (60, 0, 40)]


def held(engine: TranslationEngine, at: int) -> KVCache:
    """The cache of a session of READING before its new positions."""
    cache, (source, before, _) = engine.new_cache(), READING[at]
    run(engine, store(cache, drawn(at, source, engine.hidden_size)))
    if before:
        run(engine, append(cache, drawn(100 + at, before, engine.hidden_size)))
    return cache


def test_sessions_with_sources_of_their_own_get_in_one_batch_what_each_gets_alone(
    translation: TranslationEngine,
) -> None:
    new = [drawn(200 + at, count, translation.hidden_size) for at, (_, _, count) in enumerate(READING)]
    alone = [run(translation, append(held(translation, at), rows))[0] for at, rows in enumerate(new)]
    works = [append(held(translation, at), rows) for at, rows in enumerate(new)]
    for seen, wanted in zip(run(translation, *works), alone, strict=True):
        assert isinstance(seen, LogitRows) and isinstance(wanted, LogitRows)
        close(seen.values, wanted.values)


def test_a_source_is_stored_beside_sessions_that_decode(translation: TranslationEngine) -> None:
    new, sources = drawn(9, 2, translation.hidden_size), [drawn(50 + at, 30, translation.hidden_size) for at in (0, 1)]
    readers = [held(translation, 1), held(translation, 3)]
    alone = [run(translation, append(held(translation, at), new))[0] for at in (1, 3)]
    stored = [held(translation, 2), translation.new_cache()]
    first, one, other, second = run(
        translation, append(readers[0], new), *map(store, stored, sources), append(readers[1], new)
    )
    assert isinstance(one, EncodedRows) and isinstance(other, EncodedRows)
    for seen, wanted in zip((first, second), alone, strict=True):
        assert isinstance(seen, LogitRows) and isinstance(wanted, LogitRows)
        close(seen.values, wanted.values)
    for cache, source in zip(stored, sources, strict=True):
        fresh = translation.new_cache()
        run(translation, store(fresh, source))
        seen, wanted = run(translation, append(cache, new), append(fresh, new))
        assert isinstance(seen, LogitRows) and isinstance(wanted, LogitRows)
        close(seen.values, wanted.values)


def test_a_source_that_overflows_fails_alone_and_leaves_the_one_before(translation: TranslationEngine) -> None:
    new = drawn(9, 2, translation.hidden_size)
    (wanted,) = run(translation, append(held(translation, 1), new))
    cache, other = held(translation, 1), held(translation, 1)
    huge = np.full((20, translation.hidden_size), LARGE, np.float32)
    failed, seen = run(translation, store(cache, huge), append(other, new))
    assert code(failed) == "internal"
    (after,) = run(translation, append(cache, new))
    for outcome in (seen, after):
        assert isinstance(outcome, LogitRows) and isinstance(wanted, LogitRows)
        close(outcome.values, wanted.values)


def test_a_source_is_stored_beside_one_that_fails_where_memory_is_full(translation: TranslationEngine) -> None:
    width = translation.hidden_size
    engine = TranslationEngine(stock("marian"), "float32", kv_bytes=5 * translation.pool.page_bytes)
    cache = engine.new_cache()
    run(engine, store(cache, drawn(0, 9, width)))
    huge = np.full((PAGE + 1, width), LARGE, np.float32)
    stored, failed = run(engine, store(cache, drawn(1, PAGE + 1, width)), store(engine.new_cache(), huge))
    assert isinstance(stored, EncodedRows) and code(failed) == "internal"


@pytest.mark.parametrize("pages", range(3, 9))
def test_a_session_alone_has_room_for_the_longest_source_and_answer_and_for_the_next_source(
    translation: TranslationEngine, pages: int
) -> None:
    engine = TranslationEngine(stock("marian"), "float32", kv_bytes=pages * translation.pool.page_bytes)
    cache = engine.new_cache()
    assert engine.context and engine.encoder_context
    for seed in range(2):
        work = store(cache, drawn(seed, engine.encoder_context, engine.hidden_size))
        assert work.reserve(), "it would wait forever"
        run(engine, work)
        assert append(cache, drawn(seed, engine.context, engine.hidden_size)).reserve(), "it would wait forever"
        run(engine, append(cache, drawn(seed, engine.context, engine.hidden_size)))
    cache.clear()
    assert engine.pool.used == 0


def test_memory_that_no_source_fits_into_is_refused(translation: TranslationEngine) -> None:
    with pytest.raises(UsageError) as refused:
        TranslationEngine(stock("marian"), "float32", kv_bytes=3 * translation.pool.page_bytes - 1)
    assert refused.value.hint


# --- images ---


def looked(engine: VisionEngine, outcome: Outcome) -> LogitRows:
    """The rows of an image's positions, once they are appended like text."""
    assert isinstance(outcome, AppendWork) and outcome.kind == "text"
    rows = append(outcome.cache, outcome.embeddings, outcome.keep)
    (result,) = run(engine, rows)
    assert isinstance(result, LogitRows)
    return result


def image(engine: VisionEngine, seed: int, before: int = 0) -> AppendWork:
    """An image behind some positions of a new session."""
    cache = engine.new_cache()
    if before:
        run(engine, append(cache, drawn(seed, before, engine.hidden_size)))
    return append(cache, drawn(seed, engine.encoder_context, engine.encoder_size), rows=0, kind="image")


def test_images_and_texts_in_one_batch_are_what_each_is_alone(vision: VisionEngine) -> None:
    text = drawn(9, 3, vision.hidden_size)
    images = [looked(vision, run(vision, image(vision, seed, seed))[0]) for seed in range(3)]
    (alone,) = run(vision, append(vision.new_cache(), text))
    first, beside, *others = run(
        vision, image(vision, 0), append(vision.new_cache(), text), image(vision, 1, 1), image(vision, 2, 2)
    )
    assert isinstance(beside, LogitRows) and isinstance(alone, LogitRows)
    close(beside.values, alone.values)
    for seen, wanted in zip((first, *others), images, strict=True):
        close(looked(vision, seen).values, wanted.values)


def test_an_image_that_overflows_fails_alone(vision: VisionEngine) -> None:
    culprit, other = image(vision, 0, 4), image(vision, 1)
    culprit.embeddings[:] = LARGE
    failed, seen = run(vision, culprit, other)
    assert code(failed) == "internal" and culprit.cache.length == 4
    close(looked(vision, seen).values, looked(vision, run(vision, image(vision, 1))[0]).values)
