"""Whose turn it is: who is in a step, with how much, and that nobody waits for long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_backend.kv_cache import PAGE, KVCache
from cloud_backend.turns import CHUNK_ALONE, CHUNK_BESIDE, LARGEST_BATCH, LEAST_CHUNK, MOST_WHOLE, SHORT, Job
from tests.cloud_backend.list_jobs import JobEngine, Line, append, code, encode

ALONE, BESIDE = CHUNK_ALONE["cpu"], CHUNK_BESIDE["cpu"]


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.close()


def decoding(line: Line) -> KVCache:
    """A session that has just had a token."""
    cache: KVCache = line.engine.new_cache()
    line.submit(append(cache, 3))
    line.step()
    return cache


def filled(line: Line, length: int) -> KVCache:
    """A session that holds so many positions."""
    cache: KVCache = line.engine.new_cache()
    job = line.submit(append(cache, length))
    while not job.done.done():
        line.step()
    return cache


def prompts(line: Line, *counts: int, rows: int = 1) -> list[Job]:
    return [line.submit(append(line.engine.new_cache(), count, rows=rows)) for count in counts]


# --- how much of each ---


def test_a_prompt_alone_goes_in_large_chunks(line: Line) -> None:
    prompts(line, 2 * ALONE + 40)
    assert [line.sizes(), line.sizes(), line.sizes(), line.sizes()] == [[ALONE], [ALONE], [40], []]


def test_a_prompt_beside_a_session_that_decodes_goes_in_small_chunks(line: Line) -> None:
    decoding(line)
    prompts(line, 2 * BESIDE + 10)
    assert [line.sizes(), line.sizes(), line.sizes()] == [[BESIDE], [BESIDE], [10]]


def test_prompts_share_the_rows_of_a_step(line: Line) -> None:
    prompts(line, 1000, 1000, 1000, 1000)
    assert line.sizes() == [ALONE // 4] * 4


def test_what_prompts_cannot_share_evenly_is_the_first_ones(line: Line) -> None:
    decoding(line)
    prompts(line, 100, 100, 100)
    assert line.sizes() == [BESIDE - 2 * (BESIDE // 3), BESIDE // 3, BESIDE // 3]


@pytest.mark.parametrize("count", [1, 2, SHORT])
def test_a_request_of_few_embeddings_goes_whole_beside_prompts(line: Line, count: int) -> None:
    prompts(line, 1000, 1000)
    line.submit(append(decoding(line), count))
    assert line.sizes()[-1] == count


def test_more_prompts_than_a_step_has_room_for_take_turns(line: Line) -> None:
    decoding(line)
    prompts(line, *[100] * 20)
    first, second = line.sizes(), line.sizes()
    assert first.count(0) == 10 and [bool(a) for a in first] == [not b for b in second]
    assert min(size for size in (*first, *second) if size) >= LEAST_CHUNK


def test_a_step_takes_the_largest_batch_and_no_more(line: Line) -> None:
    prompts(line, *[1] * (LARGEST_BATCH + 9))
    assert line.sizes() == [1] * LARGEST_BATCH + [0] * 9


def test_a_session_that_has_long_had_no_token_does_not_count_as_decoding(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding(line)
    monkeypatch.setattr("cloud_backend.turns.DECODING_SECONDS", 0.0)
    prompts(line, 1000)
    assert line.sizes() == [ALONE]


def test_on_a_gpu_chunks_are_larger() -> None:
    engine = JobEngine()
    engine.device = "cuda"
    line = Line(engine)
    prompts(line, 10_000)
    assert line.sizes() == [CHUNK_ALONE["cuda"]]
    line.close()


# --- the pieces ---


@given(count=st.integers(1, 900), rows=st.integers(0, 64), beside=st.booleans(), keep=st.integers(0, 70))
@settings(max_examples=30, deadline=None)
def test_the_pieces_of_a_prompt_are_the_prompt_and_the_last_alone_is_answered(
    count: int, rows: int, beside: bool, keep: int
) -> None:
    line = Line()
    cache = decoding(line) if beside else None
    held = filled(line, 70)
    work = append(held, count, keep=keep, rows=min(rows, count))
    job = line.submit(work)
    pieces = []
    while not job.done.done():
        if cache is not None:
            line.submit(append(cache, 1))
        pieces.append(line.step()[job])
    assert np.array_equal(np.concatenate([piece.embeddings for piece in pieces]), work.embeddings)
    starts = np.cumsum([keep, *(len(piece.embeddings) for piece in pieces)]).tolist()
    assert [piece.keep for piece in pieces] == starts[:-1]  # type: ignore[union-attr]
    assert [piece.rows for piece in pieces] == [0] * (len(pieces) - 1) + [work.rows]  # type: ignore[union-attr]
    most = max(SHORT, BESIDE if beside else ALONE)
    assert all(len(piece.embeddings) < most + max(1, work.rows) for piece in pieces)
    line.close()


@pytest.mark.parametrize("rows", [ALONE - 10, ALONE, ALONE + 100])
def test_results_come_from_one_piece_however_many_they_are(line: Line, rows: int) -> None:
    (job,) = prompts(line, 2 * ALONE, rows=rows)
    pieces = []
    while not job.done.done():
        pieces.append(line.step()[job])
    assert [piece.rows for piece in pieces][-1] == rows <= len(pieces[-1].embeddings)  # type: ignore[union-attr]


# --- what is never cut ---


def test_an_encode_and_an_image_are_never_cut(line: Line) -> None:
    decoding(line)
    cache = line.engine.new_cache()
    line.submit(encode(cache, 900))
    line.submit(append(line.engine.new_cache(), 600, rows=0, kind="image"))
    assert line.sizes() == [900, 600]


def test_no_more_goes_whole_into_a_step_than_it_takes(line: Line) -> None:
    for count in (MOST_WHOLE - 100, 90, 20, MOST_WHOLE - 50):
        line.submit(encode(line.engine.new_cache(), count))
    assert line.sizes() == [MOST_WHOLE - 100, 90, 0, 0]
    assert line.sizes() == [20, MOST_WHOLE - 50]


def test_one_that_is_larger_than_a_step_goes_whole_all_the_same(line: Line) -> None:
    line.submit(encode(line.engine.new_cache(), MOST_WHOLE + 1))
    assert line.sizes() == [MOST_WHOLE + 1]


def test_a_prompt_goes_on_beside_what_is_never_cut(line: Line) -> None:
    prompts(line, 1000)
    line.submit(encode(line.engine.new_cache(), MOST_WHOLE))
    assert line.sizes() == [ALONE, MOST_WHOLE]


# --- order ---


def test_among_equals_who_came_first_is_first(line: Line) -> None:
    jobs = prompts(line, *[1] * 5)
    assert [job for job, _ in line.plan()] == jobs


def test_who_was_served_longest_ago_is_first(line: Line) -> None:
    decoding(line)
    jobs = prompts(line, *[100] * 20)
    step = line.step()
    line.submit(append(line.engine.new_cache(), 1))  # comes later, so it is behind those who waited
    assert [job for job, _ in line.plan()] == [*(job for job in jobs if job not in step), line.jobs[-1]]


def test_two_requests_of_one_session_are_not_in_one_step(line: Line) -> None:
    cache = line.engine.new_cache()
    first, second = line.submit(append(cache, 2)), line.submit(append(cache, 2, keep=0))
    assert list(line.step()) == [first]
    assert list(line.step()) == [second]


# --- what was evicted meanwhile ---


def test_a_request_that_builds_on_an_evicted_cache_is_out_of_step(line: Line) -> None:
    cache = decoding(line)
    job = line.submit(append(cache, 1))
    cache.clear()
    assert line.step() == {} and code(job) == "out_of_step"


def test_a_prompt_that_was_evicted_between_its_chunks_starts_again(line: Line) -> None:
    (job,) = prompts(line, 2 * ALONE)
    line.step()
    job.cache.clear()
    assert line.step()[job].keep == 0  # type: ignore[union-attr]
    line.step()
    assert job.done.done() and job.cache.length == 2 * ALONE


def test_a_prompt_behind_others_that_was_evicted_between_its_chunks_is_out_of_step(line: Line) -> None:
    cache = decoding(line)
    job = line.submit(append(cache, 2 * ALONE))
    line.step()
    cache.clear()
    assert line.step() == {} and code(job) == "out_of_step"


@pytest.mark.parametrize(("held", "keep", "needed"), [([5], 10, 2), ([1, 5], PAGE - 9, 3)])
def test_a_session_that_is_evicted_for_another_of_the_same_step_is_not_in_it(
    monkeypatch: pytest.MonkeyPatch, held: list[int], keep: int, needed: int
) -> None:
    # There is room for what it asks for, but it would read positions that are lost: what others left there.
    line = Line(JobEngine(pages=6))
    caches = [filled(line, pages * PAGE - 5) for pages in held]
    newcomer = line.submit(append(line.engine.new_cache(), needed * PAGE))
    jobs = [line.submit(append(cache, 1, keep=keep)) for cache in caches]
    monkeypatch.setattr("cloud_backend.turns.DECODING_SECONDS", 0.0)  # all of the newcomer's prompt in one step
    monkeypatch.setattr("cloud_backend.eviction.PATIENCE_SECONDS", -1.0)  # nobody is spared
    step = dict(line.plan())
    assert line.engine.evictions == len(held) and newcomer in step
    assert not [job for job in jobs if job in step]
    line.close()


# --- what is let go ---


@pytest.mark.parametrize(("begun", "length"), [(None, 70), (1.0, 40)])
def test_a_request_that_is_let_go_leaves_the_cache_cut_to_keep_where_it_had_begun(
    line: Line, begun: float | None, length: int
) -> None:
    cache = line.engine.new_cache()
    line.submit(append(cache, 70))
    line.step()
    job = line.submit(append(cache, 100, keep=40))
    job.begun = begun
    job.let_go()
    assert (cache.length, cache.held) == (length, -(-length // PAGE))


def test_a_piece_of_a_whole_request_is_the_request(line: Line) -> None:
    work = replace(append(line.engine.new_cache(), 300), rows=0, kind="image")
    assert line.submit(work).piece(8) is work
