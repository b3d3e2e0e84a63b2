"""Plain HTTP beside the websockets: health, readiness and metrics, and who may ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from cloud_backend.health import Health
from cloud_backend.metrics import CONTENT_TYPE, Metrics
from shared.loopback import is_loopback


@dataclass(frozen=True)
class Pages:
    """Answers the requests of one listener, as websockets' `process_request`.

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
        if (refused := self._refused(request)) is not None:
            return connection.respond(HTTPStatus.FORBIDDEN, refused)
        if self.devices and "websocket" in " ".join(request.headers.get_all("Upgrade")).lower():
            closed = self.health.closed()
            return None if closed is None else _unavailable(connection, closed)
        if getattr(request, "method", "GET") != "GET":  # older websockets take nothing else
            return connection.respond(HTTPStatus.METHOD_NOT_ALLOWED, "wanted GET\n")
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return _says(connection, self.health.broken())
        if path == "/readyz":
            return _says(connection, self.health.unready())
        if path == "/metrics" and self.metrics is not None:
            response = connection.respond(HTTPStatus.OK, "")
            response.body = self.metrics.page()
            del response.headers["Content-Type"], response.headers["Content-Length"]
            response.headers["Content-Type"] = CONTENT_TYPE
            response.headers["Content-Length"] = str(len(response.body))
            return response
        return connection.respond(HTTPStatus.NOT_FOUND, "no such page\n")

    def _refused(self, request: Request) -> str | None:
        """Why a request is not for us. On loopback a name of another machine comes of DNS rebinding, and a page on
        another site must not use this server through a visitor's browser (RFC 6455 §10.2)."""
        hosts = request.headers.get_all("Host")
        if self.only_loopback and not (len(hosts) == 1 and is_loopback(_name(hosts[0]))):
            return "Host: wanted a loopback name\n"
        if not set(request.headers.get_all("Origin")) <= self.origins:
            return "Origin: not one that is allowed here\n"
        return None


def _name(host: str) -> str:
    """A Host header without its port."""
    return host if host.endswith("]") else host.rsplit(":", 1)[0]


def _says(connection: ServerConnection, trouble: str | None) -> Response:
    return connection.respond(HTTPStatus.OK, "ok\n") if trouble is None else _unavailable(connection, trouble)


def _unavailable(connection: ServerConnection, reason: str) -> Response:
    response = connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n")
    response.headers["Retry-After"] = "1"
    return response
