"""Who may ask: requests that name this machine, that no foreign page sent, and that carry the key.

Loopback is no authentication: any page in a browser can send requests there, by name (DNS rebinding) or across
origins, and so can any other user of the machine.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
from pathlib import Path

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from device_app.gateway.errors import ApiError, log_failure
from shared.errors import UsageError
from shared.loopback import is_loopback

KEYED = ("/v1/", "/api/")  # what needs the key; the page itself holds nothing
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def api_key(file: Path | None) -> tuple[str, bool]:
    """The key of the API, and whether it was made just now: from the file, from STIP_API_KEY, or a fresh one.

    Raises UsageError for a file that cannot be read, and for a key that no header can carry.
    """
    if file is not None:
        try:
            key, name = file.read_text(encoding="utf-8").strip(), f"--api-key-file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or 'no text'}") from None
    elif "STIP_API_KEY" in os.environ:
        key, name = os.environ["STIP_API_KEY"].strip(), "STIP_API_KEY"
    else:
        return f"stip-{secrets.token_urlsafe(32)}", True
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"{name}: seen a key of {len(key)} characters, wanted 16 or more, printable ASCII without blanks",
            hint="leave it out, and one is made",
        )
    return key, False


class Hosts:
    """The names that a request may call this server by."""

    def __init__(self, host: str, port: int) -> None:
        """host: as it was bound. Where that is every address, any literal address is right: only names can be made
        to point elsewhere."""
        self._host, self._port = host.strip("[]").lower(), port
        try:
            self._any_address = ipaddress.ip_address(self._host).is_unspecified
        except ValueError:
            self._any_address = False

    def __contains__(self, header: str) -> bool:
        """Whether `header`, the value of Host, means this server."""
        name, port = _split(header.lower())
        if port != self._port:
            return False
        return name == self._host or is_loopback(name) or (self._any_address and _is_address(name))


def _split(header: str) -> tuple[str, int | None]:
    """Name (brackets of IPv6 left out) and port of a Host header; no port means 80 (RFC 9110 §7.2)."""
    if header.startswith("["):
        name, bracket, rest = header[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else "80" if bracket and not rest else ""
    else:
        name, colon, port = header.partition(":")
        port = port if colon else "80"
    return name, int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware: refuses strangers, adds the headers that every answer carries, and lets no error out untold."""

    def __init__(self, app: ASGIApp, *, hosts: Hosts, key: str) -> None:
        self._app = app
        self._hosts = hosts
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        private = scope["path"].startswith(KEYED)

        async def sealed(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                extra = HEADERS | ({"Cache-Control": "no-store"} if private else {"Cache-Control": "no-cache"})
                names = {name.lower().encode() for name in extra}
                message["headers"] = [
                    *((name, value) for name, value in message.get("headers", []) if name.lower() not in names),
                    *((name.lower().encode(), value.encode()) for name, value in extra.items()),
                ]
            await send(message)

        if (refused := self._refused(scope)) is not None:
            await refused.response()(scope, receive, sealed)
            return
        try:
            await self._app(scope, receive, sealed)
        except ClientDisconnect:
            return  # in the middle of its request: nobody is left to be answered
        except Exception as error:
            log_failure("a request", error)
            if not begun:
                await ApiError(500, "the gateway failed; its log says where").response()(scope, receive, sealed)

    def _refused(self, scope: Scope) -> ApiError | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or hosts[0].decode("latin-1") not in self._hosts:
            return ApiError(403, "Host: wanted the name or address that this gateway listens at", code="wrong_host")
        origins = headers.get(b"origin", [])
        if origins and origins != [b"http://" + hosts[0]]:
            return ApiError(403, "Origin: pages of other origins may not use this gateway", code="wrong_origin")
        if scope["path"].startswith(KEYED) and not self._knows(headers.get(b"authorization", [])):
            return ApiError(
                401,
                "Authorization: wanted 'Bearer' and the key that stip-device serve printed or was given",
                code="invalid_api_key",
            )
        return None

    def _knows(self, authorizations: list[bytes]) -> bool:
        if len(authorizations) != 1:
            return False
        scheme, _, key = authorizations[0].partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"
