"""Which hosts are this machine."""

from __future__ import annotations

import pytest

from shared.loopback import is_loopback


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]", "::ffff:127.0.0.1"])
def test_this_machine_is_known_however_its_address_is_written(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "localhost.example", "192.0.2.1", "::", "2001:db8::1", "::ffff:192.0.2.1"])
def test_another_machine_is_not_taken_for_this_one(host: str) -> None:
    assert not is_loopback(host)
