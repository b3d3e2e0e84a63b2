"""A real gateway in a thread of this process, on a free loopback port."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.gateway.guard import Hosts
from device_app.gateway.server import Server, listen, open_gateway
from device_app.gateway.serving import Gateway
from device_app.history import History

KEY = "stip-key-of-a-test-gateway"


@dataclass
class RunningGateway:
    """port: on 127.0.0.1."""

    port: int
    gateway: Gateway
    server: Server

    @property
    def url(self) -> str:
        """What an OpenAI client takes as its base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and content of one raw request; the key and the right Host go with it unless
        `headers` says otherwise (an empty value leaves one out)."""
        whole = {"Host": f"127.0.0.1:{self.port}", "Authorization": f"Bearer {KEY}"} | dict(headers or {})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in whole.items():
            if value:
                connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        try:
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()


@contextmanager
def run_gateway(
    *exports: Path,
    cloud: str = "ws://127.0.0.1:9",
    change: Callable[[Bundle], Bundle] = lambda bundle: bundle,
    history: History | None = None,
    **options: Any,
) -> Iterator[RunningGateway]:
    """Serves the device halves of exports, for the cloud at a URL. change: what is done to a bundle before.
    history: kept in memory unless given; closed with the gateway."""
    bundles = [(export / "device", change(Bundle.open(export / "device"))) for export in exports]
    gateway = open_gateway(bundles, Address(cloud), history=history or History.in_memory(), **options)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(gateway, hosts=Hosts("127.0.0.1", port), key=KEY)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the gateway did not start"
            time.sleep(0.01)
        yield RunningGateway(port, gateway, server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the gateway did not stop"
