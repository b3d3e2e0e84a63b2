"""A line to the cloud that goes through tunnels: a TCP relay on loopback that is dark for a while, again and again."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Dark:
    """A stretch without network.

    silent: nothing is told to either end, and what was on its way arrives late, as where packets are only lost; else
    connections break and no new one can be made.
    """

    after: float  # seconds from the end of the one before
    seconds: float
    silent: bool


def tunnels(chance: random.Random, cuts: int, silent: int, seconds: float, longest: float) -> list[Dark]:
    """So many that break connections, one of them for `longest` seconds, and silent ones; a third of it is dark."""
    shares = [chance.uniform(0.3, 1.0) for _ in range(cuts + silent - 1)]
    lengths = [max(0.0, seconds / 3 - longest) * share / sum(shares) for share in shares]
    stretches = [(longest, False), *((length, number < silent) for number, length in enumerate(lengths))]
    chance.shuffle(stretches)
    gaps = [chance.uniform(0.5, 1.5) for _ in stretches]
    light = (seconds - longest - sum(lengths)) / sum(gaps)
    return [Dark(light * gap, length, quiet) for gap, (length, quiet) in zip(gaps, stretches, strict=True)]


class Tunnel:
    """Carries bytes both ways. A context manager."""

    def __init__(self, port: int) -> None:
        """port: the cloud's on loopback."""
        self.port = port  # may be changed: new connections lead there
        self._open: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._refusing = False
        self.broken = 0  # connections that a dark stretch ended
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._break()

    def pass_through(self, darks: Sequence[Dark]) -> None:
        """One stretch after the other; returns behind the last one."""
        for dark in darks:
            time.sleep(dark.after)
            self.enter(silent=dark.silent)
            time.sleep(dark.seconds)
            self.leave()

    def enter(self, *, silent: bool = False) -> None:
        """It is dark from now on."""
        if silent:
            self._flowing.clear()
        else:
            self._refusing = True
            self.broken += self._break()

    def leave(self) -> None:
        """It is light again."""
        self._refusing = False
        self._flowing.set()

    def _break(self) -> int:
        """Ends every connection, and gives how many."""
        ends = list(self._open)
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return len(ends) // 2

    def _accept(self) -> None:
        with suppress(OSError):  # of the listener, when it is closed
            while True:
                device, _ = self._listener.accept()
                if self._refusing or (cloud := _connected(self.port)) is None:
                    device.close()
                    continue
                self._open |= {device, cloud}
                for source, to in ((device, cloud), (cloud, device)):
                    threading.Thread(target=self._carry, args=(source, to), daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(65536):
                self._flowing.wait()
                to.sendall(chunk)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()


def _connected(port: int) -> socket.socket | None:
    try:
        return socket.create_connection(("127.0.0.1", port))
    except OSError:  # nobody listens there now
        return None
