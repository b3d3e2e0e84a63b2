"""What `stip-device serve` refuses to begin with, and what it does when its readers leave or it is told to end."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.gateway.server import listen, open_gateway
from device_app.history import History
from shared.errors import UsageError
from tests.conftest import RunningCloud
from tests.device_app.bundles import make_bundle
from tests.device_app.gateway.asking import STORY
from tests.device_app.gateway.gateways import KEY, RunningGateway, run_gateway
from tests.device_app.honest_encoder import HonestEncoder, serving
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


def test_who_leaves_while_it_sends_its_request_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_bundle(tmp_path / "device", "encoder")
    with run_gateway(tmp_path) as running:
        tasks = running.server.server_state.tasks
        leaving = http.client.HTTPConnection("127.0.0.1", running.port)
        leaving.request("POST", "/v1/embeddings", headers={"Authorization": f"Bearer {KEY}", "Content-Length": "1000"})
        assert eventually(lambda: len(tasks) == 1, 5)
        leaving.close()
        assert eventually(lambda: not tasks, 5)
    assert not caplog.records


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


def embedding(gateway: RunningGateway) -> http.client.HTTPConnection:
    """A connection on which vectors have been asked for."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    body = json.dumps({"model": "tiny", "input": ["the cat", "the dog"]})
    connection.request("POST", "/v1/embeddings", body, {"Authorization": f"Bearer {KEY}"})
    return connection


@contextmanager
def deserted(folder: Path) -> Iterator[RunningGateway]:
    """A gateway to an encoder whose cloud answered once and is gone since."""
    make_bundle(folder / "device", "encoder")
    with ExitStack() as stack:
        with serving(HonestEncoder, answers=1) as (url, _):
            running = stack.enter_context(run_gateway(folder, cloud=url, sessions=1, retry_seconds=600))
            assert embedding(running).getresponse().status == 200
        yield running


def test_who_leaves_while_the_cloud_is_gone_frees_the_session(tmp_path: Path) -> None:
    with deserted(tmp_path) as running:
        [pool] = [served.pool for served in running.gateway.models.values()]
        assert pool._idle
        asked = embedding(running)
        assert eventually(lambda: not pool._idle, 5)
        asked.close()
        assert eventually(lambda: bool(pool._idle), 2)


def test_the_gateway_ends_while_it_waits_for_a_cloud_that_is_gone(tmp_path: Path) -> None:
    with deserted(tmp_path) as running:
        [pool] = [served.pool for served in running.gateway.models.values()]
        asked = embedding(running)
        assert eventually(lambda: not pool._idle, 5)
        began = time.monotonic()
        running.server.should_exit = True
        response = asked.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "cancelled")
    assert time.monotonic() - began < 5
