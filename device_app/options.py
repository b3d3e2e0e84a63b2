"""What every command of `stip-device` is told alike: the bundle, the cloud, and who asks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from shared.errors import UsageError


def bundle_and_cloud() -> argparse.ArgumentParser:
    """The parent of the parser of a command for one bundle: the folder, where the cloud is, and how to be let in."""
    parent = argparse.ArgumentParser(add_help=False, parents=[cloud()])
    parent.add_argument("folder", type=Path, metavar="OUT/device")
    return parent


def cloud() -> argparse.ArgumentParser:
    """The parent of every subcommand's parser: where the cloud is, and how to be let in."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--url", required=True, help="of the cloud, for example ws://127.0.0.1:8765")
    parent.add_argument("--token-file", type=Path, metavar="F", help="file with the bearer token (or set STIP_TOKEN)")
    parent.add_argument(
        "--ca", type=Path, metavar="F", help="PEM file of the authority that signed the cloud's certificate"
    )
    parent.add_argument(
        "--retry-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="how long a lost connection is tried again; the first one fails at once (default: %(default)g)",
    )
    parent.add_argument("--insecure", action="store_true", help="allow ws:// beyond this machine")
    return parent


def opened(arguments: argparse.Namespace) -> dict[str, Any]:
    """The bundle, the cloud's address and the token, as `Assistant` and `Encoder` take them, with a callback that
    tells of a lost connection. What the export warns of is said."""
    from device_app.bundle import Bundle
    from device_app.connection import Address
    from device_app.terminal import note

    address = Address(arguments.url, arguments.ca, arguments.insecure)
    bundle = Bundle.open(arguments.folder)
    if bundle.manifest.warning:
        note(f"stip-device: warning: {bundle.manifest.warning}")
    return {
        "bundle": bundle,
        "address": address,
        "token": read_token(arguments.token_file),
        "retry_seconds": arguments.retry_seconds,
        "on_lost": lost,
    }


def lost() -> None:
    """Says that a connection broke."""
    from device_app.terminal import note

    note("\nstip-device: connection lost; trying again, the answer will go on")


def read_token(path: Path | None) -> str | None:
    """The bearer token for the cloud: of the file, or of STIP_TOKEN. Raises UsageError."""
    if path is None:
        return os.environ.get("STIP_TOKEN")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise UsageError(f"--token-file {path}: {error.strerror}") from None


def drafts() -> argparse.ArgumentParser:
    """The parent of the parsers of commands that draft."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--draft-tokens", type=int, default=8, metavar="N", help="guess up to N tokens at once; 0: none (default: 8)"
    )
    parent.add_argument(
        "--bytes-a-token",
        type=int,
        default=32768,
        metavar="N",
        help="up and down, over which nothing is guessed (default: %(default)s)",
    )
    return parent
