"""Lines that hang: whoever waits for one can give up at once, and one that takes nothing for long is dead."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from device_app import dialing
from device_app.connection import Address, Connection
from device_app.session import Session
from shared.errors import Cancelled, UnreachableError
from shared.key import UserKey
from shared.wire import SUBPROTOCOL, Array, encode
from tests.device_app.honest_cloud import opened

WIDE, VOCAB = 4096, 1000
KEY = UserKey("0f" * 16, np.arange(WIDE), np.arange(VOCAB))
AT_ONCE = 0.5  # seconds


def embed(ids: Sequence[int], start: int = 0) -> Array:
    return np.zeros((len(ids), WIDE), np.float32)


def wide_connection(url: str, **options: float) -> Connection[Session]:
    """Of a model whose prompts are longer than what the buffers of a line take."""
    session = Session(KEY, embed, served_name="tiny", context=2000)
    return Connection(session, Address(url), **options)  # type: ignore[arg-type]


@contextmanager
def deaf_cloud() -> Iterator[str]:
    """Opens a session, and reads nothing from then on."""
    over = threading.Event()

    def attend(peer: ServerConnection) -> None:
        with suppress(ConnectionClosed, OSError):
            peer.recv()
            fields = {"hidden_size": WIDE, "vocab_size": VOCAB, "context": 2000}
            peer.send(encode(opened(**fields, max_frame=2**20, window=2**30)))
            over.wait(30)

    subprotocols: list[str] = [SUBPROTOCOL]
    server = serve(attend, "127.0.0.1", 0, subprotocols=subprotocols, compression=None, max_queue=1, close_timeout=0)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        over.set()
        server.shutdown()
        thread.join(10)


@contextmanager
def silent_listener() -> Iterator[str]:
    """Takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}"


def interrupted(connection: Connection[Session], after: float = 0.5) -> float:
    """Asks, interrupts, and says how long it took until that was noticed and the question was given up."""
    began = [0.0]

    def interrupt() -> None:
        began[0] = time.monotonic()
        connection.interrupt(Cancelled("stopped"))

    threading.Timer(after, interrupt).start()
    with pytest.raises(Cancelled):
        connection.rows(range(2000), top_k=5)  # 32 MB
    connection.cancel()
    return time.monotonic() - began[0]


def test_a_cloud_that_does_not_answer_the_handshake_is_given_up_at_once() -> None:
    with silent_listener() as url:
        assert interrupted(wide_connection(url)) < AT_ONCE


def test_a_line_that_takes_nothing_is_given_up_at_once() -> None:
    with deaf_cloud() as url:
        assert interrupted(wide_connection(url)) < AT_ONCE


def test_a_question_is_given_up_at_once_though_the_cloud_cannot_be_told() -> None:
    with deaf_cloud() as url:
        connection = wide_connection(url)
        connection.open()
        connection.session.ask(range(2000), top_k=5)
        began = time.monotonic()
        connection.cancel()
        assert time.monotonic() - began < AT_ONCE


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such limit")
def test_a_line_that_takes_nothing_for_long_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "SILENT_SECONDS", 0.5)
    with deaf_cloud() as url:
        connection, began = wide_connection(url, retry_seconds=0), time.monotonic()
        with pytest.raises(UnreachableError):
            connection.rows(range(2000), top_k=5)
        assert time.monotonic() - began < 10
