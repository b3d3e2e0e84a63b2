"""What one client may take: connections that open nothing, and positions a second."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable

from shared.loopback import address

BURST_SECONDS = 1.0  # of its rate that a token may save up


class Allowance:
    """Positions a second that the sessions of one token share: a token bucket that may run into debt.

    Debt, because a prompt may be longer than a second's worth and must pass all the same. Who comes next then waits
    until it is paid, so that the rate holds over time.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._paid_at = 0.0  # on the loop's clock
        self._turn = asyncio.Lock()  # keeps those who wait in order

    async def turn(self) -> None:
        """Waits until nothing is owed. The caller then takes what it takes with `charge`, before it awaits again."""
        clock = asyncio.get_running_loop().time
        async with self._turn:
            await asyncio.sleep(self._paid_at - clock())

    def charge(self, positions: int) -> None:
        """Takes `positions` of the rate."""
        saved_from = asyncio.get_running_loop().time() - BURST_SECONDS
        self._paid_at = max(self._paid_at, saved_from) + positions / self._rate


class Doorstep:
    """Counts the connections of each client that have not opened a session, from their first byte on."""

    def __init__(self, most: int | None) -> None:
        """most: connections of one client at a time; None: as many as come."""
        self._most = most
        self._standing: Counter[str] = Counter()

    def enter(self, host: str | None) -> Callable[[], None] | None:
        """Puts a connection from an address here; None is one that nobody knows any more.

        Gives what takes it away again, once it has opened a session or is gone; None where there is no room for it.
        """
        client = _client(host)
        if self._most is not None and self._standing[client] >= self._most:
            return None
        self._standing[client] += 1
        stands = True

        def leave() -> None:
            nonlocal stands
            if stands:
                stands = False
                self._standing[client] -= 1
                if not self._standing[client]:
                    del self._standing[client]

        return leave


def _client(host: str | None) -> str:
    """What stands for a client: its address; of IPv6 its network, as each client has a whole one (RFC 6177)."""
    try:
        known = address((host or "").partition("%")[0])
    except ValueError:
        return host or "unknown"  # a Unix socket's, perhaps
    return str(known if known.version == 4 else ipaddress.ip_network((known, 64), strict=False))
