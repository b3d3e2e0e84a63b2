"""A device's WebSocket, whichever server brings it: `listener` has websockets' own, `asgi` any ASGI server's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from shared.wire import MAX_HEADER

LONGEST_OPEN = 4 + MAX_HEADER  # bytes of a frame before a session is open
GOODBYE = 1000  # the close code of a device that does not mean to come back (RFC 6455 §7.4.1)


class Closed(Exception):
    """The socket is closed, by whichever end."""


class Socket(Protocol):
    """One device's WebSocket. Frames longer than LONGEST_OPEN close it with code 1009, until `came_in`."""

    @property
    def bearers(self) -> list[str]:
        """The tokens of its handshake."""

    @property
    def said_goodbye(self) -> bool:
        """Whether the device closed it with code GOODBYE."""

    async def receive(self) -> bytes | str:
        """The next message. Raises Closed. A caller that is cancelled loses none."""

    async def send(self, frame: bytes) -> None:
        """Sends a binary message, and waits while the line takes none. Raises Closed."""

    async def close(self, code: int, reason: str) -> None:
        """Closes it; whoever receives then gets Closed."""

    def abort(self) -> None:
        """Ends it at once, whatever is half way."""

    def came_in(self, max_size: int) -> None:
        """A session was opened on it: from now on it takes messages of so many bytes."""


def bearer_tokens(headers: Iterable[str]) -> list[str]:
    """The tokens in `Authorization` headers (RFC 6750 §2.1)."""
    parts = [header.partition(" ") for header in headers]
    return [given for scheme, _, given in parts if scheme.lower() == "bearer"]
