"""The socket: where it may lead, and what a cloud can do to it: vanish, come back, stall, flood, lie."""

from __future__ import annotations

import math
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from device_app.connection import Address, Connection
from device_app.counters import Counters
from device_app.drafting import Drafting
from device_app.sampler import Sampling
from shared.errors import CloudError, DishonestError, RefusedError, UnreachableError, UsageError
from shared.wire import SUBPROTOCOL, Append, Cancel, Error, Open, decode, encode
from tests.conftest import open_assistant, run_cloud
from tests.device_app.honest_cloud import HonestCloud, new_session, opened, plain_logits

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` gives or raises; a failure, and not a test that hangs, where it takes too long."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"not over after {seconds} s"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


# --- addresses ---


@pytest.mark.parametrize(
    "url",
    [
        "ws://127.0.0.1:8765",
        "ws://127.3.2.1",
        "ws://localhost:8765/path",
        "ws://LOCALHOST",
        "WS://localhost",
        "ws://[::1]:8765",
        "wss://example.com",
        "wss://10.0.0.1:8765",
    ],
)
def test_loopback_and_tls_are_allowed(url: str) -> None:
    Address(url)


@pytest.mark.parametrize(
    "url",
    [
        "ws://10.0.0.1:8765",
        "ws://192.168.1.5",
        "ws://example.com",
        "ws://0.0.0.0:8765",
        "ws://[::]:8765",
        "ws://[fe80::1]",
        "ws://localhost.example.com",
        "ws://127.0.0.1.example.com",
        "ws://localhost:80@example.com",
        "ws://2130706433.example.com",
        "WS://example.com",
    ],
)
def test_plain_ws_beyond_this_machine_needs_insecure(url: str) -> None:
    with pytest.raises(UsageError, match="unencrypted, wanted wss") as raised:
        Address(url)
    assert raised.value.hint and "--insecure" in raised.value.hint
    Address(url, insecure=True)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8765",
        "ftp://127.0.0.1",
        "http://127.0.0.1:8765",
        "https://example.com",
        "ws://",
        "ws://:8765",
        "ws:127.0.0.1",
        "file:///etc/passwd",
        "ws://[::1",
        "ws://127.0.0.1:port",
        "ws://127.0.0.1:99999",
        "ws://127.0.0.1:-1",
        "ws://127.0.0.1/#fragment",
        "wss://user@example.com",
    ],
)
@pytest.mark.parametrize("insecure", [True, False])
def test_what_is_no_address_of_a_cloud_is_refused(url: str, insecure: bool) -> None:
    with pytest.raises(UsageError, match=r"^url: seen .* wanted ws://host:port"):
        Address(url, insecure=insecure)


@pytest.mark.parametrize("scheme", ["wss", "WSS"])
def test_an_authority_that_cannot_be_read_is_refused_before_anything_is_sent(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for path in (tmp_path / "missing.pem", tmp_path / "empty.pem"):
        with pytest.raises(UsageError, match=r"^--ca .*pem"):
            Address(f"{scheme}://example.com", path).tls()


def test_plain_ws_has_no_tls() -> None:
    assert Address("ws://localhost").tls() is None


# --- clouds that are not there ---


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_nothing_listening_fails_at_once_with_a_hint() -> None:
    url = f"ws://127.0.0.1:{free_port()}"
    connection = Connection(new_session(), Address(url))  # it would try a lost connection for a minute
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=url) as raised:
        within(10, connection.open)
    assert time.monotonic() - started < 2
    assert raised.value.hint and "stip-cloud" in raised.value.hint


@contextmanager
def tcp_server(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server of bare TCP on loopback; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    threading.Thread(target=attend, args=(peer,), daemon=True).start()

        def attend(peer: socket.socket) -> None:
            with peer, suppress(OSError):
                handle(peer)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def http(status: str, *headers: str) -> Callable[[socket.socket], None]:
    """Answers any request with one status."""

    def handle(peer: socket.socket) -> None:
        peer.recv(65536)
        peer.sendall("\r\n".join((f"HTTP/1.1 {status}", *headers, "Content-Length: 0", "", "")).encode("latin-1"))

    return handle


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", "200 OK"])
def test_a_web_server_that_is_no_cloud_is_named_with_its_status(status: str) -> None:
    with tcp_server(http(status)) as port:
        connection = Connection(new_session(), Address(f"ws://127.0.0.1:{port}"))
        with pytest.raises(RefusedError, match=status[:3]) as raised:
            within(10, connection.open)
    assert raised.value.code == "handshake"


@pytest.mark.parametrize(
    "handle",
    [
        lambda peer: None,
        lambda peer: peer.sendall(b"SSH-2.0-OpenSSH_9.9\r\n"),
        lambda peer: peer.sendall(bytes(1000)),
        lambda peer: peer.sendall(b"HTTP/1.1 101 " + b"x" * 20_000),
        http("101 Switching Protocols", "Upgrade: \x1b[31m", "Connection: \x9b2J"),
        http("101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Accept: lie"),
    ],
    ids=["closes", "SSH", "zeros", "endless line", "control characters", "wrong accept"],
)
def test_what_does_not_speak_websocket_is_unreachable(handle: Callable[[socket.socket], None]) -> None:
    with tcp_server(handle) as port:
        connection = Connection(new_session(), Address(f"ws://127.0.0.1:{port}"))
        with pytest.raises(UnreachableError) as raised:
            within(20, connection.open)
    assert str(raised.value).isprintable()


def test_a_cloud_cannot_redirect_the_device_elsewhere() -> None:
    reached = threading.Event()

    def handle(peer: ServerConnection) -> None:
        peer.recv()
        reached.set()

    with (
        lying_cloud(handle) as elsewhere,
        tcp_server(http("302 Found", f"Location: {elsewhere}")) as port,
    ):
        connection = Connection(new_session(), Address(f"ws://127.0.0.1:{port}"))
        with pytest.raises(CloudError):
            within(10, connection.open)
        assert not reached.wait(0.2), "Open, and the token in it, went elsewhere"


# --- clouds that lie ---


@contextmanager
def lying_cloud(
    handle: Callable[[ServerConnection], None], subprotocols: Sequence[str] | None = (SUBPROTOCOL,)
) -> Iterator[str]:
    """A websocket server that treats each connection as `handle` says, and then closes it; gives its URL."""

    def attend(peer: ServerConnection) -> None:
        with suppress(ConnectionClosed, OSError):
            handle(peer)

    server: Server = serve(attend, "127.0.0.1", 0, subprotocols=subprotocols, compression=None)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()
        thread.join(10)


def answered(peer: ServerConnection, cloud: HonestCloud, answers: int) -> Append:
    """Opens a session and gives `answers` honest answers; then the request that is still owed one."""
    peer.recv()
    peer.send(encode(cloud.opened))
    while True:
        frame = peer.recv()
        assert isinstance(frame, bytes)
        cloud.receive(frame)
        if not answers:
            return cloud.appends[-1]
        if not isinstance(decode(frame), Cancel):
            peer.send(encode(cloud.reply()))
            answers -= 1


def asked(url: str, questions: int = 3, **options: float) -> Connection:
    """A connection that has put some questions, each an id longer."""
    connection = Connection(new_session(), Address(url), **{"retry_seconds": 1.0} | options)  # type: ignore[arg-type]
    for length in range(1, questions + 1):
        connection.rows(list(range(length)), top_k=5)
    return connection


def endless_frame(peer: ServerConnection, sent: list[int]) -> None:
    raw = peer.socket
    raw.sendall(b"\x82\x7f" + struct.pack(">Q", 2**62))  # one binary frame of 4 EiB
    while True:
        sent[0] += raw.send(bytes(65536))


def endless_fragments(peer: ServerConnection, sent: list[int]) -> None:
    raw = peer.socket
    raw.sendall(b"\x02\x7d" + bytes(125))
    fragment = b"\x00\x7e" + struct.pack(">H", 4096) + bytes(4096)
    while True:
        sent[0] += raw.send(fragment)


def large_frame(peer: ServerConnection, sent: list[int]) -> None:
    raw = peer.socket
    raw.sendall(b"\x82\x7f" + struct.pack(">Q", 100_000_000))
    while sent[0] < 100_000_000:
        sent[0] += raw.send(bytes(65536))


@pytest.mark.parametrize("flood", [endless_frame, endless_fragments, large_frame])
def test_a_frame_longer_than_any_reply_is_refused_before_it_is_held(
    flood: Callable[[ServerConnection, list[int]], None],
) -> None:
    sent, over = [0], threading.Event()

    def handle(peer: ServerConnection) -> None:
        answered(peer, HonestCloud(), 1)
        try:
            flood(peer, sent)
        finally:
            over.set()

    with lying_cloud(handle) as url:
        with pytest.raises(DishonestError, match="longer than any reply"):
            within(10, lambda: asked(url))
        assert over.wait(5), "the device still listens"
    assert sent[0] < 20_000_000  # what fits the buffers of two sockets


def test_text_in_place_of_a_binary_frame_is_refused() -> None:
    def handle(peer: ServerConnection) -> None:
        answered(peer, HonestCloud(), 1)
        peer.send("\x1b[2J")
        peer.recv()

    with lying_cloud(handle) as url, pytest.raises(DishonestError, match="text"):
        within(10, lambda: asked(url))


def test_after_a_lie_the_connection_is_closed() -> None:
    closed = threading.Event()

    def handle(peer: ServerConnection) -> None:
        answered(peer, HonestCloud(), 1)
        peer.send(b"garbage")
        try:
            peer.recv()
        except ConnectionClosed:
            closed.set()

    with lying_cloud(handle) as url:
        with pytest.raises(DishonestError):
            within(10, lambda: asked(url))
        assert closed.wait(5), "the device keeps a socket to a cloud that lies"


def test_after_a_refusal_the_connection_is_closed_and_the_next_one_is_fresh() -> None:
    closed, connections = threading.Event(), []

    def handle(peer: ServerConnection) -> None:
        connections.append(peer)
        if len(connections) > 1:
            answered(peer, HonestCloud(), 100)
        append = answered(peer, HonestCloud(), 1)
        peer.send(encode(Error(code="internal", message="no", seq=append.seq, kv_length=1)))
        try:
            peer.recv()
        except ConnectionClosed:
            closed.set()

    def ask() -> None:
        connection = Connection(new_session(), Address(url))
        connection.rows([1], top_k=5)
        with pytest.raises(RefusedError, match="internal: no"):
            connection.rows([1, 2], top_k=5)
        assert closed.wait(5), "the cloud's session is left open"
        [row] = connection.rows([1, 2, 3], top_k=5)
        assert row.values.max() == plain_logits([1, 2, 3]).max()

    with lying_cloud(handle) as url:
        within(20, ask)


@pytest.mark.parametrize(
    ("subprotocols", "reason"), [(["mqtt"], "HTTP status 400"), (None, "it does not speak")], ids=["other", "any"]
)
def test_a_server_of_another_protocol_is_refused(subprotocols: list[str] | None, reason: str) -> None:
    with lying_cloud(lambda peer: None, subprotocols) as url, pytest.raises(RefusedError, match=reason) as raised:
        within(10, lambda: asked(url))
    assert raised.value.code == "handshake"  # whoever knows that the cloud was there may ask again


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_a_cloud_that_closes_in_the_middle_of_every_question_is_given_up(answers: int) -> None:
    connections = []

    def handle(peer: ServerConnection) -> None:
        connections.append(peer)
        answered(peer, HonestCloud(), answers)

    with lying_cloud(handle) as url:
        connection = Connection(new_session(), Address(url), retry_seconds=1.0)
        started = time.monotonic()
        with pytest.raises(UnreachableError, match="closed"):
            within(15, lambda: connection.rows(range(10), top_k=5))  # in three frames
        assert time.monotonic() - started < 8
    assert 2 <= len(connections) < 30


def test_a_cloud_that_never_opens_the_session_is_given_up() -> None:
    with lying_cloud(lambda peer: None) as url, pytest.raises(UnreachableError):
        within(10, lambda: asked(url))


def test_a_cloud_that_went_away_for_good_is_given_up_after_the_time_to_retry() -> None:
    lost = []

    def ask() -> None:
        connection = Connection(
            new_session(), Address(url), retry_seconds=1.0, on_lost=lambda: lost.append(time.monotonic())
        )
        connection.rows([1], top_k=5)
        stop()
        connection.rows([1, 2], top_k=5)

    manager = lying_cloud(lambda peer: void(answered(peer, HonestCloud(), 1)))
    url = manager.__enter__()

    def stop() -> None:
        manager.__exit__(None, None, None)

    with pytest.raises(UnreachableError) as raised:
        within(15, ask)
    assert len(lost) == 1 and time.monotonic() - lost[0] < 4
    assert raised.value.hint


def void(_: object) -> None:
    """Makes a handler of an expression."""


# --- interrupts ---


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_an_interrupt_between_two_steps_leaves_the_next_answer_right(way: str, at: int) -> None:
    """Ctrl-C strikes anywhere: here between a frame's leaving the session and the socket, or the other way round."""
    seen: list[str] = []

    def strike(direction: str, frame: bytes) -> None:
        seen.append(direction)
        if direction == way and seen.count(way) == at:
            raise KeyboardInterrupt

    def handle(peer: ServerConnection) -> None:
        answered(peer, HonestCloud(), 100)

    def ask() -> None:
        connection = Connection(new_session(), Address(url), on_frame=strike)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(5):
                connection.rows(range(10), top_k=5)  # three frames, then one a time
        connection.cancel()
        [row] = connection.rows([1, 2, 3], top_k=5)
        assert row.values.max() == plain_logits([1, 2, 3]).max()

    with lying_cloud(handle) as url:
        within(10, ask)


# --- a real server behind a line that is cut ---


class CuttingLine:
    """A TCP proxy that drops its first connections, each after so many bytes from the server."""

    def __init__(self, url: str, cuts: list[int]) -> None:
        self._target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._cuts = iter(cuts)
        self.connections = 0

    def carry(self, device: socket.socket) -> None:
        """Carries bytes both ways until the line is cut or closed."""
        self.connections += 1
        left = next(self._cuts, math.inf)
        with socket.create_connection(self._target) as cloud:
            while left:
                for ready in select.select([device, cloud], [], [])[0]:
                    data = ready.recv(int(min(left, 65536)) if ready is cloud else 65536)
                    if not data:
                        return
                    (device if ready is cloud else cloud).sendall(data)
                    left -= len(data) if ready is cloud else 0
        # Reset: no closing handshake, no end of stream.
        device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=4)], ids=["greedy", "drawn"]
)
def test_an_answer_over_a_line_that_is_cut_again_and_again_is_that_of_an_undisturbed_run(
    tiny: Path, sampling: Sampling
) -> None:
    lost: list[None] = []
    with run_cloud(tiny) as cloud:
        with open_assistant(tiny, cloud.url) as assistant:
            undisturbed = assistant.complete("the cat sat", sampling=sampling, max_tokens=40).finish()
        # In the middle of an answer, of a frame, of the handshake, of Opened.
        line = CuttingLine(cloud.url, [9000, 20_001, 100, 7000, 300, 12_345])
        with tcp_server(line.carry) as port:
            # Without drafts, whose number is a matter of time, the line is cut at the same places each time.
            options = {"on_lost": lambda: lost.append(None), "drafting": Drafting(most=0)}
            assistant = open_assistant(tiny, f"ws://127.0.0.1:{port}", **options)
            answer = within(30, assistant.complete("the cat sat", sampling=sampling, max_tokens=40).finish)
            counters = answer.stats.counters
            assistant.close()
    assert answer.ids == undisturbed.ids and answer.text == undisturbed.text
    assert line.connections == 7
    assert (counters.resumes, counters.replays) == (4, 0)  # the other two held nothing yet
    assert 4 <= len(lost) <= 6


def test_a_line_that_is_cut_between_answers_is_made_again(tiny: Path) -> None:
    with run_cloud(tiny) as cloud:
        line = CuttingLine(cloud.url, [9000])
        with tcp_server(line.carry) as port, open_assistant(tiny, f"ws://127.0.0.1:{port}") as assistant:
            whole = within(20, assistant.complete("the cat", max_tokens=12).finish)
            again = within(20, assistant.complete("the cat", max_tokens=12).finish)
    assert whole.ids == again.ids
    assert line.connections == 2


# --- figures ---


def test_bytes_are_counted_as_they_travel() -> None:
    travelled = {"up": 0, "down": 0}

    def count(way: str, frame: bytes) -> None:
        travelled[way] += len(frame)

    def ask() -> Counters:
        connection = Connection(new_session(), Address(url), on_frame=count)
        for length in range(1, 5):
            connection.rows(range(length), top_k=5)
        connection.close()
        return connection.session.counters

    with lying_cloud(lambda peer: void(answered(peer, HonestCloud(), 100))) as url:
        counters = within(10, ask)
    assert (counters.bytes_up, counters.bytes_down) == (travelled["up"], travelled["down"])
    assert counters.bytes_up > 4 * 32 and counters.bytes_down > 4 * 40
    assert (counters.round_trips, counters.replays) == (4, 0)


def test_a_session_is_closed_properly() -> None:
    codes: list[int | None] = []

    def handle(peer: ServerConnection) -> None:
        try:
            answered(peer, HonestCloud(), 100)
        finally:
            codes.append(peer.close_code)

    with lying_cloud(handle) as url:
        within(10, lambda: asked(url).close())
        deadline = time.monotonic() + 5
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
    assert codes == [1000]


@pytest.mark.parametrize(
    ("end", "code", "resumed"),
    [
        ("interrupt", 1001, True),
        ("cut", None, True),
        ("lie", 1000, False),
        ("refusal", 1000, False),
        ("close", 1000, False),
    ],
)
def test_a_session_is_resumed_unless_it_was_ended(end: str, code: int | None, resumed: bool) -> None:
    """The next connection asks for the session that the last one had, where nobody meant to end it."""
    secrets: list[str | None] = []
    codes: list[int | None] = []
    closed = threading.Event()
    ways: list[str] = []

    def handle(peer: ServerConnection) -> None:
        cloud = HonestCloud()
        opening = decode(peer.recv())  # type: ignore[arg-type]
        assert isinstance(opening, Open)
        secrets.append(opening.resume)
        peer.send(encode(cloud.opened))
        try:
            for message in peer:
                cloud.receive(message)  # type: ignore[arg-type]
                if len(secrets) == 1 and len(cloud.appends) == 2:
                    if end == "cut":
                        peer.socket.shutdown(socket.SHUT_RDWR)
                    elif end == "lie":
                        peer.send(b"garbage")
                    elif end == "refusal":
                        peer.send(encode(Error(code="internal", message="", seq=cloud.appends[-1].seq)))
                if cloud.waiting:
                    peer.send(encode(cloud.reply()))
        finally:
            codes.append(peer.protocol.close_rcvd and peer.protocol.close_rcvd.code)
            closed.set()

    def strike(way: str, frame: bytes) -> None:
        ways.append(way)
        if end == "interrupt" and ways.count("up") == 3:
            raise KeyboardInterrupt

    def ask() -> None:
        connection = Connection(new_session(), Address(url), retry_seconds=5.0, on_frame=strike)
        connection.rows([1], top_k=5)
        with suppress(KeyboardInterrupt, CloudError):
            connection.rows([1, 2], top_k=5)
        if end == "close":
            connection.close()
        assert closed.wait(5), "the first connection is left open"
        [row] = connection.rows([1, 2, 3], top_k=5)
        assert row.values.max() == plain_logits([1, 2, 3]).max()

    with lying_cloud(handle) as url:
        within(20, ask)
    assert secrets == [None, "r" if resumed else None]
    assert codes[0] == code


def test_the_limits_are_those_that_the_cloud_said() -> None:
    with lying_cloud(lambda peer: void(answered(peer, HonestCloud(context=33), 1))) as url:
        assert within(10, Connection(new_session(), Address(url)).open) == opened(context=33)
