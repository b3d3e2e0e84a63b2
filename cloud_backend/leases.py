"""What outlives a connection: a session's KV cache, for a grace time, for whoever comes back with its secret.

PROTOCOL.md §4.7. The secret is bound to the token, the model and the key; the newest connection wins.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cloud_backend.engine import Engine
from cloud_backend.kv_cache import KVCache


@dataclass(eq=False)
class Lease:
    """One session's hold on KV memory."""

    secret: str = field(repr=False)
    bound_to: tuple[str, str, str]  # served name, key id, and whose token opened it
    engine: Engine
    cache: KVCache
    displace: Callable[[], None] | None  # ends the connection that has it; None: nobody has
    until: float = 0.0  # where nobody has it: when it ends
    length: int = 0  # KV length that is left when what its last connection asked for has been let go


class Leases:
    """All sessions of a server that are open, or may come back."""

    def __init__(self, grace_seconds: float, release: Callable[[Engine, KVCache], None]) -> None:
        """release: gives a cache's memory back."""
        self._grace_seconds = grace_seconds
        self._release = release
        self._by_digest: dict[bytes, Lease] = {}

    def held(self, served_name: str) -> int:
        """Sessions of a served model that nobody has now."""
        return sum(lease.displace is None and lease.bound_to[0] == served_name for lease in self._by_digest.values())

    def new(self, bound_to: tuple[str, str, str], engine: Engine, displace: Callable[[], None]) -> Lease:
        """A fresh session."""
        lease = Lease(secrets.token_urlsafe(16), bound_to, engine, engine.new_cache(), displace)
        lease.cache.owner = bound_to[2]
        self._by_digest[_digest(lease.secret)] = lease
        return lease

    def taken(self, secret: str, bound_to: tuple[str, str, str]) -> bool:
        """Whether `take` would take the session from a connection that has it."""
        lease = self._by_digest.get(_digest(secret))
        return lease is not None and lease.bound_to == bound_to and lease.displace is not None

    def take(self, secret: str, bound_to: tuple[str, str, str], displace: Callable[[], None]) -> Lease | None:
        """The session of `secret`, taken from whoever has it. None where it is unknown, over, or another's."""
        # Looked up by a hash: how long that takes tells nothing of the secrets that are known.
        lease = self._by_digest.get(_digest(secret))
        if lease is None or lease.bound_to != bound_to:
            return None
        if lease.displace is not None:
            lease.displace()
        lease.displace = displace
        return lease

    def leave(self, lease: Lease, displace: Callable[[], None], *, keep: bool) -> None:
        """The connection that had it, if it still does, has ended. keep: it may come back."""
        if lease.displace != displace:
            return
        lease.displace, lease.until = None, time.monotonic() + self._grace_seconds
        if not keep or not lease.cache.held:
            self._end(lease)

    def expire(self, *, known: Callable[[str], bool] = lambda owner: True) -> None:
        """Ends the sessions that nobody has whose grace time is over, whose owner is not known any more, or of which
        nothing is left."""
        now = time.monotonic()
        for lease in list(self._by_digest.values()):
            over = lease.until < now or not lease.cache.held or not known(lease.bound_to[2])
            if lease.displace is None and over:
                self._end(lease)

    def _end(self, lease: Lease) -> None:
        self._by_digest.pop(_digest(lease.secret), None)
        self._release(lease.engine, lease.cache)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
