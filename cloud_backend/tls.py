"""The server's certificate, which may be renewed while it serves."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from cloud_backend.watch import LOOK_SECONDS, Watched
from shared.errors import UsageError

log = logging.getLogger("stip.cloud")


class Certificate:
    """A certificate chain and its key, both PEM. Raises UsageError where they cannot be used.

    context: what a server takes.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain, self._key = chain, key
        self._complaint = ""  # the last that was logged, so that it is logged once
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            self._watched = Watched(chain, key)  # before they are read: what is written meanwhile is then a change
            self.context.load_cert_chain(chain, key)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"TLS certificate {chain} or key {key}: {error}", hint="give PEM files") from None

    def look(self) -> None:
        """Loads the files again if they changed: connections made from then on see the new certificate.

        Where they cannot be used, the last good ones stay, and it is logged once.
        """
        try:
            if not self._watched.changed() and not self._complaint:
                return
            # Into a context of its own first: of a chain and a key that do not fit, the context would keep the chain.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)
            self.context.load_cert_chain(self._chain, self._key)
        except (OSError, ssl.SSLError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("TLS certificate: %s; the one before is still used", error)
            return
        self._complaint = ""
        log.info("TLS certificate read again")

    async def keep_fresh(self) -> None:
        """Looks once a second, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()
