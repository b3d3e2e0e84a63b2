"""What supervisors and Prometheus do: plain HTTP on the server's port."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from tests.cloud_backend.device import PATIENCE


def get(
    url: str, path: str, *, method: str = "GET", tls: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, str]:
    """The status and body for a path of a server, whose URL may be a websocket's."""
    response, body = exchange(url, path, method=method, tls=tls, **headers)
    return response.status, body


def exchange(
    url: str, path: str, *, method: str = "GET", tls: ssl.SSLContext | None = None, **headers: str
) -> tuple[HTTPResponse, str]:
    """The response for a path of a server, and its body."""
    host = urlsplit(url).netloc
    connection = HTTPSConnection(host, timeout=PATIENCE, context=tls) if tls else HTTPConnection(host, timeout=PATIENCE)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read().decode()
    finally:
        connection.close()


def samples(url: str) -> dict[tuple[str, ...], float]:
    """Every sample of /metrics, by its name and the values of its labels, as Prometheus reads them."""
    status, body = get(url, "/metrics")
    assert status == 200, body
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }


def eventually(holds: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether `holds` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()
