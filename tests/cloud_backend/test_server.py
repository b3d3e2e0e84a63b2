"""The server on real sockets: who is let in, what ends a session, and what a mistake costs the others."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from cloud_backend.cli import main
from cloud_backend.limits import Limits
from cloud_backend.listener import listening
from cloud_backend.opening import open_context
from cloud_backend.server import CloudServer
from cloud_backend.tokens import Tokens, add_token
from export.bundle import export_model
from shared import wire
from shared.errors import UsageError
from shared.levels import limit
from tests.cloud_backend.asking import eventually, get
from tests.cloud_backend.device import PATIENCE, Device, close_code, decode_greedily, dial, engine_step, open_of, table
from tests.cloud_backend.faults import computing_nan, failing
from tests.conftest import RunningCloud, run_cloud, run_cloud_process

ON_BOTH_ENGINES = True
EMBEDDINGS = table()
TOKEN = "stip_wrong-token-of-a-test"
VALUE = 0.7310585786  # in the embeddings of the logged session; found nowhere else


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


def slow_down(running: RunningCloud, seconds: float) -> None:
    """Makes every forward take so much longer."""
    real = running.engine.run

    def slowly(batch: Any) -> Any:
        time.sleep(seconds)
        return real(batch)

    running.engine.run = slowly  # type: ignore[method-assign]


def sessions(running: RunningCloud) -> int:
    return len(running.server._connections)


def refusal(url: str, **options: Any) -> int:
    """The HTTP status with which the handshake is refused."""
    with pytest.raises(InvalidStatus) as refused, dial(url, **options):
        pass
    return refused.value.response.status_code


# --- the handshake ---


def test_a_client_without_the_subprotocol_is_refused(cloud: RunningCloud) -> None:
    assert refusal(cloud.url, subprotocols=None) == 400


def test_a_client_of_another_version_is_refused(cloud: RunningCloud) -> None:
    assert refusal(cloud.url, subprotocols=["stip.v0"]) == 400


def test_the_subprotocol_is_picked_from_several(cloud: RunningCloud) -> None:
    with dial(cloud.url, subprotocols=["stip.v9", "stip.v1"]) as connection:
        assert connection.subprotocol == "stip.v1"


def test_compression_is_declined(cloud: RunningCloud) -> None:
    with dial(cloud.url, compression="deflate") as connection:
        assert "Sec-WebSocket-Extensions" not in connection.response.headers  # type: ignore[union-attr]


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:8765", "null"])
def test_a_page_of_another_origin_is_refused(cloud: RunningCloud, origin: str) -> None:
    assert refusal(cloud.url, origin=origin) == 403


def named(url: str, host: str) -> tuple[str, socket.socket]:
    """A URL with this host, and a socket to the server that `url` names."""
    parts = urlsplit(url)
    return f"ws://{host}:{parts.port}", socket.create_connection((parts.hostname, parts.port), PATIENCE)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.7"])
def test_a_host_that_is_not_loopback_is_refused(cloud: RunningCloud, host: str) -> None:
    url, connected = named(cloud.url, host)
    assert refusal(url, sock=connected) == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_a_name_of_loopback_is_let_in(cloud: RunningCloud, tiny: Path, host: str) -> None:
    url, connected = named(cloud.url, host)
    with Device(url, open_of(tiny), sock=connected) as device:
        assert device.opened.kv_length == 0


def test_no_origin_is_let_in(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny), origin=None) as device:
        assert device.opened.kv_length == 0


# --- where it listens ---


async def listen(server: CloudServer, host: str, **options: Any) -> None:
    async with listening(server, host, 0, **options):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "cloud.example"])
def test_a_host_beyond_loopback_without_tokens_is_refused_at_start(host: str) -> None:
    with pytest.raises(UsageError, match="token") as caught:
        asyncio.run(listen(CloudServer([], Limits(), None), host))
    assert caught.value.hint


def test_a_host_beyond_loopback_with_tokens_is_served(tmp_path: Path) -> None:
    add_token(tmp_path / "tokens.txt", "phone")
    asyncio.run(listen(CloudServer([], Limits(), Tokens(tmp_path / "tokens.txt")), "0.0.0.0"))


def test_a_port_in_use_is_refused_with_a_hint() -> None:
    async def twice() -> None:
        server = CloudServer([], Limits(), None)
        async with listening(server, "127.0.0.1", 0) as listener:
            taken = listener.sockets[0].getsockname()[1]
            async with listening(CloudServer([], Limits(), None), "127.0.0.1", taken):
                pass

    with pytest.raises(UsageError, match="in use") as caught:
        asyncio.run(twice())
    assert caught.value.hint


def test_only_an_allowed_origin_is_let_in() -> None:
    async def knock() -> list[int]:
        from websockets.asyncio.client import connect

        server, statuses = CloudServer([], Limits(), None), []
        async with listening(server, "127.0.0.1", 0, origins=["https://page.example"]) as listener:
            url = f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            for origin in ("https://page.example", "https://evil.example", "https://page.example.evil.example"):
                try:
                    async with connect(url, origin=origin, subprotocols=["stip.v1"]):  # type: ignore[arg-type,list-item]
                        statuses.append(101)
                except InvalidStatus as refused:
                    statuses.append(refused.response.status_code)
        return statuses

    assert asyncio.run(knock()) == [101, 403, 403]


# --- tokens ---


@pytest.fixture(scope="module")
def guarded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningCloud, str]]:
    """A cloud that wants a token, and the token."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.txt"
    token = add_token(path, "phone")
    with run_cloud(tiny, tokens=Tokens(path)) as running:
        yield running, token


def bearer(*tokens: str) -> dict[str, Any]:
    return {"additional_headers": [("Authorization", f"Bearer {token}") for token in tokens]}


def test_a_token_in_open_is_taken(guarded: tuple[RunningCloud, str], tiny: Path) -> None:
    running, token = guarded
    with Device(running.url, open_of(tiny, token=token)) as device:
        assert device.opened.kv_length == 0


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_token_in_the_authorization_header_is_taken(
    guarded: tuple[RunningCloud, str], tiny: Path, scheme: str
) -> None:
    running, token = guarded
    with Device(running.url, open_of(tiny), additional_headers={"Authorization": f"{scheme} {token}"}) as device:
        assert device.opened.kv_length == 0


@pytest.mark.parametrize("right_one", ["open", "header"])
def test_one_right_token_of_two_suffices(guarded: tuple[RunningCloud, str], tiny: Path, right_one: str) -> None:
    running, token = guarded
    header, field = (TOKEN, token) if right_one == "open" else (token, TOKEN)
    with Device(running.url, open_of(tiny, token=field), **bearer(header)) as device:
        assert device.opened.kv_length == 0


@pytest.mark.parametrize(
    "headers",
    [{}, bearer(TOKEN), bearer("kn\xf6wn"), {"additional_headers": {"Authorization": "Basic YTpi"}}, bearer("a", "b")],
    ids=["none", "wrong", "not ASCII", "basic", "two headers"],
)
def test_without_a_right_token_nobody_is_let_in(
    guarded: tuple[RunningCloud, str], tiny: Path, headers: dict[str, Any]
) -> None:
    with dial(guarded[0].url, **headers) as connection:
        connection.send(wire.encode(open_of(tiny, token=TOKEN)))
        error = wire.decode(connection.recv(PATIENCE))  # type: ignore[arg-type]
        assert isinstance(error, wire.Error)
        assert (error.code, close_code(connection)) == ("unauthorized", 1008)


def test_an_authorization_header_of_another_scheme_does_not_carry_a_token(
    guarded: tuple[RunningCloud, str], tiny: Path
) -> None:
    running, token = guarded
    with dial(running.url, additional_headers={"Authorization": f"Basic {token}"}) as connection:
        connection.send(wire.encode(open_of(tiny)))
        assert close_code(connection) == 1008


# --- what ends a session, and what does not ---


def last_word(device: Device) -> tuple[str, int | None]:
    """The code of the Error that ends the session, and the close code."""
    error = device.receive()
    assert isinstance(error, wire.Error) and error.seq is None, error
    return error.code, close_code(device.socket)


def test_too_many_sessions_are_told_so_and_closed(tiny: Path) -> None:
    with (
        run_cloud(tiny, limits=Limits(max_sessions=1)) as running,
        Device(running.url, open_of(tiny)),
        dial(running.url) as second,
    ):
        error = wire.decode(second.recv(PATIENCE))  # type: ignore[arg-type]
        assert isinstance(error, wire.Error)
        assert (error.code, error.retryable, close_code(second)) == ("too_many_sessions", True, 1013)


def test_a_session_that_ends_makes_room_for_another(tiny: Path) -> None:
    with run_cloud(tiny, limits=Limits(max_sessions=1)) as running:
        for _ in range(3):
            with Device(running.url, open_of(tiny)):
                pass
            assert eventually(lambda: sessions(running) == 0)


def test_a_refused_session_leaves_the_open_one_alone(tiny: Path) -> None:
    with run_cloud(tiny, limits=Limits(max_sessions=1)) as running, Device(running.url, open_of(tiny)) as first:
        with dial(running.url) as second:
            close_code(second)
        assert first.rows(0, EMBEDDINGS[:2]).shape == (1, 320)


def test_a_silent_session_is_idle(tiny: Path) -> None:
    with (
        run_cloud(tiny, limits=Limits(idle_seconds=0.3)) as running,
        Device(running.url, open_of(tiny)) as device,
    ):
        assert last_word(device) == ("idle", 1008)


def test_a_session_that_keeps_sending_is_not_idle(tiny: Path) -> None:
    with (
        run_cloud(tiny, limits=Limits(idle_seconds=1.0)) as running,
        Device(running.url, open_of(tiny)) as device,
    ):
        for keep in range(7):
            time.sleep(0.2)
            device.rows(keep, EMBEDDINGS[:1])


def test_a_session_that_waits_for_its_answer_is_not_idle(tiny: Path) -> None:
    with (
        run_cloud(tiny, limits=Limits(idle_seconds=0.5)) as running,
        Device(running.url, open_of(tiny)) as device,
    ):
        slow_down(running, 1.2)
        assert device.rows(0, EMBEDDINGS[:1]).shape == (1, 320)


def test_a_connection_that_never_opens_is_idle(tiny: Path) -> None:
    with run_cloud(tiny, limits=Limits(open_seconds=0.3)) as running, dial(running.url) as connection:
        error = wire.decode(connection.recv(PATIENCE))  # type: ignore[arg-type]
        assert isinstance(error, wire.Error)
        assert (error.code, close_code(connection)) == ("idle", 1008)


def test_a_text_frame_is_a_bad_frame(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny)) as device:
        device.send("hello")
        assert last_word(device) == ("bad_frame", 1002)


def test_a_broken_frame_is_a_bad_frame(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny)) as device:
        device.send(wire.encode(device.append(0, EMBEDDINGS[:2]))[:-1])
        assert last_word(device) == ("bad_frame", 1002)


SMALL = Limits(max_frame=8192, window=32768)


@pytest.fixture(scope="module")
def small(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny, limits=SMALL) as running:
        yield running


def frame_of_rows(count: int) -> np.ndarray:
    return np.resize(EMBEDDINGS, (count, EMBEDDINGS.shape[1]))


def test_a_frame_beyond_max_frame_is_too_large(small: RunningCloud, tiny: Path) -> None:
    with Device(small.url, open_of(tiny)) as device:
        error = device.ask(device.append(0, frame_of_rows(50)))
        assert (error.code, error.seq, error.kv_length) == ("too_large", 1, 0)


def test_after_a_frame_beyond_max_frame_the_session_goes_on(small: RunningCloud, tiny: Path) -> None:
    with Device(small.url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:3])
        device.ask(device.append(3, frame_of_rows(50)))
        device.rows(3, EMBEDDINGS[3:4])


def test_a_frame_far_beyond_max_frame_closes_1009(small: RunningCloud, tiny: Path) -> None:
    with Device(small.url, open_of(tiny)) as device:
        device.send(bytes(10 * SMALL.max_frame))
        assert close_code(device.socket) == 1009


def test_a_frame_announced_as_endless_closes_1009_before_it_is_sent(small: RunningCloud, tiny: Path) -> None:
    with Device(small.url, open_of(tiny)) as device:
        # RFC 6455 §5.2: a final binary frame, masked, of 2^62 bytes.
        device.socket.socket.sendall(b"\x82\xff" + struct.pack(">Q", 2**62) + bytes(4))
        assert close_code(device.socket) == 1009


def test_a_message_in_endless_fragments_closes_1009(small: RunningCloud, tiny: Path) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(4096)

    with Device(small.url, open_of(tiny)) as device:
        with pytest.raises(ConnectionClosed):
            device.socket.send(endless())
        assert close_code(device.socket) == 1009


def test_a_fragmented_frame_is_one_frame(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny)) as device:
        frame = wire.encode(device.append(0, EMBEDDINGS[:5]))
        device.socket.send(frame[at : at + 100] for at in range(0, len(frame), 100))
        assert isinstance(device.receive(), wire.Logits)


# --- the engine ---


def test_a_prompt_in_several_pipelined_appends_gives_the_answer_of_one(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny)) as device:
        whole = device.rows(0, EMBEDDINGS[:60])
    with Device(cloud.url, open_of(tiny)) as device:
        pieces = [device.append(at, EMBEDDINGS[at : at + 20], rows=0) for at in (0, 20)]
        for piece in (*pieces, device.append(40, EMBEDDINGS[40:60], top_k=0, after=2)):
            device.send(piece)
        acknowledged = [device.receive() for _ in pieces]
        last = device.receive()
    assert [reply.kv_length for reply in acknowledged] == [20, 40]
    np.testing.assert_allclose(last.values, whole, rtol=0, atol=1e-4)


def test_two_contexts_in_one_process_are_served_side_by_side(tiny: Path, tiny_exports: Callable[[str], Path]) -> None:
    other = tiny_exports("qwen2")
    expected = [decode_greedily(engine_step(open_context(out / "cloud", device="cpu")[1]), 24) for out in (tiny, other)]
    answers: list[list[np.ndarray]] = [[], []]
    with run_cloud(tiny, other) as running:

        def talk(which: int, export: Path) -> None:
            with Device(running.url, open_of(export)) as device:
                answers[which] = decode_greedily(device.rows, 24)

        threads = [threading.Thread(target=talk, args=pair) for pair in enumerate((tiny, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("change", "code"), [({"model": "qwen2"}, "wrong_key"), ({"key_id": "0" * 32}, "wrong_key")])
def test_with_two_contexts_a_key_opens_its_own_alone(
    tiny: Path, tiny_exports: Callable[[str], Path], change: dict[str, str], code: str
) -> None:
    opening = open_of(tiny)
    asked = wire.Open(**{"model": opening.model, "key_id": opening.key_id} | change)
    with run_cloud(tiny, tiny_exports("qwen2")) as running, dial(running.url) as connection:
        connection.send(wire.encode(asked))
        error = wire.decode(connection.recv(PATIENCE))  # type: ignore[arg-type]
        assert isinstance(error, wire.Error) and error.code == code


@pytest.fixture
def faulty(tiny: Path) -> Iterator[RunningCloud]:
    """A cloud whose model may be broken by the test."""
    with run_cloud(tiny) as running:
        yield running


def test_a_failing_model_is_internal_and_the_session_goes_on_from_keep(faulty: RunningCloud, tiny: Path) -> None:
    with Device(faulty.url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:5])
        with failing(faulty.engine):
            error = device.ask(device.append(4, EMBEDDINGS[:1]))
        assert (error.code, error.seq, error.kv_length) == ("internal", 2, 4)
        assert "secret" not in error.message
        device.rows(4, EMBEDDINGS[4:5])


def test_a_model_that_computes_nan_is_internal(faulty: RunningCloud, tiny: Path) -> None:
    with computing_nan(faulty.engine), Device(faulty.url, open_of(tiny)) as device:
        error = device.ask(device.append(0, EMBEDDINGS[:5]))
        assert (type(error), getattr(error, "code", None)) == (wire.Error, "internal")


def test_the_failure_of_one_session_does_not_touch_another(faulty: RunningCloud, tiny: Path) -> None:
    expected = decode_greedily(engine_step(open_context(tiny / "cloud", device="cpu")[1]), 12)

    with (
        failing(faulty.engine, lambda tokens: max(tokens) > 1),
        Device(faulty.url, open_of(tiny)) as good,
        Device(faulty.url, open_of(tiny)) as bad,
    ):

        def step(keep: int, embeddings: np.ndarray) -> np.ndarray:
            assert bad.ask(bad.append(0, EMBEDDINGS[:3])).code == "internal"
            return good.rows(keep, embeddings)

        np.testing.assert_allclose(decode_greedily(step, 12), expected, rtol=0, atol=1e-4)


# --- devices that behave badly ---


def dropped(device: Device) -> None:
    """Ends the TCP connection with a reset and no word."""
    raw = device.socket.socket
    with contextlib.suppress(OSError):  # the server may have ended it before
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def flood(device: Device, count: int) -> None:
    """Many small requests that each ask for a large answer, and not one answer read."""
    embeddings = EMBEDDINGS[:8]
    with contextlib.suppress(ConnectionClosed, OSError):
        for _ in range(count):
            device.send(device.append(0, embeddings, rows=8, top_k=0))


def test_a_dropped_connection_leaves_no_session(cloud: RunningCloud, tiny: Path) -> None:
    device = Device(cloud.url, open_of(tiny))
    device.send(device.append(0, EMBEDDINGS[:50]))
    dropped(device)
    assert eventually(lambda: sessions(cloud) == 0)


def test_a_connection_dropped_with_hundreds_of_requests_waiting_leaves_no_session(tiny: Path) -> None:
    with run_cloud(tiny) as running:
        slow_down(running, 0.01)  # so that they pile up
        device = Device(running.url, open_of(tiny), max_queue=None)
        flood(device, 600)
        assert eventually(lambda: any(connection._session.full for connection in running.server._connections))
        dropped(device)
        assert eventually(lambda: sessions(running) == 0, 5)


def test_more_requests_than_are_held_at_once_are_all_answered_in_order(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny), max_queue=None) as device:
        for _ in range(700):
            device.send(device.append(0, EMBEDDINGS[:1], top_k=1))
        assert [device.receive().seq for _ in range(700)] == list(range(1, 701))


def test_a_device_that_never_reads_does_not_hold_up_another(cloud: RunningCloud, tiny: Path) -> None:
    with Device(cloud.url, open_of(tiny), max_queue=1) as deaf, Device(cloud.url, open_of(tiny)) as other:
        flood(deaf, 100)
        started = time.monotonic()
        decode_greedily(other.rows, 10)
        assert time.monotonic() - started < 10
        dropped(deaf)


# --- the command ---


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, list[str]]:
    """`stip-cloud …` that fails: its exit status and what it wrote to stderr, line by line."""
    monkeypatch.setattr(sys, "argv", ["stip-cloud", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err.splitlines()  # type: ignore[return-value]


def test_serve_says_the_limit_of_each_protection(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "stip.cloud")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command(monkeypatch, capsys, "serve", tiny / "cloud", "--port", taken.getsockname()[1])
    assert f"llama: {limit('permutation')}" in caplog.messages


@pytest.fixture(scope="module")
def sharded(tiny_checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The cloud folders of two exports of one model, each in several shards, under two keys."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in ("one", "other"):
        export_model(str(tiny_checkpoints("llama")), folder / name, name="tiny", shard_bytes=40_000)
    return folder / "one" / "cloud", folder / "other" / "cloud"


def copied(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to / "cloud")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def missing(one: Path, _other: Path, tmp_path: Path) -> Path:
    return tmp_path / "nothing"


def device_half(one: Path, _other: Path, _tmp_path: Path) -> Path:
    return one.parent / "device"


def truncated_shard(one: Path, _other: Path, tmp_path: Path) -> Path:
    folder = copied(one, tmp_path)
    shards(folder)[1].write_bytes(shards(folder)[1].read_bytes()[:-7])
    return folder


def lost_shard(one: Path, _other: Path, tmp_path: Path) -> Path:
    folder = copied(one, tmp_path)
    shards(folder)[1].unlink()
    return folder


def exchanged_shards(one: Path, _other: Path, tmp_path: Path) -> Path:
    folder = copied(one, tmp_path)
    first, second = twins(folder)
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    return folder


def twins(folder: Path) -> tuple[Path, Path]:
    """Two shards of the same length, which only their headers tell apart."""
    by_length: dict[int, Path] = {}
    for path in shards(folder):
        if (seen := by_length.setdefault(path.stat().st_size, path)) != path:
            return seen, path
    raise AssertionError("the export has no two shards of one length")


def shard_of_another_export(one: Path, other: Path, tmp_path: Path) -> Path:
    folder = copied(one, tmp_path)
    assert shards(folder)[1].stat().st_size == shards(other)[1].stat().st_size
    shutil.copy(shards(other)[1], shards(folder)[1])
    return folder


def edited_manifest(one: Path, _other: Path, tmp_path: Path) -> Path:
    folder = copied(one, tmp_path)
    manifest = json.loads((folder / "stip.json").read_text())
    (folder / "stip.json").write_text(json.dumps(manifest | {"served_name": "another"}))
    return folder


def manifest_of_another_export(one: Path, other: Path, tmp_path: Path) -> Path:
    folder = copied(one, tmp_path)
    shutil.copy(other / "stip.json", folder / "stip.json")
    return folder


def manifest_that_is_no_json(one: Path, _other: Path, tmp_path: Path) -> Path:
    folder = copied(one, tmp_path)
    (folder / "stip.json").write_bytes(b"\xff\x00 not json")
    return folder


def config_that_is_no_json(one: Path, _other: Path, tmp_path: Path) -> Path:
    folder = copied(one, tmp_path)
    flip(folder / "config.json", 0)  # of the same length, so only the loading finds it
    return folder


def config_of_another_shape(one: Path, _other: Path, tmp_path: Path) -> Path:
    folder = copied(one, tmp_path)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r'("vocab_size": )\d+', r"\g<1>321", config))
    return folder


DAMAGES = [
    (missing, "stip.json"),
    (device_half, "stip.json"),
    (truncated_shard, "bytes"),
    (lost_shard, "missing"),
    (exchanged_shards, "header"),
    (shard_of_another_export, "header"),
    (edited_manifest, "edited"),
    (manifest_of_another_export, "header"),
    (manifest_that_is_no_json, "stip.json"),
    (config_that_is_no_json, "config"),
    (config_of_another_shape, "config|does not fit"),
]
every_damage = pytest.mark.parametrize(("damage", "named"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
Damage = Callable[[Path, Path, Path], Path]


@every_damage
def test_a_damaged_folder_is_one_line_of_error_and_one_of_hint(
    sharded: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Damage,
    named: str,
) -> None:
    folder = damage(*sharded, tmp_path)
    status, lines = command(monkeypatch, capsys, "serve", folder, "--port", 0)
    assert status == 1
    assert [line.partition(": ")[0] for line in lines] == ["stip-cloud", "hint"], lines
    assert lines[0].startswith("stip-cloud: error: ") and re.search(named, lines[0])


def test_the_hint_for_the_device_folder_says_that_it_is_the_other_half(
    sharded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = command(monkeypatch, capsys, "serve", sharded[0].parent / "device", "--port", 0)
    assert "other half" in lines[1]


@pytest.fixture
def edited_byte(sharded: tuple[Path, Path], tmp_path: Path) -> Path:
    """A cloud folder with one bit of one weight changed."""
    folder = copied(sharded[0], tmp_path)
    flip(shards(folder)[-1], -5)
    return folder


def test_an_edited_byte_is_found_with_verify(
    edited_byte: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = command(monkeypatch, capsys, "serve", edited_byte, "--port", 0, "--verify")
    assert status == 1 and len(lines) == 2
    assert "SHA-256" in lines[0] and lines[1].startswith("hint: ")


def test_an_edited_byte_is_not_looked_for_without_verify(edited_byte: Path) -> None:
    assert open_context(edited_byte, device="cpu", verify=False)


def test_an_undamaged_folder_passes_verify(sharded: tuple[Path, Path]) -> None:
    assert open_context(sharded[0], device="cpu", verify=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--host", "0.0.0.0"),
        ("--tls-cert", "cert.pem"),
        ("--tls-key", "key.pem"),
        ("--tls-cert", "no-cert.pem", "--tls-key", "no-key.pem"),
        ("--port", "70000"),
        ("--port", "-1"),
        ("--max-frame", "8192", "--window", "4096"),
        ("--max-sessions", "0"),
        ("--context", "-1"),
        ("--context", "0"),
        ("--idle-seconds", "-1"),
    ],
    ids=" ".join,
)
def test_options_that_cannot_be_carried_out_are_usage_errors(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    def nothing_is_served(*_: Any, **__: Any) -> None:
        raise AssertionError("it would have served")

    if "--port" not in arguments and "--host" not in arguments:
        monkeypatch.setattr("cloud_backend.process.serve_until_stopped", nothing_is_served)
    status, lines = command(monkeypatch, capsys, "serve", tiny / "cloud", *arguments)
    assert status == 2 and any(re.match("stip-cloud( serve)?: error: ", line) for line in lines), lines


@pytest.mark.parametrize(
    ("arguments", "named"), [((), "twice"), (("--tls-cert", "cert.pem"), "--tls-key"), (("--host", "0.0.0.0"), "token")]
)
def test_a_usage_error_has_a_hint(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    named: str,
) -> None:
    folders = [tiny / "cloud"] * (1 if arguments else 2)
    status, lines = command(monkeypatch, capsys, "serve", *folders, *arguments)
    assert status == 2 and lines[-1].startswith("hint: ") and named in lines[-2], lines


def test_a_missing_token_file_is_an_error_with_a_hint(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = command(
        monkeypatch, capsys, "serve", tiny / "cloud", "--token-file", tmp_path / "none", "--port", 0
    )
    assert status == 1 and lines[-1].startswith("hint: "), lines


# --- the process ---


@dataclass
class Ended:
    """What a server process left behind when SIGTERM had ended it."""

    status: int
    seconds: float
    log: list[str]  # of JSON without what is a time
    metrics: str
    stdout: str
    last_words: list[tuple[str, bool, int | None]]  # of each session: code, retryable, close code
    token: str
    answered: np.ndarray
    ids: list[int]


def untimed(line: str) -> str:
    """A line of JSON without times, whose digits may be those of anything."""
    fields = json.loads(line)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", fields.pop("time"))
    assert isinstance(fields.pop("seconds", 0.0), float)
    return json.dumps(fields)


@pytest.fixture(scope="module", params=["text", "json"])
def ended(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One server process at its default log level: sessions good and bad, then SIGTERM while two are open."""
    tokens = tmp_path_factory.mktemp("process") / "tokens.txt"
    token = add_token(tokens, "phone")
    arguments = ["serve", str(tiny / "cloud"), "--port", "0", "--token-file", str(tokens), "--log", request.param]
    process = subprocess.Popen(
        [sys.executable, "-m", "cloud_backend", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        log: list[str] = []
        for line in process.stderr:
            log.append(line.rstrip("\n"))
            if "listening on" in line:
                break
        url = log[-1].split()[-1].strip('"}')
        opening = open_of(tiny, token=token)
        embeddings = EMBEDDINGS[:20].copy()
        embeddings[:, 0] = VALUE
        with Device(url, opening, **bearer(token)) as device:
            answered = device.rows(0, embeddings, rows=4)
            top = device.ask(device.append(19, embeddings[:1], top_k=16))
            device.ask(device.append(900, embeddings))
            device.ask(device.append(0, np.full((1, 48), np.nan, np.float32)))
            device.ask(device.append(0, embeddings[:, :7]))
            device.send(b"\x20\0\0\0" + token.encode())
            close_code(device.socket)
        with dial(url) as connection:
            connection.send(wire.encode(open_of(tiny, token=TOKEN)))
            close_code(connection)
        for wrong in ({"subprotocols": None}, {"origin": "https://evil.example"}):
            refusal(url, **wrong)
        with Device(url, opening) as one, Device(url, opening) as other:
            one.rows(0, embeddings)
            _, metrics = get(url, "/metrics")
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            words = []
            for device in (one, other):
                error = device.receive()
                words.append((error.code, error.retryable, close_code(device.socket)))
        stdout, rest = process.communicate(timeout=PATIENCE)
        return Ended(
            process.returncode,
            time.monotonic() - started,
            [untimed(line) if request.param == "json" else line for line in log + rest.splitlines()],
            metrics,
            stdout,
            words,
            token,
            answered,
            top.ids[0].tolist(),
        )
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_sigterm_tells_every_session_to_come_again_and_closes_1001(ended: Ended) -> None:
    assert ended.last_words == [("shutting_down", True, 1001)] * 2


def test_sigterm_ends_the_process_with_status_0(ended: Ended) -> None:
    assert ended.status == 0


def test_sigterm_ends_the_process_within_seconds(ended: Ended) -> None:
    assert ended.seconds < 5


def test_the_log_holds_no_token(ended: Ended) -> None:
    log = "\n".join(ended.log)
    assert ended.token not in log and TOKEN not in log and ended.token.removeprefix("stip_")[:8] not in log


def test_the_metrics_hold_no_token_no_name_and_no_key(ended: Ended, tiny: Path) -> None:
    assert "stip_tokens_refused_total 1.0" in ended.metrics
    hashed = hashlib.sha256(ended.token.encode()).hexdigest()
    for secret in (ended.token.removeprefix("stip_")[:8], TOKEN, hashed[:8], "phone", open_of(tiny).key_id):
        assert secret not in ended.metrics


def test_the_log_holds_no_value_of_an_embedding_or_a_logit(ended: Ended) -> None:
    log = "\n".join(ended.log)
    values = [VALUE, *EMBEDDINGS[:20].ravel().tolist(), *ended.answered.ravel().tolist()]
    assert not [value for value in values if f"{abs(value):.8f}"[:6] in log]


def test_the_log_holds_no_ids(ended: Ended) -> None:
    log = "\n".join(ended.log)
    triples = zip(ended.ids, ended.ids[1:], ended.ids[2:], strict=False)
    assert not [triple for triple in triples if re.search(r"\b{}\W+{}\W+{}\b".format(*triple), log)]


def test_the_log_is_names_and_counts_alone(ended: Ended) -> None:
    known = re.compile(
        r"(serving llama: float32, context 256|llama: permutation is not encryption: .*|listening on ws://127\.0\.0\.1:\d+"
        r"|session opened on llama|session closed, \d open|stopping"
        r"|llama: llama\.cpp, f32; KV memory in float32: \d+ MiB, \d+ positions)"
    )
    for line in ended.log:
        fields = json.loads(line) if line.startswith("{") else {"message": line.removeprefix("stip-cloud: ")}
        assert known.fullmatch(fields.pop("message")), line
        errors = fields.pop("errors", {})
        assert all(re.fullmatch("[a-z_]+", code) and isinstance(count, int) for code, count in errors.items())
        assert re.fullmatch("[0-9a-f]{8}|", fields.pop("session", ""))
        names = ("info", "session opened", "session closed", "serving", "llama", "float32", "")
        assert all(isinstance(value, int) or value in names for value in fields.values()), line


@pytest.mark.parametrize("ended", ["json"], indirect=True)
def test_the_log_of_a_session_says_what_it_took(ended: Ended) -> None:
    closed = [fields for line in ended.log if (fields := json.loads(line)).get("event") == "session closed"]
    first = closed[0]
    assert (first["requests"], first["positions"]) == (2, 21)
    assert first["errors"] == {"out_of_step": 1, "not_finite": 1, "bad_request": 1, "bad_frame": 1}
    opened = [fields for line in ended.log if (fields := json.loads(line)).get("event") == "session opened"]
    assert first["session"] == opened[0]["session"] and first["model"] == "llama"
    assert closed[1]["errors"] == {"unauthorized": 1} and closed[1]["session"] == closed[1]["model"] == ""


def test_the_server_writes_nothing_to_stdout(ended: Ended) -> None:
    assert ended.stdout == ""


def stalled(device: Device) -> bool:
    """Whether the flood has stopped: answers fill every buffer, and requests the queue."""
    sent = device.seq
    time.sleep(0.7)
    return sent > 300 and device.seq == sent


def test_sigterm_ends_a_server_whose_device_does_not_read(tiny: Path) -> None:
    with run_cloud_process(tiny / "cloud") as (url, process):
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        parts = urlsplit(url)
        narrow.connect((parts.hostname, parts.port))
        deaf = Device(url, open_of(tiny), sock=narrow, max_queue=1)
        threading.Thread(target=flood, args=(deaf, 3000), daemon=True).start()
        assert eventually(lambda: stalled(deaf))
        process.terminate()
        assert process.wait(9) == 0  # `docker stop` kills after 10 s
        dropped(deaf)
