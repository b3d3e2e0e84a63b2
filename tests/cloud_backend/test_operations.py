"""Starting, being watched, and stopping: health, readiness, and the drain."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from websockets.exceptions import InvalidStatus

from cloud_backend.limits import Limits
from cloud_backend.opening import open_context
from cloud_backend.process import Listening, _allow_files, serve_until_stopped
from cloud_backend.scheduler import Scheduler
from cloud_backend.server import CloudServer
from cloud_backend.serving import Serving
from cloud_backend.tokens import add_token
from cloud_backend.warm_up import warm_up
from shared import wire
from shared.errors import BundleError
from tests.cloud_backend.asking import eventually, exchange, get
from tests.cloud_backend.device import PATIENCE, Device, close_code, dial, open_of, table
from tests.conftest import RunningCloud, run_cloud, run_cloud_process

EMBEDDINGS = table()


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@contextmanager
def held_up(running: RunningCloud) -> Iterator[threading.Event]:
    """Every forward waits until the event is set, at the latest by the end of the block."""
    go, real = threading.Event(), running.engine.run

    def waits(batch: Any) -> Any:
        go.wait(PATIENCE)
        return real(batch)

    running.engine.run = waits  # type: ignore[method-assign]
    try:
        yield go
    finally:
        go.set()
        running.engine.run = real  # type: ignore[method-assign]


def refusal(url: str) -> int:
    """The HTTP status with which a websocket is refused."""
    with pytest.raises(InvalidStatus) as refused, dial(url):
        pass
    return refused.value.response.status_code


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


# --- pages ---


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/healthz?verbose"])
def test_a_server_that_works_says_ok(cloud: RunningCloud, path: str) -> None:
    assert get(cloud.url, path) == (200, "ok\n")


@pytest.mark.parametrize("path", ["/", "/health", "/metrics/", "/healthz/..", "//healthz"])
def test_another_page_is_not_found(cloud: RunningCloud, path: str) -> None:
    assert get(cloud.url, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "HEAD", "DELETE"])
def test_pages_are_only_read(cloud: RunningCloud, method: str) -> None:
    assert get(cloud.url, "/healthz", method=method)[0] == 405


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/other"])
def test_a_page_is_refused_to_a_name_that_is_not_loopback(cloud: RunningCloud, path: str) -> None:
    assert get(cloud.url, path, Host="evil.example")[0] == 403


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/other"])
def test_a_page_is_refused_to_a_site_of_another_origin(cloud: RunningCloud, path: str) -> None:
    assert get(cloud.url, path, Origin="https://evil.example")[0] == 403


def test_a_client_that_would_rather_speak_http_2_is_answered(cloud: RunningCloud) -> None:
    assert get(cloud.url, "/healthz", Upgrade="h2c", Connection="Upgrade, HTTP2-Settings") == (200, "ok\n")


def test_two_host_headers_are_refused(cloud: RunningCloud) -> None:
    host, port = cloud.url.removeprefix("ws://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connected:
        connected.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert b" 403 " in connected.recv(200)


# --- starting ---


def test_a_server_that_loads_listens_says_so_and_lets_nobody_in(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "stip.cloud")
    go, port, scheduler = threading.Event(), free_port(), Scheduler()
    threads: list[int] = []
    url = f"ws://127.0.0.1:{port}"

    def load() -> Any:
        threads.append(torch.get_num_threads())
        go.wait(PATIENCE)
        return open_context(tiny / "cloud", device="cpu")

    def knock() -> None:
        assert eventually(lambda: listens(port))
        assert get(url, "/healthz") == get(url, "/readyz") == (503, "loading models\n")
        assert refusal(url) == 503
        assert not [line for line in caplog.messages if "listening" in line]
        go.set()
        assert eventually(lambda: get(url, "/healthz")[0] == 200)
        assert get(url, "/readyz")[0] == 200
        assert caplog.messages[-1] == f"listening on {url}"
        with Device(url, open_of(tiny)) as device:
            assert device.rows(0, EMBEDDINGS[:3]).shape == (1, 320)
            os.kill(os.getpid(), signal.SIGTERM)
            assert close_code(device.socket) == 1001

    async def live() -> None:
        server = CloudServer([], Limits(), None, scheduler)
        at = Listening("127.0.0.1", port)
        serving = asyncio.create_task(serve_until_stopped(Serving(server, scheduler, [load], 2, 5.0), at))
        knocking = asyncio.create_task(asyncio.to_thread(knock))
        await asyncio.wait([serving, knocking], return_when=asyncio.FIRST_COMPLETED)
        go.set()
        await knocking
        await serving

    asyncio.run(live())
    torch.set_num_threads(1)  # it is of the whole process, where a thread has not its own
    assert threads == [2]


def test_sigterm_ends_a_process_that_still_loads(tiny: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "cloud_backend", "serve", str(tiny / "cloud"), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert eventually(lambda: listens(port), 60)
        process.terminate()
        _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and log.splitlines()[-1] == "stip-cloud: stopping"
    assert "listening" not in log


@pytest.fixture
def few_files() -> Iterator[int]:
    """This process may hold 256 files unless it asks for more; gives the most that it may ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_may_hold_a_file_for_each_session(few_files: int) -> None:
    _allow_files(512)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 768


def test_a_server_that_may_not_hold_a_file_for_each_session_says_so(
    few_files: int, caplog: pytest.LogCaptureFixture
) -> None:
    _allow_files(few_files)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == few_files
    assert f"the system allows {few_files}, {few_files} sessions want {few_files + 256}" in caplog.text


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_model_whose_first_forward_fails_is_not_served(tiny: Path) -> None:
    scheduler = Scheduler()

    def broken() -> Any:
        manifest, engine = open_context(tiny / "cloud", device="cpu")
        engine._model.model.norm.weight.data.fill_(float("nan"))  # type: ignore[attr-defined]
        return manifest, engine

    at = Listening("127.0.0.1", 0)
    server = CloudServer([], Limits(), None, scheduler)
    with pytest.raises(BundleError, match="llama: its first forward failed") as caught:
        asyncio.run(serve_until_stopped(Serving(server, scheduler, [broken], None, 1.0), at))
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["llama", "bert", "bert-classifier", "vit", "llava", "marian"])
def test_a_model_of_each_kind_is_tried_out(tiny_exports: Callable[[str], Path], kind: str) -> None:
    ran = []

    async def try_out() -> None:
        scheduler = Scheduler()
        scheduler.on_step = lambda engine, sessions, rows, seconds: ran.append(rows)
        running = asyncio.create_task(scheduler.run())
        manifest, engine = await scheduler.call(lambda: open_context(tiny_exports(kind) / "cloud", device="cpu"))
        await warm_up(scheduler, engine, manifest.served_name)
        # Of an image two: the tower, then the decoder.
        assert len(ran) == len(engine.appends) + min(len(engine.encodes), 1) + ("image" in engine.appends)
        running.cancel()

    asyncio.run(try_out())


# --- what health tells ---


def test_a_step_that_is_stuck_is_unhealthy_until_it_ends(cloud: RunningCloud, tiny: Path) -> None:
    cloud.server.health.stuck_seconds = 0.05
    with held_up(cloud) as go, Device(cloud.url, open_of(tiny)) as device:
        device.send(device.append(0, EMBEDDINGS[:2]))
        assert eventually(lambda: get(cloud.url, "/healthz")[0] == 503)
        status, body = get(cloud.url, "/readyz")
        assert status == 503 and body.startswith("a step has run for")
        go.set()
        assert isinstance(device.receive(), wire.Logits)
        assert get(cloud.url, "/healthz")[0] == 200
    cloud.server.health.stuck_seconds = 60


class Died(BaseException):
    """Ends a thread that survives every Exception."""


def test_a_server_whose_engines_ended_is_unhealthy(tiny: Path) -> None:
    def die(_: Any) -> Any:
        raise Died

    with run_cloud(tiny) as running:
        running.engine.run = die  # type: ignore[method-assign]
        device = Device(running.url, open_of(tiny))
        device.send(device.append(0, EMBEDDINGS[:2]))
        assert eventually(lambda: get(running.url, "/healthz") == (503, "the engines ended\n"))
        assert get(running.url, "/readyz")[0] == 503


def test_a_server_that_is_full_is_healthy_but_not_ready(tiny: Path) -> None:
    with run_cloud(tiny, limits=Limits(max_sessions=1)) as running:
        with Device(running.url, open_of(tiny)):
            assert get(running.url, "/healthz")[0] == 200
            assert get(running.url, "/readyz") == (503, "1 sessions are open, the most\n")
        assert eventually(lambda: get(running.url, "/readyz")[0] == 200)


# --- the drain ---


def drained(running: RunningCloud, seconds: float) -> Any:
    """Begins the drain; gives its future."""
    loop = running.server.health.engines.get_loop()  # type: ignore[union-attr]
    return asyncio.run_coroutine_threadsafe(running.server.drain(seconds), loop)


def pending(running: RunningCloud, count: int) -> bool:
    """Whether so many requests wait behind one that runs."""
    return any(len(connection._session._pending) == count for connection in running.server._connections)


def test_what_was_received_is_answered_before_the_session_is_told(tiny: Path) -> None:
    with run_cloud(tiny) as running, Device(running.url, open_of(tiny)) as device:
        with held_up(running):
            for keep in range(4):
                device.send(device.append(keep, EMBEDDINGS[keep : keep + 1], top_k=1))
            assert eventually(lambda: pending(running, 3))
            drain = drained(running, 10)
            assert eventually(lambda: get(running.url, "/readyz") == (503, "draining\n"))
            assert get(running.url, "/healthz")[0] == 200
            assert refusal(running.url) == 503
            device.send(device.append(4, EMBEDDINGS[:1]))  # too late
        assert [device.receive().seq for _ in range(4)] == [1, 2, 3, 4]
        error = device.receive()
        assert (error.code, error.seq, error.retryable) == ("shutting_down", None, True)
        assert close_code(device.socket) == 1001
        drain.result(PATIENCE)


def test_a_drain_does_not_wait_for_a_session_whose_device_is_gone(tiny: Path) -> None:
    with run_cloud(tiny) as running:
        device = Device(running.url, open_of(tiny))
        with held_up(running):
            device.send(device.append(0, EMBEDDINGS[:1]))
            device.send(device.append(1, EMBEDDINGS[:1]))
            assert eventually(lambda: pending(running, 1))
            drain = drained(running, 60)
            device.socket.socket.close()
            drain.result(PATIENCE)


def test_a_drain_ends_in_its_time_where_a_step_does_not(tiny: Path) -> None:
    with run_cloud(tiny) as running, Device(running.url, open_of(tiny)) as device, held_up(running):
        device.send(device.append(0, EMBEDDINGS[:1]))
        assert eventually(lambda: running.server._scheduler.step_began is not None)
        drained(running, 0.1).result(PATIENCE)


@contextmanager
def owing(tiny: Path, tmp_path: Path, *, drain_seconds: int) -> Iterator[tuple[str, subprocess.Popen[str], Device]]:
    """A server process with a request that waits a minute for its token's rate: its URL, itself and the device."""
    token = add_token(tmp_path / "tokens.txt", "phone")
    options = ("--token-file", tmp_path / "tokens.txt", "--token-rate", "1", "--drain-seconds", str(drain_seconds))
    with (
        run_cloud_process(tiny / "cloud", *options) as (url, process),
        Device(url, open_of(tiny, token=token)) as device,
    ):
        device.rows(0, EMBEDDINGS[:60])
        device.send(device.append(60, EMBEDDINGS[:1]))
        assert device.socket.ping().wait(PATIENCE)  # it was read
        yield url, process, device


def test_a_process_that_cannot_answer_everything_ends_after_its_drain_seconds(tiny: Path, tmp_path: Path) -> None:
    with owing(tiny, tmp_path, drain_seconds=1) as (_, process, device):
        began = time.monotonic()
        process.terminate()
        error = device.receive()
        assert (error.code, close_code(device.socket)) == ("shutting_down", 1001)
        assert process.wait(PATIENCE) == 0
        assert 0.5 <= time.monotonic() - began < 6


STUCK = """
import threading
from transformers.models.llama.modeling_llama import LlamaModel
real = LlamaModel.forward
def forward(self, *arguments, **named):
    if named["inputs_embeds"].shape[1] > 40:
        threading.Event().wait()
    return real(self, *arguments, **named)
LlamaModel.forward = forward
from cloud_backend.cli import main
main()
"""


def test_a_process_whose_step_never_ends_ends_after_its_drain_seconds(tiny: Path) -> None:
    options = ("serve", str(tiny / "cloud"), "--port", str(port := free_port()), "--drain-seconds", "1")
    url = f"ws://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, "-c", STUCK, *options], stderr=subprocess.DEVNULL) as process:
        assert eventually(lambda: listens(port) and get(url, "/healthz")[0] == 200, 60)
        with Device(url, open_of(tiny)) as device:
            device.rows(0, EMBEDDINGS[:2])
            device.send(device.append(2, EMBEDDINGS[:60]))
            assert device.socket.ping().wait(PATIENCE)  # it was read
            began = time.monotonic()
            process.terminate()
            assert process.wait(PATIENCE) == 0
            assert time.monotonic() - began >= 1


def test_a_second_sigterm_ends_the_process_at_once(tiny: Path, tmp_path: Path) -> None:
    with owing(tiny, tmp_path, drain_seconds=50) as (url, process, device):
        process.terminate()
        assert eventually(lambda: get(url, "/readyz") == (503, "draining\n"))
        process.terminate()
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        assert close_code(device.socket) is None


def test_a_refused_handshake_says_when_to_come_again(cloud: RunningCloud) -> None:
    cloud.server.health.draining = True
    try:
        response, body = exchange(cloud.url, "/", Upgrade="websocket", Connection="Upgrade")
        assert (response.status, response.headers["Retry-After"], body) == (503, "1", "draining\n")
    finally:
        cloud.server.health.draining = False
