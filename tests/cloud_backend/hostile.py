"""Clients that mean harm, as a program of their own: python -m tests.cloud_backend.hostile KIND URL

The Open to begin with comes from stdin, as the bytes of its frame. Writes a line once all of it attacks, and goes on
until it is killed. It imports little, so that it starts at once.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from shared import wire

SESSIONS = 4  # of the kinds that do not try to have as many as they can
ADDRESS = "127.0.0.2"  # all of loopback is this machine's; the honest come from 127.0.0.1
Attack = Callable[[str, bytes], None]  # on a URL, with the frame of an Open; it never ends
begun = threading.Semaphore(0)  # released by each attack once it does harm


def dial(url: str, *, narrow: bool = False) -> ClientConnection:
    """A connection of this client's address. narrow: that has hardly any room for what comes."""
    end = socket.socket()
    if narrow:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    end.bind((ADDRESS, 0))
    end.settimeout(10)
    parts = urlsplit(url)
    end.connect((parts.hostname, parts.port))
    return connect(
        url,
        sock=end,
        subprotocols=[Subprotocol(wire.SUBPROTOCOL)],
        compression=None,
        max_queue=1 if narrow else 16,
        ping_interval=None,
        close_timeout=0.1,
        proxy=None,
    )


def opened(url: str, opening: bytes, *, narrow: bool = False) -> tuple[ClientConnection, wire.Opened]:
    """A session. Raises ConnectionError where there is none to have."""
    connection = dial(url, narrow=narrow)
    connection.send(opening)
    reply = wire.decode(connection.recv(10))  # type: ignore[arg-type]
    if not isinstance(reply, wire.Opened):
        raise ConnectionError(str(reply))
    return connection, reply


def append(seq: int, opened: wire.Opened, count: int, **fields: int) -> bytes:
    """A frame of an Append of `count` embeddings."""
    embeddings = np.ones((count, opened.hidden_size), np.float32)
    return wire.encode(wire.Append(seq=seq, keep=0, tensors=(embeddings,), **fields))  # type: ignore[arg-type]


def deaf(url: str, opening: bytes) -> None:
    """Asks for the largest answers and never reads one."""
    connection, limits = opened(url, opening, narrow=True)
    for seq in range(10**9):
        connection.send(append(seq, limits, 8, rows=8, top_k=0))
        if seq == 50:
            begun.release()


def beyond_the_window(url: str, opening: bytes) -> None:
    """Sends right Appends as fast as it can, and waits for no answer."""
    connection, limits = opened(url, opening)
    threading.Thread(target=_drain, args=(connection,), daemon=True).start()
    for seq in range(10**9):
        connection.send(append(seq, limits, limits.context - 1))
        if seq == 50:
            begun.release()


def large_frames(url: str, opening: bytes) -> None:
    """Sends frames larger than the server takes, but not so large that it closes."""
    connection, limits = opened(url, opening)
    threading.Thread(target=_drain, args=(connection,), daemon=True).start()
    count = int(1.9 * limits.max_frame) // (4 * limits.hidden_size)
    for seq in range(10**9):
        connection.send(append(seq, limits, count))
        if seq == 2:
            begun.release()


def unfinished_frames(url: str, opening: bytes) -> None:
    """Keeps connections on each of which all but the last byte of a large frame was sent, in place of an Open."""
    connection, limits = opened(url, opening)
    connection.close()
    size = 2 * limits.max_frame - 1
    frame = b"\x82\xff" + size.to_bytes(8, "big") + bytes(4) + bytes(size - 1)  # RFC 6455 §5.2: final, binary, masked

    def another() -> ClientConnection:
        connection = dial(url)
        connection.socket.sendall(frame)
        return connection

    _keep_every_one(another)


def garbage(url: str, opening: bytes) -> None:
    """Bytes that mean nothing: in place of a handshake, of an Open, and of a request."""
    parts = urlsplit(url)
    for number in range(10**9):
        with suppress(OSError, WebSocketException):
            if number % 3 == 0:
                with socket.create_connection((parts.hostname, parts.port), source_address=(ADDRESS, 0)) as bare:
                    bare.sendall(os.urandom(5000))
            else:
                with dial(url) if number % 3 == 1 else opened(url, opening)[0] as connection:
                    connection.send(os.urandom(5000))
                    connection.recv(10)
        if number == 10:
            begun.release()


def endless_sessions(url: str, opening: bytes) -> None:
    """Opens sessions and keeps every one."""
    _keep_every_one(lambda: opened(url, opening)[0])


def endless_connections(url: str, opening: bytes) -> None:
    """Opens connections, says nothing on them, and keeps every one."""
    _keep_every_one(lambda: dial(url))


def come_and_go(url: str, opening: bytes) -> None:
    """Fills session after session and cuts the line, so that the server keeps each one for a while."""
    for number in range(10**9):
        with suppress(OSError, WebSocketException):
            connection, limits = opened(url, opening)
            connection.send(append(1, limits, limits.context - 1))
            connection.recv(10)
            connection.socket.shutdown(socket.SHUT_RDWR)
        if number == 10:
            begun.release()


def _keep_every_one(another: Callable[[], ClientConnection]) -> None:
    kept = []
    for number in range(10**9):
        with suppress(OSError, WebSocketException):
            kept.append(another())
        if number == 100:
            begun.release()


def _drain(connection: ClientConnection) -> None:
    with suppress(ConnectionClosed):
        for _ in connection:
            pass


# By name: how many at once.
ATTACKS: dict[str, tuple[Attack, int]] = {
    attack.__name__: (attack, count)
    for attack, count in (
        (deaf, SESSIONS),
        (beyond_the_window, SESSIONS),
        (large_frames, SESSIONS),
        (unfinished_frames, 1),
        (garbage, 2),
        (endless_sessions, 1),
        (endless_connections, 1),
        (come_and_go, 1),
    )
}


def main() -> None:
    os.nice(10)  # it stands for another machine: the server should not have to share its processor with it
    attack, count = ATTACKS[sys.argv[1]]
    opening = sys.stdin.buffer.read()
    for _ in range(count):
        threading.Thread(target=attack, args=(sys.argv[2], opening), daemon=True).start()
    for _ in range(count):
        begun.acquire()
    print("attacking", flush=True)
    threading.Event().wait()  # until it is killed


if __name__ == "__main__":
    main()
