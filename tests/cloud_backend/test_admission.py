"""What one client can take from the others: tokens that come and go, their sessions and rate, silent connections."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cloud_backend.admission import Doorstep
from cloud_backend.limits import Limits
from cloud_backend.tokens import Tokens, add_token
from shared import wire
from tests.cloud_backend.asking import eventually, get
from tests.cloud_backend.device import PATIENCE, Device, close_code, dial, open_of, table
from tests.conftest import RunningCloud, run_cloud

EMBEDDINGS = table()


@contextmanager
def guarded(tiny: Path, folder: Path, *names: str, **limits: Any) -> Iterator[tuple[RunningCloud, Path, list[str]]]:
    """A cloud with one token for each name; its file, and the tokens."""
    path = folder / "tokens.txt"
    tokens = [add_token(path, name) for name in names]
    with run_cloud(tiny, tokens=Tokens(path), limits=Limits(**limits)) as running:
        yield running, path, tokens


def answer(url: str, opening: wire.Open) -> Any:
    """What the cloud says to an Open."""
    with dial(url) as connection:
        connection.send(wire.encode(opening))
        return wire.decode(connection.recv(PATIENCE))  # type: ignore[arg-type]


def replaced(path: Path, text: str) -> None:
    """The file with another content, in one step, as editors do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


# --- tokens that change while they are served ---


def test_a_token_that_is_added_is_accepted_without_a_restart(tiny: Path, tmp_path: Path) -> None:
    with guarded(tiny, tmp_path, "phone") as (running, path, _):
        token = add_token(path, "laptop")
        assert eventually(lambda: isinstance(answer(running.url, open_of(tiny, token=token)), wire.Opened))


def test_a_session_whose_token_is_removed_is_closed_and_the_others_go_on(tiny: Path, tmp_path: Path) -> None:
    with guarded(tiny, tmp_path, "phone", "laptop") as (running, path, (phone, laptop)):
        with (
            Device(running.url, open_of(tiny, token=phone)) as removed,
            Device(running.url, open_of(tiny, token=laptop)) as kept,
        ):
            began = time.monotonic()
            replaced(path, path.read_text().splitlines()[1])
            error = removed.receive()
            assert time.monotonic() - began < 5
            assert (error.code, error.seq, close_code(removed.socket)) == ("unauthorized", None, 1008)
            assert kept.rows(0, EMBEDDINGS[:2]).shape == (1, 320)
        assert answer(running.url, open_of(tiny, token=phone)).code == "unauthorized"


def test_a_removed_token_ends_a_session_whose_request_runs(tiny: Path, tmp_path: Path) -> None:
    with (
        guarded(tiny, tmp_path, "phone", "laptop", token_rate=1) as (running, path, (phone, _)),
        Device(running.url, open_of(tiny, token=phone)) as device,
    ):
        device.rows(0, EMBEDDINGS[:60])
        device.send(device.append(60, EMBEDDINGS[:1]))  # waits a minute for the rate
        replaced(path, path.read_text().splitlines()[1])
        assert device.receive().code == "unauthorized"


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Tokens, Path, str]:
    """Tokens of a file, the file, and one of them."""
    token = add_token(tmp_path / "tokens.txt", "phone")
    return Tokens(tmp_path / "tokens.txt"), tmp_path / "tokens.txt", token


def test_a_file_that_did_not_change_is_not_read_again(watched: tuple[Tokens, Path, str]) -> None:
    tokens, path, token = watched
    state, text = path.stat(), path.read_text()
    path.write_text(text.replace(text[7:15], "0" * 8))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # the same time, size and inode: it seems as before
    assert not tokens.look() and tokens.accept(token)
    os.utime(path)
    assert tokens.look() and not tokens.accept(token)


def test_a_file_of_the_same_size_and_time_is_read_when_it_is_another(watched: tuple[Tokens, Path, str]) -> None:
    tokens, path, token = watched
    state, text = path.stat(), path.read_text()
    new = path.with_suffix(".new")
    new.write_text(text.replace(text[7:15], "0" * 8))
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    new.rename(path)
    assert tokens.look() and not tokens.accept(token)


def broken_line(path: Path) -> None:
    replaced(path, path.read_text() + "stip_a-token-itself phone\n")


def vanished(path: Path) -> None:
    path.unlink()


def not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "named"), [(broken_line, "line 2"), (vanished, "No such"), (not_text, "not text"), (a_folder, "director")]
)
def test_a_spoilt_file_keeps_the_last_good_list_and_is_logged_once(
    watched: tuple[Tokens, Path, str], caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], named: str
) -> None:
    tokens, path, token = watched
    caplog.set_level("INFO", "stip.cloud")
    spoil(path)
    assert [tokens.look() for _ in range(3)] == [False] * 3
    assert tokens.accept(token)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and named in record.getMessage() and str(path) in record.getMessage()
    assert "stip_a" not in caplog.text and "0xff" not in caplog.text


def test_a_file_that_is_mended_counts_again(watched: tuple[Tokens, Path, str]) -> None:
    tokens, path, token = watched
    text = path.read_text()
    path.unlink()
    tokens.look()
    path.write_text(text)
    other = add_token(path, "laptop")
    assert tokens.look() and tokens.accept(token) and tokens.accept(other)


def test_an_empty_file_lets_nobody_in(watched: tuple[Tokens, Path, str]) -> None:
    tokens, path, token = watched
    digest = tokens.digest_of(token)
    assert digest is not None and tokens.known(digest)
    replaced(path, "# nobody\n")
    assert tokens.look()
    assert not tokens.accept(token) and not tokens.known(digest)


# --- sessions of a token ---


def test_a_token_has_so_many_sessions_and_no_more(tiny: Path, tmp_path: Path) -> None:
    with guarded(tiny, tmp_path, "phone", "laptop", token_sessions=2) as (running, _, (phone, laptop)):
        with Device(running.url, open_of(tiny, token=phone)), Device(running.url, open_of(tiny, token=phone)):
            refused = answer(running.url, open_of(tiny, token=phone))
            assert (refused.code, refused.retryable) == ("too_many_sessions", True)
            assert isinstance(answer(running.url, open_of(tiny, token=laptop)), wire.Opened)
        assert eventually(lambda: isinstance(answer(running.url, open_of(tiny, token=phone)), wire.Opened))


def test_a_token_that_has_all_its_sessions_can_take_one_of_them_over(tiny: Path, tmp_path: Path) -> None:
    with guarded(tiny, tmp_path, "phone", token_sessions=1) as (running, _, (phone,)):
        device = Device(running.url, open_of(tiny, token=phone))  # whose line is lost: the cloud hears nothing
        for _ in range(3):
            newer = Device(running.url, open_of(tiny, token=phone, resume=device.opened.resume))
            assert newer.opened.resume == device.opened.resume
        for secret in (None, "guess"):
            assert answer(running.url, open_of(tiny, token=phone, resume=secret)).code == "too_many_sessions"
        newer.socket.close()


def test_without_tokens_a_client_has_as_many_sessions_as_there_are(tiny: Path) -> None:
    with run_cloud(tiny, limits=Limits(token_sessions=1)) as running, ExitStack() as open_ones:
        for _ in range(3):
            open_ones.enter_context(Device(running.url, open_of(tiny)))


# --- the rate of a token ---


def test_a_token_over_its_rate_waits_and_is_answered(tiny: Path, tmp_path: Path) -> None:
    with (
        guarded(tiny, tmp_path, "phone", token_rate=100) as (running, _, (phone,)),
        Device(running.url, open_of(tiny, token=phone)) as device,
    ):
        began = time.monotonic()
        device.rows(0, EMBEDDINGS[:150])  # a second's worth is saved up, half a second's is owed
        device.rows(150, EMBEDDINGS[:1])
        assert 0.5 <= time.monotonic() - began < 5


def test_the_sessions_of_a_token_share_its_rate(tiny: Path, tmp_path: Path) -> None:
    with (
        guarded(tiny, tmp_path, "phone", token_rate=100) as (running, _, (phone,)),
        Device(running.url, open_of(tiny, token=phone)) as one,
        Device(running.url, open_of(tiny, token=phone)) as other,
    ):
        began = time.monotonic()
        one.rows(0, EMBEDDINGS[:180])
        other.rows(0, EMBEDDINGS[:1])
        assert time.monotonic() - began >= 0.8


def test_nobody_else_waits_for_a_token_that_does(tiny: Path, tmp_path: Path) -> None:
    with (
        guarded(tiny, tmp_path, "phone", "laptop", token_rate=1) as (running, _, (phone, laptop)),
        Device(running.url, open_of(tiny, token=phone)) as waiting,
        Device(running.url, open_of(tiny, token=laptop)) as other,
    ):
        waiting.rows(0, EMBEDDINGS[:100])
        waiting.send(waiting.append(100, EMBEDDINGS[:1]))
        began = time.monotonic()
        other.rows(0, EMBEDDINGS[:50])
        assert time.monotonic() - began < 10


def test_a_request_that_waits_for_the_rate_can_be_cancelled(tiny: Path, tmp_path: Path) -> None:
    with (
        guarded(tiny, tmp_path, "phone", token_rate=1) as (running, _, (phone,)),
        Device(running.url, open_of(tiny, token=phone)) as device,
    ):
        device.rows(0, EMBEDDINGS[:60])
        device.send(device.append(60, EMBEDDINGS[:1]))
        device.send(wire.Cancel(seq=2))
        error = device.receive()
        assert (error.code, error.seq) == ("cancelled", 2)


def test_without_a_rate_nothing_waits(tiny: Path, tmp_path: Path) -> None:
    with (
        guarded(tiny, tmp_path, "phone") as (running, _, (phone,)),
        Device(running.url, open_of(tiny, token=phone)) as device,
    ):
        began = time.monotonic()
        for _ in range(20):  # some 70 s at the rate of 50 that would be the least of use
            device.rows(0, EMBEDDINGS[:200])
        assert time.monotonic() - began < 20


# --- connections that say nothing ---


def knock(running: RunningCloud, source: str) -> socket.socket:
    """A connection from an address, and nothing sent."""
    host, port = running.url.removeprefix("ws://").split(":")
    return socket.create_connection((host, int(port)), PATIENCE, source_address=(source, 0))


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ended it. Waits for that, or for a page that it would send."""
    try:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return connection.recv(12) == b""
    except OSError:
        return True


def test_silent_connections_of_one_address_are_bounded_and_another_address_gets_in(tiny: Path, tmp_path: Path) -> None:
    with guarded(tiny, tmp_path, "phone", max_unopened=8) as (running, _, (phone,)), ExitStack() as silent:
        for _ in range(8):
            silent.enter_context(knock(running, "127.0.0.1"))
        with knock(running, "127.0.0.1") as one_too_many:
            assert is_closed(one_too_many)
        with Device(running.url, open_of(tiny, token=phone), sock=knock(running, "127.0.0.2")) as device:
            assert device.rows(0, EMBEDDINGS[:2]).shape == (1, 320)


def test_handshakes_without_an_open_count_too(tiny: Path, tmp_path: Path) -> None:
    with (
        guarded(tiny, tmp_path, "phone", max_unopened=2) as (running, _, _),
        dial(running.url),
        dial(running.url),
        knock(running, "127.0.0.1") as one_too_many,
    ):
        assert is_closed(one_too_many)


def test_a_connection_that_opened_or_ended_makes_room(tiny: Path, tmp_path: Path) -> None:
    with guarded(tiny, tmp_path, "phone", max_unopened=1) as (running, _, (phone,)), ExitStack() as open_ones:
        for _ in range(3):
            open_ones.enter_context(Device(running.url, open_of(tiny, token=phone)))
        knock(running, "127.0.0.1").close()
        assert eventually(lambda: answers(running.url))


def answers(url: str) -> bool:
    try:
        return get(url, "/healthz")[0] == 200
    except OSError:
        return False


def test_without_tokens_silent_connections_are_not_counted_by_address(tiny: Path) -> None:
    with run_cloud(tiny, limits=Limits(max_unopened=1)) as running, dial(running.url), dial(running.url):
        assert get(running.url, "/healthz")[0] == 200


# --- devices that do not read ---


def test_a_device_that_takes_no_reply_loses_its_connection(tiny: Path) -> None:
    with run_cloud(tiny, limits=Limits(send_seconds=0.3)) as running:
        host, port = running.url.removeprefix("ws://").split(":")
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect((host, int(port)))
        deaf = Device(running.url, open_of(tiny), sock=narrow, max_queue=1)
        asking = threading.Thread(target=ask_without_end, args=(deaf,), daemon=True)
        asking.start()
        assert eventually(lambda: not running.server._connections)
        asking.join(PATIENCE)
        assert not asking.is_alive()


def ask_without_end(device: Device) -> None:
    """Large answers are asked for and not read, until the connection ends."""
    try:
        while True:
            device.send(device.append(0, EMBEDDINGS[:8], rows=8, top_k=0))
    except Exception as error:
        assert "Closed" in type(error).__name__ or isinstance(error, OSError), error


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),  # as a socket for IPv4 and IPv6 names them
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
    ],
)
def test_one_client_takes_no_place_of_another(one: str, other: str, same: bool) -> None:
    doorstep = Doorstep(1)
    assert doorstep.enter(one) is not None
    assert (doorstep.enter(other) is None) is same
