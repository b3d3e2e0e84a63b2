"""Bearer tokens: a file of hashes. The tokens themselves are shown once, when they are made, and stored nowhere."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

from cloud_backend.watch import Watched
from shared.errors import BundleError

log = logging.getLogger("stip.cloud")
PREFIX = "sha256:"


def _hash(token: str) -> str:
    # A token is 256 random bits, so one fast hash is enough: there is nothing to guess.
    return PREFIX + hashlib.sha256(token.encode()).hexdigest()


def add_token(path: Path, name: str) -> str:
    """Makes a token, appends its hash under `name` to the file (created with mode 0600), and gives the token."""
    token = "stip_" + secrets.token_urlsafe(32)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise BundleError(f"token file {path}: {error.strerror}", hint="give a file you may write") from None
    with os.fdopen(descriptor, "a") as file:
        text = path.read_text()
        file.write("\n" * (text != "" and not text.endswith("\n")) + f"{_hash(token)} {name}\n")
    return token


class Tokens:
    """The tokens a server accepts. Raises BundleError if the file is unreadable or has a line that is no hash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._complaint = ""  # the last that was logged, so that it is logged once
        try:
            self._watched = Watched(path)  # before it is read: what is written meanwhile is then a change
        except OSError as error:
            raise _unreadable(path, error) from None
        self._digests = _read(path)
        if not self._digests:
            raise BundleError(f"token file {path}: no token in it", hint=f"stip-cloud token --token-file {path}")

    def accept(self, token: str | None) -> bool:
        """Whether `token` is one of them, in time that does not tell which."""
        return self.digest_of(token) is not None

    def digest_of(self, token: str | None) -> str | None:
        """The hash of `token` where it is one of them, in time that does not tell which; else None."""
        seen = _hash(token or "")
        matches = [hmac.compare_digest(seen, known) for known in self._digests]
        return seen if any(matches) else None

    def known(self, digest: str) -> bool:
        """Whether a hash that `digest_of` once gave is still in the list."""
        return digest in self._digests

    def look(self) -> bool:
        """Reads the file again if it changed, and tells whether the list is another one now.

        A file that cannot be read, or has a line that is no hash, keeps the last good list and is logged once. One
        without tokens lets nobody in.
        """
        try:
            if not self._watched.changed() and not self._complaint:
                return False
            digests = _read(self._path)
        except OSError as error:
            self._complain(_unreadable(self._path, error))
            return False
        except BundleError as error:
            self._complain(error)
            return False
        self._complaint = ""
        before, self._digests = self._digests, digests
        if digests != before:
            log.info("token file read again: %d tokens", len(digests), extra={"fields": {"tokens": len(digests)}})
        return digests != before

    def _complain(self, error: BundleError) -> None:
        if str(error) != self._complaint:
            self._complaint = str(error)
            log.error("%s; the tokens before stay valid", error)


def _read(path: Path) -> frozenset[str]:
    """The hashes in the file."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    digests = set()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        digest = line.split()[0]
        if not re.fullmatch(PREFIX + "[0-9a-f]{64}", digest):
            raise BundleError(
                f"token file {path}, line {number}: wanted 'sha256:<64 hex digits> name'",
                hint="remove the line; `stip-cloud token` writes right ones",
            )
        digests.add(digest)
    return frozenset(digests)


def _unreadable(path: Path, error: Exception) -> BundleError:
    # A decoding error quotes the byte it stumbled on.
    reason = error.strerror if isinstance(error, OSError) else "it is not text"
    return BundleError(f"token file {path}: {reason}", hint=f"make one with: stip-cloud token --token-file {path}")
