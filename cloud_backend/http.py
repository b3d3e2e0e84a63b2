"""Plain HTTP beside the websockets: health, readiness and metrics, and who may ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from cloud_backend.health import Health
from cloud_backend.metrics import CONTENT_TYPE, Metrics
from shared.loopback import is_loopback

Headers = Callable[[str], Sequence[str]]  # gives every value of a header
PLAIN = (("Content-Type", "text/plain; charset=utf-8"),)


@dataclass(frozen=True)
class Answer:
    """What a request is answered."""

    status: HTTPStatus
    text: str
    headers: tuple[tuple[str, str], ...] = PLAIN


@dataclass(frozen=True)
class Pages:
    """Answers the requests of one listener; as websockets' `process_request`, too.

    only_loopback: whether it listens there alone. origins: of browser pages that may ask. devices: whether websockets
    are taken here. metrics: None where they are not shown.
    """

    health: Health
    metrics: Metrics | None
    only_loopback: bool
    origins: frozenset[str] = frozenset()
    devices: bool = False

    def __call__(self, connection: ServerConnection, request: Request) -> Response | None:
        """The answer, or None for a handshake that may go on."""
        headers = request.headers.get_all
        if self.devices and "websocket" in " ".join(headers("Upgrade")).lower():
            answer = self.handshake(headers)
            if answer is None:
                return None
        else:  # older websockets know no other method
            answer = self.page(getattr(request, "method", "GET"), request.path.partition("?")[0], headers)
        response = connection.respond(answer.status, answer.text)
        for name, value in answer.headers:
            response.headers.pop(name, None)  # it keeps several values of one name
            response.headers[name] = value
        return response

    def handshake(self, headers: Headers) -> Answer | None:
        """What a device's handshake is answered; None where it may go on."""
        if (refused := self._refused(headers)) is not None:
            return refused
        closed = self.health.closed()
        return None if closed is None else _unavailable(closed)

    def page(self, method: str, path: str, headers: Headers) -> Answer:
        """What anyone else is answered."""
        if (refused := self._refused(headers)) is not None:
            return refused
        if method != "GET":
            return Answer(HTTPStatus.METHOD_NOT_ALLOWED, "wanted GET\n")
        if path == "/healthz":
            return _says(self.health.broken())
        if path == "/readyz":
            return _says(self.health.unready())
        if path == "/metrics" and self.metrics is not None:
            return Answer(HTTPStatus.OK, self.metrics.page().decode(), (("Content-Type", CONTENT_TYPE),))
        return Answer(HTTPStatus.NOT_FOUND, "no such page\n")

    def _refused(self, headers: Headers) -> Answer | None:
        """Why a request is not for us. On loopback a name of another machine comes of DNS rebinding, and a page on
        another site must not use this server through a visitor's browser (RFC 6455 §10.2)."""
        hosts = headers("Host")
        if self.only_loopback and not (len(hosts) == 1 and is_loopback(_name(hosts[0]))):
            return Answer(HTTPStatus.FORBIDDEN, "Host: wanted a loopback name\n")
        if not set(headers("Origin")) <= self.origins:
            return Answer(HTTPStatus.FORBIDDEN, "Origin: not one that is allowed here\n")
        return None


def _name(host: str) -> str:
    """A Host header without its port."""
    return host if host.endswith("]") else host.rsplit(":", 1)[0]


def _says(trouble: str | None) -> Answer:
    return Answer(HTTPStatus.OK, "ok\n") if trouble is None else _unavailable(trouble)


def _unavailable(reason: str) -> Answer:
    return Answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n", (*PLAIN, ("Retry-After", "1")))
