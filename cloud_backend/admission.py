"""What one client may take: connections that open nothing, and positions a second."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter

from websockets.asyncio.server import ServerConnection

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
    """Counts the connections of each client address that have not opened a session, from their first byte on."""

    def __init__(self, most: int | None) -> None:
        """most: connections of one address at a time; None: as many as come."""
        self._most = most
        self._standing: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        """Whether there is room for one more of `address`; it then stands here until `leave`."""
        if self._most is not None and self._standing[address] >= self._most:
            return False
        self._standing[address] += 1
        return True

    def leave(self, address: str) -> None:
        """One of `address` has opened a session, or is gone."""
        self._standing[address] -= 1
        if not self._standing[address]:
            del self._standing[address]


class CountedConnection(ServerConnection):
    """A connection that stands on the doorstep from its start until `came_in`, or its end."""

    doorstep: Doorstep  # of the server: set by a subclass

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        client = _client(peer[0]) if peer else "gone"  # before its first byte
        self._stands_as: str | None = client if self.doorstep.enter(client) else None
        if self._stands_as is None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.came_in()
        super().connection_lost(exc)

    def came_in(self) -> None:
        """It has opened a session."""
        if self._stands_as is not None:
            self.doorstep.leave(self._stands_as)
            self._stands_as = None


def _client(host: str) -> str:
    """The address that stands for a client: of IPv6 its network, as each client has a whole one (RFC 6177)."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return str(address if address.version == 4 else ipaddress.ip_network((address, 64), strict=False))
