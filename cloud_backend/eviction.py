"""Who may take KV memory, and who has to give some back: the least recently used session that nobody waits for.

An evicted session's KV length is 0. Its device hears `out_of_step` at its next request and sends everything again.
Memory that is short for long must not be fought over, token by token. So a request is let in with all the memory that
it needs; half-read prompts would else evict each other, and none would ever end. Sessions are left alone for a while
after they were used, and from when they were let in until a while after their first result.

Owners of tokens have equal parts. Who holds more than its part gives back first, and no answer of those who hold less
is interrupted for it: a token with sessions without end takes memory from itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

from cloud_backend.engine import Engine, Work
from cloud_backend.kv_cache import KVCache

IDLE_SECONDS = 1.0  # after which memory may be taken from a session of which nothing waits
PATIENCE_SECONDS = 2.0  # that a request waits for memory before sessions in the middle of their answers make room
STUCK_SECONDS = 0.1  # the same where all wait for memory that the others hold


class Admission:
    """The sessions of one engine that hold KV memory."""

    def __init__(self, engine: Engine, evicted: Callable[[Engine], None]) -> None:
        self._engine = engine
        self._evicted = evicted
        self._used: dict[KVCache, float] = {}  # when, the least recently used first
        self._inside: dict[KVCache, None] = {}  # who was let in, in that order
        self._answered: dict[KVCache, float] = {}  # when it got its first result since
        self._blocked: dict[KVCache, float] = {}  # since when its request waits for memory

    def admit(
        self, work: Work, running: Collection[KVCache], pending: Collection[KVCache], *, alone: bool = False
    ) -> bool:
        """Takes the memory that all of `work` needs, from others if need be. False: not now.

        running: caches of the step that is being put together. pending: those that have requests waiting.
        alone: none of those can run.
        """
        if self._engine.pool is None:
            return True
        cache, now = work.cache, time.monotonic()
        first = next(iter(self._blocked), cache)
        newcomer = not cache.held
        if newcomer and cache is not first:  # newcomers stand in line, as what is free is waited for
            self._blocked.setdefault(cache, now)
            return False
        if not work.reserve():
            blocked = now - self._blocked.setdefault(cache, now)
            # Sessions between two requests come back, or are idle soon.
            stuck = alone and not running and blocked > STUCK_SECONDS and self._all_wait(pending)
            spared = {cache, *running}
            for victim in self._victims(cache, pending, starving=blocked > PATIENCE_SECONDS, stuck=stuck):
                if victim in spared or not victim.held:
                    continue
                victim.clear()
                self.forget(victim)
                self._evicted(self._engine)
                if work.reserve():
                    break
            else:
                return False
        self._blocked.pop(cache, None)
        if newcomer:
            self._inside.pop(cache, None)
            self._answered.pop(cache, None)
        self._inside.setdefault(cache)
        self._used.pop(cache, None)
        self._used[cache] = now
        return True

    def _victims(
        self, taker: KVCache, pending: Collection[KVCache], *, starving: bool, stuck: bool
    ) -> Iterator[KVCache]:
        now, greedy = time.monotonic(), self._greedy(taker)
        idle = [one for one, used in self._used.items() if one not in pending and now - used > IDLE_SECONDS]
        yield from _first(idle, greedy)
        if starving:  # whoever had its time, the first first
            had = [one for one, since in self._answered.items() if now - since > PATIENCE_SECONDS]
            spared = taker.owner in greedy
            yield from _first([one for one in had if one.owner in greedy or not spared], greedy)
        if stuck and taker in self._inside:  # whoever came after it, the last first, so that the first come to an end
            inside = list(self._inside)
            yield from _first(reversed(inside[inside.index(taker) + 1 :]), greedy)

    def _all_wait(self, pending: Collection[KVCache]) -> bool:
        """Whether all who hold memory have requests waiting."""
        return all(one in pending for one in self._used if one.held)

    def _greedy(self, taker: KVCache) -> set[str]:
        """Owners that hold more than an equal part of the memory."""
        held = Counter({taker.owner: 0})
        for cache in self._inside:
            held[cache.owner] += cache.held
        pool = self._engine.pool
        part = pool.pages / len(held) if pool is not None else 0
        return {owner for owner, pages in held.items() if pages > part}

    def still(self, pending: Collection[KVCache]) -> None:
        """Forgets who waited for memory and does so no more."""
        self._blocked = {cache: since for cache, since in self._blocked.items() if cache in pending}

    def is_first(self, cache: KVCache) -> bool:
        """Whether its request is the first of those that wait for memory."""
        return cache is next(iter(self._blocked), None)

    def waits(self, cache: KVCache) -> bool:
        """Whether its request waits for memory, or for the line of those who do, behind the first of them."""
        in_line = cache in self._blocked or (bool(self._blocked) and not cache.held)
        return in_line and not self.is_first(cache)

    def used(self, cache: KVCache, *, answered: bool = False) -> None:
        """Notes that a session was served just now. answered: with a result."""
        if cache in self._used:
            self._used.pop(cache)
            self._used[cache] = time.monotonic()
            if answered:
                self._answered.setdefault(cache, self._used[cache])

    def forget(self, cache: KVCache) -> None:
        """The session holds nothing any more, or its request is gone."""
        for known in (self._used, self._inside, self._answered, self._blocked):
            known.pop(cache, None)


def _first(caches: Iterable[KVCache], owners: Collection[str]) -> list[KVCache]:
    """Those of `owners` before the others, else in their order."""
    return sorted(caches, key=lambda cache: cache.owner not in owners)
