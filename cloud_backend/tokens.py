"""Bearer tokens: a file of hashes. The tokens themselves are shown once, when they are made, and stored nowhere."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from shared.errors import BundleError

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
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(
                f"token file {path}: {error}", hint=f"make one with: stip-cloud token --token-file {path}"
            ) from None
        self._hashes: list[str] = []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            digest = line.split()[0]
            if not re.fullmatch(PREFIX + "[0-9a-f]{64}", digest):
                raise BundleError(
                    f"token file {path}, line {number}: wanted 'sha256:<64 hex digits> name'",
                    hint="remove the line; `stip-cloud token` writes right ones",
                )
            self._hashes.append(digest)
        if not self._hashes:
            raise BundleError(f"token file {path}: no token in it", hint=f"stip-cloud token --token-file {path}")

    def accept(self, token: str | None) -> bool:
        """Whether `token` is one of them, in time that does not tell which."""
        seen = _hash(token or "")
        matches = [hmac.compare_digest(seen, known) for known in self._hashes]
        return any(matches)
