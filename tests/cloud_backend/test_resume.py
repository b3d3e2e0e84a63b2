"""Sessions on real sockets that outlive their connection, and those that lose their memory to others."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_backend.kv_cache import PAGE
from cloud_backend.limits import Limits
from cloud_backend.tokens import Tokens, add_token
from shared import wire
from tests.checkpoints import SIZES
from tests.cloud_backend.device import PATIENCE, Device, close, close_code, engine_step, open_of, table
from tests.conftest import RunningCloud, run_cloud

ON_BOTH_ENGINES = True
EMBEDDINGS = table()
PAGE_BYTES = PAGE * 4 * SIZES["num_hidden_layers"] * 2 * 2 * 8  # keys and values of 2 heads of 8 in float32


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether `holds` becomes true in time."""
    deadline = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def used(running: RunningCloud) -> int:
    """Pages that sessions hold."""
    pool: Any = running.engine.pool
    return int(pool.used // pool.page_bytes)


def reset(device: Device) -> None:
    """Ends the TCP connection with a reset and no word."""
    raw = device.socket.socket
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def shut(device: Device) -> None:
    """Ends the TCP connection in order, but without a close frame."""
    device.socket.socket.shutdown(socket.SHUT_RDWR)


def silent(_device: Device) -> None:
    """The connection is lost somewhere between: the cloud hears nothing."""


def going_away(device: Device) -> None:
    device.socket.close(1001)


def again(running: RunningCloud, export: Path, device: Device, **fields: Any) -> Device:
    """The session of a device on a new connection."""
    return Device(running.url, open_of(export, resume=device.opened.resume, **fields))


def rows_of(running: RunningCloud, count: int) -> np.ndarray:
    """The last full row for so many embeddings, of a session that nothing happened to."""
    return engine_step(running.engine)(0, EMBEDDINGS[:count])  # type: ignore[arg-type]


# --- a line that is cut ---


@pytest.mark.parametrize("lose", [reset, shut, silent, going_away])
def test_a_session_whose_line_was_cut_goes_on_with_the_same_logits(
    cloud: RunningCloud, tiny: Path, lose: Callable[[Device], None]
) -> None:
    device = Device(cloud.url, open_of(tiny))
    device.rows(0, EMBEDDINGS[:40])
    device.rows(40, EMBEDDINGS[40:41])
    lose(device)
    with again(cloud, tiny, device) as resumed:
        assert (resumed.opened.kv_length, resumed.opened.resume) == (41, device.opened.resume)
        close(resumed.rows(41, EMBEDDINGS[41:43]), rows_of(cloud, 43))


def test_a_session_can_lose_its_line_again_and_again(cloud: RunningCloud, tiny: Path) -> None:
    device = Device(cloud.url, open_of(tiny))
    for at in range(0, 50, 10):
        assert device.opened.kv_length == at
        row = device.rows(at, EMBEDDINGS[at : at + 10])
        reset(device)
        device = again(cloud, tiny, device)
    device.socket.close()
    close(row, rows_of(cloud, 50))


def test_a_resumed_session_can_be_cut_back(cloud: RunningCloud, tiny: Path) -> None:
    device = Device(cloud.url, open_of(tiny))
    device.rows(0, EMBEDDINGS[100:140])
    device.rows(0, EMBEDDINGS[:60])
    reset(device)
    with again(cloud, tiny, device) as resumed:
        close(resumed.rows(20, EMBEDDINGS[20:30]), rows_of(cloud, 30))


def test_what_was_asked_for_when_the_line_was_cut_is_not_held(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The prompt is being computed when the device is back: what Opened says is there must stay there.
    monkeypatch.setattr("cloud_backend.turns.CHUNK_ALONE", {"cpu": 16})
    monkeypatch.setattr("cloud_backend.turns.CHUNK_BESIDE", {"cpu": 16})
    with run_cloud(tiny) as cloud:
        steps = slowed(cloud, 0.1)
        device = Device(cloud.url, open_of(tiny))
        device.rows(0, EMBEDDINGS[:40])
        before = len(steps)
        device.send(device.append(40, EMBEDDINGS[100:250]))
        assert eventually(lambda: len(steps) == before + 3)
        reset(device)
        with again(cloud, tiny, device) as resumed:
            assert resumed.opened.kv_length == 40
            close(resumed.rows(40, EMBEDDINGS[40:50]), rows_of(cloud, 50))
            assert len(steps) < before + 8  # of 10 that the prompt would have taken


def slowed(running: RunningCloud, seconds: float) -> list[int]:
    """Makes every step take so much longer, and gives a list that grows with each that begins."""
    real, steps = running.engine.run, list[int]()

    def slowly(batch: Any) -> Any:
        steps.append(len(batch))
        time.sleep(seconds)
        return real(batch)

    running.engine.run = slowly  # type: ignore[method-assign]
    return steps


# --- the end of a session ---


def test_a_session_that_said_goodbye_is_gone_and_so_is_its_memory(cloud: RunningCloud, tiny: Path) -> None:
    before = used(cloud)
    with Device(cloud.url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:40])
        assert used(cloud) == before + 2
    assert eventually(lambda: used(cloud) == before)
    with again(cloud, tiny, device) as fresh:
        assert fresh.opened.kv_length == 0 and fresh.opened.resume != device.opened.resume


def test_a_session_that_does_not_come_back_is_gone_after_its_grace_time(tiny: Path) -> None:
    with run_cloud(tiny, limits=Limits(grace_seconds=0.2)) as cloud:
        devices = [Device(cloud.url, open_of(tiny)) for _ in range(3)]
        for device in devices:
            device.rows(0, EMBEDDINGS[:40])
            reset(device)
        assert eventually(lambda: used(cloud) == 0)
        with again(cloud, tiny, devices[0]) as fresh:
            assert fresh.opened.kv_length == 0


def test_a_session_that_ends_while_it_is_computed_gives_all_its_memory_back(tiny: Path) -> None:
    with run_cloud(tiny) as cloud:
        steps = slowed(cloud, 0.1)
        device = Device(cloud.url, open_of(tiny))
        device.send(device.append(0, EMBEDDINGS[:200]))
        assert eventually(lambda: len(steps) == 1)
        device.socket.close()
        with Device(cloud.url, open_of(tiny)) as other:
            other.rows(0, EMBEDDINGS[:5])
            assert used(cloud) == 1


# --- who may have it ---


def test_the_newest_connection_wins_and_the_older_is_closed(cloud: RunningCloud, tiny: Path) -> None:
    older = Device(cloud.url, open_of(tiny))
    older.rows(0, EMBEDDINGS[:40])
    with again(cloud, tiny, older) as newer:
        assert close_code(older.socket) == 1008
        assert newer.opened.kv_length == 40
        close(newer.rows(40, EMBEDDINGS[40:42]), rows_of(cloud, 42))


def test_a_connection_that_was_closed_for_a_newer_one_ends_nothing(cloud: RunningCloud, tiny: Path) -> None:
    older = Device(cloud.url, open_of(tiny))
    older.rows(0, EMBEDDINGS[:40])
    newer = again(cloud, tiny, older)
    assert close_code(older.socket) == 1008
    reset(newer)
    with again(cloud, tiny, newer) as newest:
        assert newest.opened.kv_length == 40


def test_a_connection_with_no_room_for_more_requests_is_closed_for_a_newer_one(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_backend.session.MOST_PENDING", 1)
    with run_cloud(tiny) as cloud:
        real, begun, let = cloud.engine.run, threading.Event(), threading.Event()

        def held(batch: Any) -> Any:
            begun.set()
            assert let.wait(2 * PATIENCE)
            return real(batch)

        cloud.engine.run = held  # type: ignore[method-assign]
        older = Device(cloud.url, open_of(tiny))
        name = open_of(tiny).model
        for keep in range(3):
            older.send(older.append(keep, EMBEDDINGS[keep : keep + 1]))
        assert begun.wait(PATIENCE)
        with again(cloud, tiny, older):
            assert close_code(older.socket) == 1008
            assert eventually(lambda: cloud.server.metrics.sessions_open(name) == 1)  # while its step still runs
            let.set()


def test_a_connection_of_which_the_answers_fail_is_closed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> None:
        raise ValueError("0.25 0.5")

    monkeypatch.setattr("cloud_backend.record.Record.answered", failing)
    with run_cloud(tiny) as cloud:
        device = Device(cloud.url, open_of(tiny))
        device.send(device.append(0, EMBEDDINGS[:3]))
        assert close_code(device.socket) == 1011
        assert eventually(lambda: used(cloud) == 0)
    assert "connection failed: ValueError" in caplog.text and "0.25" not in caplog.text


@pytest.mark.parametrize("secret", ["", "guess", "x" * 512])
def test_a_secret_that_was_never_given_gets_a_fresh_session(cloud: RunningCloud, tiny: Path, secret: str) -> None:
    with Device(cloud.url, open_of(tiny, resume=secret)) as device:
        assert device.opened.kv_length == 0 and device.opened.resume != secret


def test_the_secret_of_another_model_gets_a_fresh_session(tiny: Path, tiny_exports: Callable[[str], Path]) -> None:
    other = tiny_exports("qwen3")
    with run_cloud(tiny, other) as cloud, Device(cloud.url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:40])
        with Device(cloud.url, open_of(other, resume=device.opened.resume)) as fresh:
            assert fresh.opened.kv_length == 0
        close(device.rows(40, EMBEDDINGS[40:41]), rows_of(cloud, 41))


# --- memory that is short ---


def out_of_step(device: Device, keep: int) -> bool:
    """Whether the cloud says that it holds nothing any more."""
    reply = device.ask(device.append(keep, EMBEDDINGS[keep : keep + 1], top_k=0))
    return isinstance(reply, wire.Error) and (reply.code, reply.kv_length) == ("out_of_step", 0)


def test_an_evicted_session_is_told_so_and_gets_the_same_logits_when_it_sends_all_again(tiny: Path) -> None:
    with run_cloud(tiny, kv_bytes=4 * PAGE_BYTES) as cloud:
        with Device(cloud.url, open_of(tiny)) as one, Device(cloud.url, open_of(tiny)) as other:
            one.rows(0, EMBEDDINGS[:70])
            close(other.rows(0, EMBEDDINGS[:100]), rows_alone(tiny, 100))
            assert used(cloud) == 4
            assert out_of_step(one, 70)
            close(one.rows(0, EMBEDDINGS[:71]), rows_alone(tiny, 71))
            assert used(cloud) == 3
            assert out_of_step(other, 100)
        assert eventually(lambda: used(cloud) == 0)


def rows_alone(export: Path, count: int) -> np.ndarray:
    """`rows_of`, of a cloud with memory enough."""
    with run_cloud(export) as cloud:
        return rows_of(cloud, count)


def test_a_session_that_was_evicted_while_its_line_was_cut_comes_back_to_nothing(tiny: Path) -> None:
    with run_cloud(tiny, kv_bytes=4 * PAGE_BYTES) as cloud, Device(cloud.url, open_of(tiny)) as other:
        device = Device(cloud.url, open_of(tiny))
        device.rows(0, EMBEDDINGS[:70])
        reset(device)
        other.rows(0, EMBEDDINGS[:100])
        with again(cloud, tiny, device) as resumed:
            assert resumed.opened.kv_length == 0


def test_the_context_is_no_longer_than_memory(tiny: Path) -> None:
    with run_cloud(tiny, kv_bytes=4 * PAGE_BYTES) as cloud, Device(cloud.url, open_of(tiny)) as device:
        assert device.opened.context == 4 * PAGE
        device.rows(0, EMBEDDINGS[: 4 * PAGE])
        reply = device.ask(device.append(4 * PAGE, EMBEDDINGS[:1]))
        assert isinstance(reply, wire.Error) and reply.code == "context_full"


# --- tokens ---


def test_the_secret_under_another_token_gets_a_fresh_session(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.txt"
    mine, anothers = add_token(path, "mine"), add_token(path, "another's")
    with run_cloud(tiny, tokens=Tokens(path)) as cloud, Device(cloud.url, open_of(tiny, token=mine)) as device:
        device.rows(0, EMBEDDINGS[:40])
        with again(cloud, tiny, device, token=anothers) as fresh:
            assert fresh.opened.kv_length == 0
        assert len(device.rows(40, EMBEDDINGS[40:41])) == 1
