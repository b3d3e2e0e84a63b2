"""Sockets that whoever waits for them can give up at once: while one is opened, and while the line takes nothing."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from websockets.sync.client import ClientConnection

SILENT_SECONDS = 40.0  # of a line that takes nothing of what is sent, after which it is dead; as keepalive has it


def dialled(dial: Callable[[], ClientConnection], check: Callable[[], None], poll: float) -> ClientConnection:
    """The socket that `dial` opens, or what it raises.

    It runs in a thread of its own, as names and networks take as long as they like. `check` is called every `poll`
    seconds; if it raises, the attempt is left to itself, and a socket that comes of it is closed.
    """
    attempt = _Attempt(dial)
    try:
        while not attempt.over.wait(poll):
            check()
        return attempt.opened()
    except BaseException:
        attempt.leave()
        raise


class _Attempt:
    """One opening of a socket."""

    def __init__(self, dial: Callable[[], ClientConnection]) -> None:
        self.over = threading.Event()
        self._dial = dial
        self._lock = threading.Lock()
        self._left = False
        self._socket: ClientConnection | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def opened(self) -> ClientConnection:
        if self._error is not None:
            raise self._error
        assert self._socket is not None
        return self._socket

    def leave(self) -> None:
        with self._lock:
            self._left, socket = True, self._socket
        if socket is not None:
            socket.close()

    def _run(self) -> None:
        try:
            opened = self._dial()
        except BaseException as error:  # whatever it is, it belongs to who waits
            self._error = error
        else:
            with self._lock:
                self._socket = opened
                left = self._left
            if left:
                opened.close()
        self.over.set()


def limit_silence(connection: ClientConnection) -> None:
    """Ends the connection where the other end takes nothing for so long (RFC 5482; as far as the system can).

    websockets' own keepalive cannot tell while a frame is on its way, for its pings wait behind it.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        with suppress(OSError):  # no TCP, perhaps
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENT_SECONDS * 1000))


def takes_more(connection: ClientConnection) -> bool:
    """Whether something short can be sent without waiting."""
    try:
        return bool(select.select([], [connection.socket], [], 0)[1])
    except (OSError, ValueError):  # closed
        return False


def cut(connection: ClientConnection) -> None:
    """Ends a connection at once, whatever is half way. Who sends or waits there sees it closed. For any thread."""
    with suppress(OSError):
        # Not SSLSocket's own, which first forgets that what is sent is to be encrypted.
        socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)
