"""What `stip-device serve` refuses to begin with, and what it does when its readers leave or it is told to end."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.gateway.server import listen, open_gateway
from device_app.history import History
from shared.errors import UsageError
from tests.conftest import RunningCloud
from tests.device_app.gateway.asking import STORY
from tests.device_app.gateway.gateways import KEY, RunningGateway, run_gateway
from tests.processes import eventually, metric

NOWHERE = Address("ws://127.0.0.1:9")


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: Address already in use"):
            listen("127.0.0.1", port)


def test_a_place_where_nobody_can_listen_is_named() -> None:
    with pytest.raises(UsageError, match=r"--host no\.such\.host\.invalid --port 0: "):
        listen("no.such.host.invalid", 0)
    with pytest.raises(UsageError, match="--port: seen 70000, wanted 0 to 65535"):
        listen("127.0.0.1", 70_000)


def test_a_name_is_served_once(tiny: Path) -> None:
    bundles = [(tiny / "device", Bundle.open(tiny / "device"))] * 2
    with pytest.raises(UsageError, match="a second bundle named 'llama'"):
        open_gateway(bundles, NOWHERE, history=History.in_memory())


def test_a_model_that_no_route_serves_is_refused(tiny_exports: Callable[[str], Path]) -> None:
    folder = tiny_exports("vit") / "device"
    with pytest.raises(UsageError, match="serve: seen a bundle of the kind 'image-encoder'"):
        open_gateway([(folder, Bundle.open(folder))], NOWHERE, history=History.in_memory())


def test_less_than_one_session_is_refused() -> None:
    with pytest.raises(UsageError, match="--sessions: seen 0"):
        open_gateway([], NOWHERE, sessions=0, history=History.in_memory())


def asking(gateway: RunningGateway, **options: object) -> http.client.HTTPConnection:
    """A connection on which a chat completion has been asked for."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    body = json.dumps({"model": "llama", "messages": STORY} | options)
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
    return connection


def test_a_stream_is_server_sent_events_that_end_with_done(tiny_gateway: RunningGateway) -> None:
    response = asking(tiny_gateway, stream=True, max_tokens=5).getresponse()
    assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
    events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[-1]["stip"]["round_trips"] > 0 and all("usage" not in chunk for chunk in chunks)


def test_who_leaves_while_waiting_gives_the_place_up(tiny: Path, tiny_cloud: RunningCloud) -> None:
    with run_gateway(tiny, cloud=tiny_cloud.url, sessions=1) as running:
        [pool] = [served.pool for served in running.gateway.models.values()]
        first = asking(running, n=20, logit_bias={"2": -100})
        assert eventually(lambda: len(pool._leases) == 1, 5)
        second = asking(running)
        assert eventually(lambda: len(pool._waiting) == 1, 5)
        second.close()
        assert eventually(lambda: not pool._waiting, 1)
        first.close()
        assert eventually(lambda: not pool._leases, 1)
        assert asking(running, max_tokens=3).getresponse().status == 200


def test_the_end_of_the_gateway_ends_its_sessions(tiny: Path, tiny_cloud: RunningCloud) -> None:
    before = metric(tiny_cloud.url, "stip_sessions_open")
    with run_gateway(tiny, cloud=tiny_cloud.url) as running:
        answering = asking(running, stream=True, n=100, logit_bias={"2": -100}).getresponse()
        answering.readline()
        assert metric(tiny_cloud.url, "stip_sessions_open") == before + 1
        began = time.monotonic()
        running.server.should_exit = True
        last = answering.read().decode().strip().rpartition("data: ")[2]
    assert time.monotonic() - began < 5
    assert json.loads(last)["error"]["code"] == "cancelled"
    assert eventually(lambda: metric(tiny_cloud.url, "stip_sessions_open") == before, 5)
    assert metric(tiny_cloud.url, "stip_sessions_held") == 0
