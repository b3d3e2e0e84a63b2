"""Nobody waits for long, whoever else comes: turns over sessions that begin at any time with any prompt."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_backend.kv_cache import KVCache
from cloud_backend.turns import CHUNK_ALONE, LARGEST_BATCH
from tests.cloud_backend.list_jobs import Line, append


@dataclass(frozen=True)
class Arrival:
    """A session that begins: after so many steps, with a prompt of so many, and then so many tokens."""

    step: int
    prompt: int
    tokens: int


arrivals = st.lists(
    st.builds(Arrival, st.integers(0, 12), st.integers(1, 12) | st.integers(17, 200), st.integers(0, 20)),
    min_size=1,
    max_size=LARGEST_BATCH,
)


def longest_waits(sessions: list[Arrival], steps: int) -> list[tuple[int, int]]:
    """Of each time that a session waited on: for how many steps, and how often the most served one was served then."""
    line, caches, left = Line(), {}, {}
    waited: dict[KVCache, list[set[KVCache]]] = {}
    found = []
    for at in range(steps):
        for which, session in enumerate(sessions):
            if session.step == at:
                caches[which] = line.engine.new_cache()
                left[which] = session.tokens
                line.submit(append(caches[which], session.prompt))
        pending = {job.cache for job in line.jobs}
        for which, cache in caches.items():
            if cache not in pending and left[which]:
                left[which] -= 1
                line.submit(append(cache, 1))
        pending = {job.cache for job in line.jobs}
        served = {job.cache for job in line.step()}
        for cache in pending:
            waited.setdefault(cache, []).append(served)
            if cache in served:
                waited[cache] = []
            else:
                others = [sum(other in step for step in waited[cache]) for other in set().union(*waited[cache])]
                found.append((len(waited[cache]), max(others, default=0)))
    line.close()
    return found


@settings(max_examples=60, deadline=None)
@given(arrivals)
def test_nobody_waits_for_more_than_two_steps_while_another_gets_more_than_two(sessions: list[Arrival]) -> None:
    assert not [one for one in longest_waits(sessions, 40) if min(one) > 2]


def test_those_who_keep_coming_do_not_hold_up_who_was_served_before() -> None:
    first = [Arrival(0, 1, 40), Arrival(0, CHUNK_ALONE["cpu"] + 100, 0)]
    coming = [Arrival(step, 100, 0) for step, count in ((1, 16), (2, 4), (3, 22)) for _ in range(count)]
    assert not [one for one in longest_waits(first + coming, 40) if min(one) > 2]
