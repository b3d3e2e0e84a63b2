"""The cloud as an ASGI application, under uvicorn on loopback, with the device app and with devices that misbehave."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed, InvalidStatus

from cloud_backend.asgi import Application, ASGISocket, application
from cloud_backend.limits import Limits
from cloud_backend.scheduler import Scheduler
from cloud_backend.server import CloudServer
from cloud_backend.serving import Serving
from cloud_backend.sockets import Closed
from cloud_backend.tokens import add_token
from cloud_backend.words import parse
from shared import wire
from shared.errors import BundleError, UsageError
from tests.cloud_backend.asking import eventually, get, samples
from tests.cloud_backend.device import PATIENCE, Device, close_code, dial, open_of, table
from tests.conftest import open_assistant, run_cloud

PROMPT = "What is the capital of France?"


@contextmanager
def under_uvicorn(app: Any) -> Iterator[str]:
    """An application on a free loopback port, in a thread; gives its URL."""
    with running_uvicorn(app) as (url, _):
        yield url


@contextmanager
def running_uvicorn(app: Any, port: int = 0) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """The same, with the event loop that it runs in. port: 0 takes a free one."""
    taken = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([taken])), daemon=True)
    thread.start()
    try:
        assert eventually(lambda: server.started or not thread.is_alive())
        yield f"ws://127.0.0.1:{taken.getsockname()[1]}", loop
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "uvicorn did not stop"
        loop.close()


@pytest.fixture(scope="module")
def app(tiny: Path) -> Application:
    return application([str(tiny / "cloud"), "--origin", "https://page.example", "--max-sessions", "8"])


@pytest.fixture(scope="module")
def url(app: Application) -> Iterator[str]:
    with under_uvicorn(app) as url:
        yield url


def status(url: str, **options: Any) -> int:
    """What a handshake is answered."""
    try:
        with dial(url, **options):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


def test_the_device_app_gets_the_answers_of_the_listener(url: str, tiny: Path) -> None:
    with run_cloud(tiny) as cloud, open_assistant(tiny, cloud.url) as assistant:
        wanted = assistant.complete(PROMPT, max_tokens=24).finish()
    with open_assistant(tiny, url) as assistant:
        assert assistant.complete(PROMPT, max_tokens=24).finish().ids == wanted.ids


def test_the_subprotocol_is_answered_and_demanded(url: str) -> None:
    with dial(url) as connection:
        assert connection.subprotocol == wire.SUBPROTOCOL
    assert status(url, subprotocols=None) == status(url, subprotocols=["stip.v0"]) == 400


@pytest.mark.parametrize(("origin", "answer"), [(None, 101), ("https://page.example", 101), ("https://x.example", 403)])
def test_only_an_allowed_origin_is_let_in(url: str, origin: Any, answer: int) -> None:
    assert status(url, origin=origin) == answer


def test_on_loopback_a_name_of_another_machine_is_refused(url: str) -> None:
    assert get(url, "/healthz", Host="rebound.example") == (403, "Host: wanted a loopback name\n")


def test_health_readiness_and_metrics_are_answered(url: str, tiny: Path) -> None:
    assert get(url, "/healthz") == get(url, "/readyz") == (200, "ok\n")
    with Device(url, open_of(tiny)):
        assert samples(url)["stip_sessions_open", "llama"] == 1
    assert get(url, "/elsewhere")[0] == 404 and get(url, "/healthz", method="POST")[0] == 405


def test_a_device_goes_on_when_a_stopped_uvicorn_is_started_again(url: str, tiny: Path) -> None:
    with open_assistant(tiny, url) as assistant:
        wanted = assistant.complete(PROMPT, max_tokens=24).finish()
    with running_uvicorn(application([str(tiny / "cloud")])) as (first, _):
        assistant = open_assistant(tiny, first, retry_seconds=PATIENCE)
        answer = assistant.complete(PROMPT, max_tokens=24)
        for _ in answer:
            if len(answer.ids) >= 4:
                break
    with assistant, running_uvicorn(application([str(tiny / "cloud")]), port=int(first.rpartition(":")[2])):
        assert answer.finish().ids == wanted.ids
        assert answer.stats.counters.replays == 1


@pytest.mark.parametrize("frame", ["text", b"\0" * 100], ids=["text", "zeros"])
def test_what_is_no_frame_ends_the_connection(url: str, frame: bytes | str) -> None:
    with dial(url) as connection:
        connection.send(frame)
        assert close_code(connection) == 1002


def test_a_frame_longer_than_any_open_ends_the_connection(url: str) -> None:
    with dial(url) as connection:
        connection.send(bytes(2**20))
        assert close_code(connection) == 1009


def test_a_frame_longer_than_the_limit_gets_its_error_and_a_much_longer_one_ends_the_session(
    url: str, tiny: Path
) -> None:
    with Device(url, open_of(tiny)) as device:
        most = device.opened.max_frame
        reply = device.ask(device.append(0, table()[:1].repeat(most // (4 * 48) + 1, axis=0), rows=1))
        assert isinstance(reply, wire.Error) and reply.code == "too_large"
        device.send(bytes(2 * most + 1))
        assert close_code(device.socket) == 1009


def test_a_lost_connection_is_resumed_and_a_goodbye_is_not(url: str, tiny: Path) -> None:
    with Device(url, open_of(tiny)) as device:
        device.rows(0, table()[:5])
        device.socket.socket.shutdown(socket.SHUT_RDWR)
        with Device(url, open_of(tiny, resume=device.opened.resume)) as again:
            assert again.opened.kv_length == 5
    with Device(url, open_of(tiny, resume=again.opened.resume)) as fresh:
        assert fresh.opened.kv_length == 0


def test_beyond_the_limit_a_session_is_sent_away_to_come_again(url: str, app: Application, tiny: Path) -> None:
    devices = [Device(url, open_of(tiny)) for _ in range(8)]
    with dial(url) as connection:
        refused = wire.decode(connection.recv(PATIENCE))  # type: ignore[arg-type]
        assert isinstance(refused, wire.Error) and refused.code == "too_many_sessions" and refused.retryable
        assert close_code(connection) == 1013
    for device in devices:
        device.socket.close()
    assert eventually(lambda: not app.server._connections)


def test_who_is_further_ahead_than_the_window_is_sent_away(tiny: Path) -> None:
    app = application([str(tiny / "cloud"), "--max-frame", "4096", "--window", "8192"])
    with running_uvicorn(app) as (url, loop), Device(url, open_of(tiny)) as device:
        gate = threading.Event()
        asyncio.run_coroutine_threadsafe(app._serving.scheduler.call(gate.wait), loop)  # no answer
        try:
            with pytest.raises(ConnectionClosed) as caught:
                while True:
                    device.send(device.append(0, table()[:3], rows=1, top_k=1))
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1008
        finally:
            gate.set()


def test_a_drain_answers_what_was_received_and_says_why_it_ends(tiny: Path) -> None:
    app = application([str(tiny / "cloud")])
    with running_uvicorn(app) as (url, loop), Device(url, open_of(tiny)) as device:
        gate = threading.Event()
        asyncio.run_coroutine_threadsafe(app._serving.scheduler.call(gate.wait), loop)  # no answer
        device.send(device.append(0, table()[:3], rows=1, top_k=1))
        assert eventually(lambda: any(connection._session.busy for connection in app.server._connections))
        drained = asyncio.run_coroutine_threadsafe(app.server.drain(PATIENCE), loop)
        assert eventually(lambda: app.server.health.draining) and not drained.done()
        gate.set()
        drained.result(PATIENCE)
        assert isinstance(device.receive(), wire.Logits)
        farewell = device.receive()
        assert farewell.code == "shutting_down" and farewell.retryable
        assert close_code(device.socket) == 1001
        assert status(url) == 503 and get(url, "/readyz") == (503, "draining\n")


# --- the socket by itself, at moments that no device can choose ---


def gone_from(
    comes: list[Any], said: list[Any], error: Exception | None = None, limits: Limits | None = None
) -> ASGISocket:
    """A socket whose server brings `comes` and then the device's end; what is sent is said, or is the error."""
    coming = [*comes, {"type": "websocket.disconnect", "code": 1006}]

    async def receive() -> Any:
        return coming.pop(0)

    async def send(message: Any) -> None:
        if error is not None:
            raise error
        said.append(message)

    return ASGISocket({"headers": []}, receive, send, limits or Limits(), lambda: None)


def test_nothing_is_said_to_a_device_that_is_gone() -> None:
    async def live() -> list[Any]:
        said: list[Any] = []
        socket = gone_from([{"type": "websocket.receive", "bytes": b"frame"}], said)
        await socket.read()
        with pytest.raises(Closed):
            await socket.send(b"reply")
        assert await socket.receive() == b"frame"  # what came before is still there
        return said

    assert asyncio.run(live()) == []


@pytest.mark.parametrize("error", [OSError(), RuntimeError("send after close")])
def test_however_a_server_says_that_the_device_is_gone_the_socket_is_closed(error: Exception) -> None:
    with pytest.raises(Closed):
        asyncio.run(gone_from([], [], error).send(b"reply"))


def test_frames_that_carry_nothing_are_not_kept_without_end() -> None:
    limits = Limits(max_frame=4096, window=8192)
    empty = [{"type": "websocket.receive", "bytes": b""}] * (limits.window + limits.longest_frame)
    said: list[Any] = []
    asyncio.run(gone_from(empty, said, limits=limits).read())
    assert [message.get("code") for message in said] == [1008]


# --- tokens ---


@pytest.fixture(scope="module")
def guarded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URL of a cloud that wants a token, and the token."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.txt"
    token = add_token(path, "phone")
    with under_uvicorn(application({"folders": str(tiny / "cloud"), "token-file": path})) as url:
        yield url, token


def test_a_token_is_taken_from_the_handshake_or_from_open(guarded: tuple[str, str], tiny: Path) -> None:
    url, token = guarded
    with (
        Device(url, open_of(tiny, token=token)),
        Device(url, open_of(tiny), additional_headers={"Authorization": f"Bearer {token}"}) as device,
    ):
        assert device.opened.kv_length == 0
    with dial(url) as connection:
        connection.send(wire.encode(open_of(tiny, token="guess")))
        assert close_code(connection) == 1008


def test_connections_of_one_client_that_open_nothing_are_few(guarded: tuple[str, str], tiny: Path) -> None:
    url, token = guarded
    standing = [dial(url).__enter__() for _ in range(63)]
    with Device(url, open_of(tiny, token=token)):
        standing.append(dial(url).__enter__())  # who has a session does not stand on the doorstep any more
        assert status(url) == 503
    for connection in standing:
        connection.close()
    assert eventually(lambda: status(url) == 101)


async def handshake(app: Application, server: tuple[str, int]) -> list[Any]:
    """What the application answers a handshake that came to an address of this machine."""
    scope = {
        "type": "websocket",
        "server": server,
        "client": ("198.51.100.7", 50000),
        "headers": [(b"host", b"cloud.example")],
        "subprotocols": [wire.SUBPROTOCOL],
        "extensions": {"websocket.http.response": {}},
    }
    said: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect" if not said else "websocket.disconnect"}

    async def send(message: Any) -> None:
        said.append(message)

    await app(scope, receive, send)
    return said


def test_beyond_loopback_nobody_is_served_without_tokens(app: Application, url: str) -> None:
    assert asyncio.run(handshake(app, ("192.0.2.1", 443)))[0]["status"] == 403


# --- how it starts ---


def test_uvicorns_command_starts_it_with_the_options_of_the_environment(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "cloud_backend.asgi:application", "--port", str(port)]
    environment = os.environ | {"STIP_CLOUD": f"'{tiny / 'cloud'}' --max-sessions 3"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any("Uvicorn running on" in line for line in process.stderr)
        with open_assistant(tiny, f"ws://127.0.0.1:{port}") as assistant:
            assert len(assistant.complete(PROMPT, max_tokens=4).finish().ids) == 4
    finally:
        process.terminate()
        _, log = process.communicate(timeout=PATIENCE)
    assert "Application shutdown complete" in log


STUCK = """
import sys, threading, uvicorn
from cloud_backend import asgi, scheduler

app = asgi.application([sys.argv[1], "--drain-seconds", "1"])

def stuck(engine, batch):
    print("stuck", flush=True)
    threading.Event().wait()

async def served(scope, receive, send):
    if scope["type"] == "websocket":  # models are loaded and were tried out
        scheduler._run = stuck
    await app(scope, receive, send)

uvicorn.run(served, port=int(sys.argv[2]))
"""


def test_a_step_that_is_stuck_does_not_keep_the_process(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-c", STUCK, str(tiny / "cloud"), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert any("Uvicorn running on" in line for line in process.stderr)
            with Device(f"ws://127.0.0.1:{port}", open_of(tiny)) as device:
                device.send(device.append(0, table()[:3], rows=1, top_k=1))
                assert process.stdout.readline() == "stuck\n"
                process.terminate()
                process.wait(PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BundleError("model: broken", hint="mend it"), "model: broken"),
        (RuntimeError("secret detail"), "loading failed: RuntimeError"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_the_end_of_the_start(
    error: Exception, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> Any:
        raise error

    async def live() -> list[Any]:
        said: list[Any] = []

        async def receive() -> Any:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            said.append(message)

        scheduler = Scheduler()
        app = Application(Serving(CloudServer([], Limits(), None, scheduler), scheduler, [fails], None, 1.0))
        await app({"type": "lifespan"}, receive, send)
        return said

    assert asyncio.run(live()) == [{"type": "lifespan.startup.failed", "message": message}]
    assert message in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["cloud", "--port", "80"], "--port: this server does not listen by itself"),
        ({"folders": "cloud", "tls_cert": "F"}, "--tls-cert: this server does not listen by itself"),
        (["cloud", "--max-sessions", "0"], "--max-sessions: seen 0"),
        ({"folders": "cloud", "maximum": 3}, "unrecognized arguments: --maximum"),
        ({}, "OUT/cloud"),
    ],
)
def test_options_that_cannot_be_carried_out_are_usage_errors(options: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        parse(options)
    assert caught.value.hint


def test_a_mapping_says_what_the_words_say() -> None:
    words = ["--threads", "2", "--verify", "--origin", "https://a", "--origin", "https://b", "one", "two"]
    mapping = {"folders": ["one", "two"], "threads": 2, "verify": True, "origin": ["https://a", "https://b"]}
    assert vars(parse(mapping)) == vars(parse(words)) == vars(parse(mapping | {"log": "text"}))


def test_without_options_it_says_which_variable_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STIP_CLOUD", raising=False)
    with pytest.raises(UsageError, match="STIP_CLOUD"):
        application()
