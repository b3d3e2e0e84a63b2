"""What outlives a connection: for whom, for how long, and that its secret is in no text."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_backend.kv_cache import PAGE, KVCache
from cloud_backend.leases import Lease, Leases
from tests.cloud_backend.list_jobs import JobEngine

GRACE = 60.0
BOUND = ("tiny", "key", "car")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Connection:
    """Has a session until another one takes it."""

    def __init__(self) -> None:
        self.displaced = 0

    def displace(self) -> None:
        self.displaced += 1


class House:
    """Leases of one engine, and what was given back."""

    def __init__(self) -> None:
        self.engine: Any = JobEngine(pages=8)
        self.released: list[KVCache] = []
        self.leases = Leases(GRACE, self._release)

    def _release(self, engine: Any, cache: KVCache) -> None:
        assert engine is self.engine
        self.released.append(cache)
        cache.clear()

    def open(self, positions: int = 2 * PAGE, by: Connection | None = None) -> Lease:
        """A session that holds so many positions."""
        lease = self.leases.new(BOUND, self.engine, (by or Connection()).displace)
        assert lease.cache.pages is not None and lease.cache.pages.reserve(positions)
        lease.cache.length = positions
        return lease

    def lost(self, positions: int = 2 * PAGE) -> Lease:
        """A session whose connection was lost."""
        connection = Connection()
        lease = self.open(positions, connection)
        self.leases.leave(lease, connection.displace, keep=True)
        return lease


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("cloud_backend.leases.time", clock)
    return clock


@pytest.fixture
def house(clock: Clock) -> House:
    return House()


# --- coming back ---


def test_whoever_has_the_secret_gets_the_very_session_back(house: House) -> None:
    lease = house.lost()
    again = house.leases.take(lease.secret, BOUND, Connection().displace)
    assert again is lease and (lease.cache.length, lease.cache.held) == (2 * PAGE, 2) and not house.released


def test_a_session_can_be_left_and_taken_again_and_again(house: House, clock: Clock) -> None:
    lease = house.lost()
    for _ in range(4):
        clock.now += GRACE - 1
        house.leases.expire()
        connection = Connection()
        assert house.leases.take(lease.secret, BOUND, connection.displace) is lease
        house.leases.leave(lease, connection.displace, keep=True)


@pytest.mark.parametrize("secret", ["", "x", "é" * 40, "\x00"])
def test_a_secret_that_nobody_was_given_gets_nothing(house: House, secret: str) -> None:
    house.lost()
    assert house.leases.take(secret, BOUND, Connection().displace) is None


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_secret_is_bound_to_the_model_the_key_and_the_token(house: House, at: int) -> None:
    lease = house.lost()
    other = [*BOUND]
    other[at] = "another"
    assert house.leases.take(lease.secret, (other[0], other[1], other[2]), Connection().displace) is None
    assert house.leases.take(lease.secret, BOUND, Connection().displace) is lease  # and it is there still


def test_secrets_differ_and_have_128_bits(house: House) -> None:
    secrets = {house.open(0).secret for _ in range(8)}
    assert len(secrets) == 8 and min(map(len, secrets)) >= 22  # base64


# --- one connection has it ---


def test_the_newest_connection_wins_and_the_older_is_told_once(house: House) -> None:
    older, newer = Connection(), Connection()
    lease = house.open(by=older)
    assert house.leases.take(lease.secret, BOUND, newer.displace) is lease
    assert (older.displaced, newer.displaced) == (1, 0)


def test_a_wrong_token_displaces_nobody(house: House) -> None:
    older = Connection()
    lease = house.open(by=older)
    assert house.leases.take(lease.secret, ("tiny", "key", "thief"), Connection().displace) is None
    assert older.displaced == 0


@pytest.mark.parametrize("keep", [True, False])
def test_the_older_connection_ends_nothing_when_it_leaves(house: House, clock: Clock, keep: bool) -> None:
    older = Connection()
    lease = house.open(by=older)
    house.leases.take(lease.secret, BOUND, Connection().displace)
    house.leases.leave(lease, older.displace, keep=keep)
    clock.now += GRACE + 1
    house.leases.expire()
    assert lease.cache.length == 2 * PAGE and not house.released


def test_a_session_that_was_left_displaces_nobody_when_it_is_taken(house: House) -> None:
    connection = Connection()
    lease = house.open(by=connection)
    house.leases.leave(lease, connection.displace, keep=True)
    house.leases.take(lease.secret, BOUND, Connection().displace)
    assert connection.displaced == 0


# --- the end ---


def test_a_session_that_said_goodbye_is_over_at_once(house: House) -> None:
    connection = Connection()
    lease = house.open(by=connection)
    house.leases.leave(lease, connection.displace, keep=False)
    assert house.released == [lease.cache] and house.engine.pool.used == 0
    assert house.leases.take(lease.secret, BOUND, Connection().displace) is None


def test_a_session_that_holds_nothing_is_not_kept(house: House) -> None:
    lease = house.lost(0)
    assert house.released == [lease.cache]
    assert house.leases.take(lease.secret, BOUND, Connection().displace) is None


def test_a_session_is_over_when_its_grace_time_is(house: House, clock: Clock) -> None:
    lease = house.lost()
    clock.now += GRACE - 0.1
    house.leases.expire()
    assert lease.cache.length and not house.released
    clock.now += 0.2
    house.leases.expire()
    assert house.released == [lease.cache] and house.engine.pool.used == 0
    assert house.leases.take(lease.secret, BOUND, Connection().displace) is None


def test_a_session_that_someone_has_does_not_expire(house: House, clock: Clock) -> None:
    lease = house.open()
    clock.now += 100 * GRACE
    house.leases.expire()
    assert lease.cache.length == 2 * PAGE


# --- what is kept secret ---


def test_the_secret_is_in_no_text_of_what_knows_it(house: House) -> None:
    lease = house.lost()
    texts = [repr(lease), str(lease), f"{lease}", repr(house.leases), repr(vars(house.leases))]
    assert not [text for text in texts if lease.secret in text]
