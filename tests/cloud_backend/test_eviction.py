"""Who gets KV memory and who gives it back: the least recently used, and nobody in the middle of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cloud_backend.eviction import IDLE_SECONDS, PATIENCE_SECONDS, STUCK_SECONDS, Admission
from cloud_backend.kv_cache import PAGE, KVCache
from tests.cloud_backend.list_jobs import JobEngine, Line, append, code, encode

PAGES = 6
BRIEF = 0.01  # seconds


class Clock:
    """What the time is, for admission and turns alike."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("cloud_backend.eviction.time", clock)
    return clock


class Memory:
    """The admission of an engine with PAGES pages, and who was evicted."""

    def __init__(self) -> None:
        self.engine: Any = JobEngine(PAGES)
        self.evicted: list[KVCache] = []
        self.admission = Admission(self.engine, lambda engine: self.evicted.append(engine))
        self.caches: list[KVCache] = []

    def ask(self, cache: KVCache, pages: int, *, running: Any = (), pending: Any = (), alone: bool = False) -> bool:
        """Whether a session may hold so many pages in all; then it does."""
        admitted = self.admission.admit(append(cache, pages * PAGE, keep=0), running, pending, alone=alone)
        if admitted:
            cache.length = pages * PAGE
        return admitted

    def session(self, pages: int = 0, owner: str = "") -> KVCache:
        """One that has had a result, where it holds any pages."""
        cache: KVCache = self.engine.new_cache()
        cache.owner = owner
        assert not pages or self.ask(cache, pages)
        self.admission.used(cache, answered=True)
        return cache


@pytest.fixture
def memory(clock: Clock) -> Memory:
    return Memory()


def full(memory: Memory, clock: Clock) -> list[KVCache]:
    """Three sessions that hold all, used one after the other."""
    caches = []
    for _ in range(3):
        caches.append(memory.session(PAGES // 3))
        clock.now += BRIEF
    return caches


# --- the least recently used ---


def test_the_session_that_was_idle_longest_gives_its_memory(memory: Memory, clock: Clock) -> None:
    caches = full(memory, clock)
    clock.now += IDLE_SECONDS
    assert memory.ask(memory.session(), 1)
    assert [cache.length for cache in caches] == [0, 2 * PAGE, 2 * PAGE]


def test_a_session_that_was_served_lately_is_not_the_one(memory: Memory, clock: Clock) -> None:
    caches = full(memory, clock)
    clock.now += BRIEF
    memory.admission.used(caches[0])
    clock.now += IDLE_SECONDS
    assert memory.ask(memory.session(), 1)
    assert [bool(cache.length) for cache in caches] == [True, False, True]


def test_no_more_are_evicted_than_are_needed(memory: Memory, clock: Clock) -> None:
    caches = full(memory, clock)
    clock.now += IDLE_SECONDS
    assert memory.ask(memory.session(), 3)
    assert [bool(cache.length) for cache in caches] == [False, False, True] and len(memory.evicted) == 2


def test_an_evicted_session_holds_nothing_and_is_told_to_whoever_counts(memory: Memory, clock: Clock) -> None:
    cache = full(memory, clock)[0]
    clock.now += IDLE_SECONDS
    memory.ask(memory.session(), 2)
    assert (cache.length, cache.held, cache.last) == (0, 0, None)
    assert memory.evicted == [memory.engine]


def test_memory_that_is_free_is_taken_before_anyone_is_evicted(memory: Memory, clock: Clock) -> None:
    memory.session(PAGES - 2)
    clock.now += IDLE_SECONDS + BRIEF
    assert memory.ask(memory.session(), 2) and not memory.evicted


def test_a_session_that_grows_does_not_evict_itself(memory: Memory, clock: Clock) -> None:
    one, other = memory.session(4), memory.session(2)
    clock.now += IDLE_SECONDS + BRIEF
    assert memory.ask(one, 5)
    assert (one.length, other.length) == (5 * PAGE, 0)


# --- who is left alone ---


def test_a_session_that_was_used_just_now_is_left_alone(memory: Memory, clock: Clock) -> None:
    full(memory, clock)
    clock.now += IDLE_SECONDS - 10 * BRIEF
    assert not memory.ask(memory.session(), 1) and not memory.evicted


def test_a_session_of_which_a_request_waits_is_left_alone(memory: Memory, clock: Clock) -> None:
    caches = full(memory, clock)
    clock.now += IDLE_SECONDS + BRIEF
    assert memory.ask(memory.session(), 1, pending=caches[:2])
    assert [bool(cache.length) for cache in caches] == [True, True, False]


@pytest.mark.parametrize("waited", [0.0, STUCK_SECONDS + BRIEF, PATIENCE_SECONDS + BRIEF, 100.0])
def test_a_session_of_the_step_that_is_put_together_is_left_alone(memory: Memory, clock: Clock, waited: float) -> None:
    caches, newcomer = full(memory, clock), memory.session()
    memory.ask(newcomer, 1, running=caches, pending=caches)
    clock.now += waited
    assert not memory.ask(newcomer, 1, running=caches, pending=[*caches, newcomer]) and not memory.evicted


# --- in line ---


def test_newcomers_stand_in_line_behind_who_waits_for_much(memory: Memory, clock: Clock) -> None:
    memory.session(PAGES - 2)
    large, small = memory.session(), memory.session()
    assert not memory.ask(large, 4)
    assert not memory.ask(small, 1)  # though it would fit
    clock.now += IDLE_SECONDS + BRIEF
    assert memory.ask(large, 4) and memory.ask(small, 1)


def test_a_session_that_holds_memory_grows_past_the_line(memory: Memory, clock: Clock) -> None:
    held, large = memory.session(PAGES - 2), memory.session()
    assert not memory.ask(large, 4)
    assert memory.ask(held, PAGES - 1)


def test_the_line_moves_on_when_a_request_in_it_is_gone(memory: Memory, clock: Clock) -> None:
    memory.session(PAGES - 2)
    large, small = memory.session(), memory.session()
    assert not memory.ask(large, 4)
    memory.admission.still({small})
    assert memory.ask(small, 1)


def test_a_session_that_has_ended_is_out_of_the_line(memory: Memory, clock: Clock) -> None:
    memory.session(PAGES - 2)
    large, small = memory.session(), memory.session()
    assert not memory.ask(large, 4)
    memory.admission.forget(large)
    assert memory.ask(small, 1)


def test_patience_begins_anew_for_a_request_that_comes_again(memory: Memory, clock: Clock) -> None:
    caches, newcomer = full(memory, clock), memory.session()
    assert not memory.ask(newcomer, 1, pending=caches)
    clock.now += PATIENCE_SECONDS - BRIEF
    memory.admission.still(set(caches))
    assert not memory.ask(newcomer, 1, pending=caches)
    clock.now += 2 * BRIEF
    assert not memory.ask(newcomer, 1, pending=caches) and not memory.evicted


# --- when patience ends ---


def test_who_had_memory_longest_makes_room_for_who_waited_long(memory: Memory, clock: Clock) -> None:
    caches, newcomer = full(memory, clock), memory.session()
    assert not memory.ask(newcomer, 1, pending=caches)
    clock.now += PATIENCE_SECONDS + BRIEF
    for cache in reversed(caches):
        memory.admission.used(cache)  # what counts is since when they have it
    assert memory.ask(newcomer, 1, pending=caches)
    assert [bool(cache.length) for cache in caches] == [False, True, True]


def test_who_was_let_in_lately_is_not_evicted_for_who_waited_long(memory: Memory, clock: Clock) -> None:
    newcomer, held = memory.session(), memory.session(PAGES - 1)
    assert not memory.ask(newcomer, 2, pending=[held])
    clock.now += PATIENCE_SECONDS
    latest = memory.session()
    memory.admission.forget(newcomer)
    assert memory.ask(latest, 1, pending=[held])
    clock.now -= 1.0  # as if the newcomer had waited all the time
    assert not memory.ask(newcomer, 2, pending=[held, latest])
    clock.now += PATIENCE_SECONDS + BRIEF
    assert memory.ask(newcomer, 2, running=[latest], pending=[held, latest])
    assert (held.length, latest.length) == (0, PAGE)


def test_where_nothing_can_run_the_last_to_come_makes_room_soon(memory: Memory, clock: Clock) -> None:
    caches = full(memory, clock)
    assert not memory.ask(caches[0], 3, pending=caches, alone=True)
    clock.now += STUCK_SECONDS + BRIEF
    assert memory.ask(caches[0], 3, pending=caches, alone=True)
    assert [bool(cache.length) for cache in caches] == [True, True, False]


def test_a_newcomer_evicts_nobody_soon_where_nothing_can_run(memory: Memory, clock: Clock) -> None:
    caches, newcomer = full(memory, clock), memory.session()
    waiting = [*caches, newcomer]
    assert not memory.ask(newcomer, 1, pending=waiting, alone=True)
    clock.now += STUCK_SECONDS + BRIEF
    assert not memory.ask(newcomer, 1, pending=waiting, alone=True) and not memory.evicted


def test_an_idle_session_that_holds_nothing_does_not_hide_that_nothing_can_run(memory: Memory, clock: Clock) -> None:
    caches = full(memory, clock)
    caches[1].clear()
    assert not memory.ask(caches[0], 6, pending=[caches[0], caches[2]], alone=True)
    clock.now += STUCK_SECONDS + BRIEF
    assert memory.ask(caches[0], 6, pending=[caches[0], caches[2]], alone=True)


def test_who_had_no_result_yet_is_not_evicted_for_who_waited_long(memory: Memory, clock: Clock) -> None:
    reading, newcomer = memory.engine.new_cache(), memory.session()
    assert memory.ask(reading, PAGES)
    assert not memory.ask(newcomer, 1, pending=[reading])
    clock.now += 10 * PATIENCE_SECONDS
    assert not memory.ask(newcomer, 1, pending=[reading])
    memory.admission.used(reading, answered=True)
    clock.now += PATIENCE_SECONDS - BRIEF
    assert not memory.ask(newcomer, 1, pending=[reading])
    clock.now += 2 * BRIEF
    assert memory.ask(newcomer, 1, pending=[reading])


def test_where_a_session_is_between_two_tokens_nobody_is_evicted_soon(memory: Memory, clock: Clock) -> None:
    caches = full(memory, clock)
    assert not memory.ask(caches[0], 3, pending=caches[:2], alone=True)
    clock.now += STUCK_SECONDS + BRIEF
    assert not memory.ask(caches[0], 3, pending=caches[:2], alone=True) and not memory.evicted


# --- in steps ---


@pytest.fixture
def line(clock: Clock) -> Iterator[Line]:
    line = Line(JobEngine(PAGES))
    yield line
    line.close()


def answered(line: Line, count: int) -> KVCache:
    cache: KVCache = line.engine.new_cache()
    line.submit(append(cache, count))
    while line.jobs:
        line.step()
    return cache


def until(done: Callable[[], bool], line: Line, clock: Clock, decoding: list[KVCache], pause: int = 0) -> float:
    """Steps of 10 ms until it is so, and the seconds that took. Meanwhile these sessions decode, with pauses of steps
    between their tokens."""
    began, step = clock.now, 0
    while not done():
        assert clock.now - began < 10
        waiting = {job.cache for job in line.jobs}
        for cache in decoding:
            if cache not in waiting and step % (pause + 1) == 0:
                line.submit(append(cache, 1, keep=max(0, cache.length - 1)))
        line.step()
        clock.now, step = clock.now + BRIEF, step + 1
    return clock.now - began


@pytest.mark.parametrize("pause", [0, 1, 9])
def test_sessions_that_decode_are_left_alone_until_patience_ends(line: Line, clock: Clock, pause: int) -> None:
    decoding = [answered(line, 2 * PAGE) for _ in range(3)]
    newcomer = line.submit(append(line.engine.new_cache(), 2))
    took = until(newcomer.done.done, line, clock, decoding, pause)
    assert PATIENCE_SECONDS <= took < PATIENCE_SECONDS + 20 * BRIEF
    assert line.engine.evictions == 1


def test_prompts_that_hold_up_each_other_come_to_an_end_one_after_the_other(line: Line, clock: Clock) -> None:
    jobs = [line.submit(append(line.engine.new_cache(), PAGES * PAGE)) for _ in range(3)]
    until(lambda: not line.jobs, line, clock, [])
    assert [code(job) for job in jobs] == [None] * 3


def test_a_prompt_is_let_in_with_memory_for_all_of_it(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud_backend.turns.CHUNK_ALONE", {"cpu": PAGE})
    first, second = (line.submit(append(line.engine.new_cache(), (PAGES - 1) * PAGE)) for _ in range(2))
    assert list(line.step()) == [first]
    assert (first.sent, first.cache.held, second.cache.held) == (PAGE // 2, PAGES - 1, 0)


@pytest.mark.parametrize(("count", "prompt", "fits"), [(50, 200, 5), (60, 1000, 22)])
def test_more_prompts_than_fit_all_come_to_an_end(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, count: int, prompt: int, fits: int
) -> None:
    monkeypatch.setattr("cloud_backend.turns.time", clock)
    tokens = 20
    line = Line(JobEngine(fits * -(-(prompt + tokens) // PAGE)))
    left = {line.engine.new_cache(): tokens for _ in range(count)}
    length = dict.fromkeys(left, prompt)  # that the device would send again
    asked = {cache: line.submit(append(cache, prompt)) for cache in left}
    began = clock.now
    while asked:
        step = line.step()
        clock.now += BRIEF + sum(len(piece.embeddings) for piece in step.values()) / 1000
        assert clock.now - began < 2 * count * (prompt + tokens) / 1000, "they hold up each other"
        for cache, job in list(asked.items()):
            if job.done.done():
                del asked[cache]
                if code(job) is not None:
                    asked[cache] = line.submit(append(cache, length[cache], keep=0))
                elif left[cache]:
                    left[cache] -= 1
                    length[cache] += 1
                    asked[cache] = line.submit(append(cache, 1))
                else:
                    line.turns.forget(cache)
                    cache.clear()
    assert line.engine.evictions < count
    line.close()


def test_prompts_that_wait_for_memory_do_not_hold_the_turns_of_those_that_have_it(line: Line) -> None:
    held = [line.submit(append(line.engine.new_cache(), 2 * PAGE)) for _ in range(3)]
    waiting = [line.submit(append(line.engine.new_cache(), PAGES * PAGE)) for _ in range(100)]
    line.step()
    assert set(line.step()) == set(held) and not any(job.cache.held for job in waiting)


def test_what_needs_no_memory_is_not_held_up(clock: Clock) -> None:
    engine: Any = JobEngine(None)
    line = Line(engine)
    jobs = [line.submit(encode(engine.new_cache(), 9)) for _ in range(3)]
    line.step()
    assert all(job.done.done() for job in jobs)
    line.close()


# --- owners ---


def owned(memory: Memory, clock: Clock, **pages: int) -> dict[str, KVCache]:
    """A session of each owner, used one after the other."""
    caches = {}
    for owner, count in pages.items():
        caches[owner] = memory.session(count, owner.rstrip("0123456789"))
        clock.now += BRIEF
    return caches


def test_who_holds_more_than_its_part_gives_first(memory: Memory, clock: Clock) -> None:
    caches = owned(memory, clock, car=1, crowd1=2, crowd2=2)
    clock.now += IDLE_SECONDS
    newcomer = memory.session()
    newcomer.owner = "crowd"
    assert memory.ask(newcomer, 2)
    assert [bool(cache.length) for cache in caches.values()] == [True, False, True]  # though the car was idle longest


def test_an_answer_of_who_holds_little_is_not_interrupted_for_who_holds_much(memory: Memory, clock: Clock) -> None:
    caches = owned(memory, clock, car=1, crowd1=3, crowd2=2)
    newcomer = memory.session()
    newcomer.owner = "crowd"
    busy = {caches["car"], caches["crowd1"], caches["crowd2"]}
    assert not memory.ask(newcomer, 6, pending=busy)
    clock.now += PATIENCE_SECONDS + BRIEF
    assert not memory.ask(newcomer, 6, pending=busy)  # all of the crowd's own is not enough
    assert caches["car"].length and not caches["crowd1"].length and not caches["crowd2"].length


def test_an_answer_of_who_holds_much_is_interrupted_for_who_holds_little(memory: Memory, clock: Clock) -> None:
    caches = owned(memory, clock, car=1, crowd1=3, crowd2=2)
    newcomer = memory.session()
    newcomer.owner = "truck"
    busy = set(caches.values())
    assert not memory.ask(newcomer, 1, pending=busy)
    clock.now += PATIENCE_SECONDS + BRIEF
    assert memory.ask(newcomer, 1, pending=busy)
    assert [bool(cache.length) for cache in caches.values()] == [True, False, True]
