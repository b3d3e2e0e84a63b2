"""A line between a device and the cloud that breaks as a plan says: a TCP relay on loopback."""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

FaultKind = Literal["cut", "half-sent", "vanished", "stalled", "trickling"]
Way = Literal["up", "down"]

ENDING: tuple[FaultKind, ...] = ("cut", "half-sent", "vanished")
SLOW: tuple[FaultKind, ...] = ("stalled", "trickling")


@dataclass(frozen=True)
class Fault:
    """What happens to the line, once `after` more chunks (most often frames) have passed this way.

    cut: both ends see a reset, between two chunks. half-sent: the same in the middle of a chunk. vanished: the device
    sees a reset and the cloud nothing at all, as where a phone loses its network. stalled: nothing is read for a time.
    trickling: a chunk arrives in many small pieces.
    """

    kind: FaultKind
    way: Way
    after: int
    share: float  # of the chunk that still passes where it is half-sent
    seconds: float  # that a slow one takes


def random_faults(chance: random.Random, count: int) -> list[Fault]:
    """Faults of all kinds, a few chunks apart."""
    kinds = [*ENDING, "half-sent", "cut", *SLOW]
    return [
        Fault(
            chance.choice(kinds),  # type: ignore[arg-type]  # a kind
            chance.choice(("up", "down")),
            chance.randint(0, 10),
            chance.random(),
            chance.uniform(0.05, 0.5),
        )
        for _ in range(count)
    ]


class Line:
    """Carries bytes both ways, for one device after the other, and breaks as it is told. A context manager."""

    def __init__(self, cloud: int) -> None:
        """cloud: the server's port. Nothing breaks before `plan`."""
        self.happened: Counter[FaultKind] = Counter()
        self._cloud = ("127.0.0.1", cloud)
        self._faults: deque[Fault] = deque()
        self._passed = 0  # chunks since the last fault, in the way of the next one
        self._left_behind: list[socket.socket] = []  # the cloud's ends of devices that vanished
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for end in self._left_behind:
            end.close()

    def plan(self, faults: Iterable[Fault]) -> None:
        """What is to happen from now on, in this order."""
        self._faults.extend(faults)

    @property
    def spent(self) -> bool:
        """Whether all that was planned has happened."""
        return not self._faults

    def cut(self) -> None:
        """Cuts every connection now."""
        for device in list(self._open):
            with suppress(OSError):
                device.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                device, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(device,), daemon=True).start()

    def _carry(self, device: socket.socket) -> None:
        """Until one end closes or the plan ends it."""
        self._open.add(device)
        try:
            with device, suppress(OSError):
                cloud = socket.create_connection(self._cloud)
                try:
                    self._carry_between(device, cloud)
                finally:
                    if cloud not in self._left_behind:
                        cloud.close()
        finally:
            self._open.discard(device)

    def _carry_between(self, device: socket.socket, cloud: socket.socket) -> None:
        while True:
            for ready in select.select([device, cloud], [], [])[0]:
                way: Way = "up" if ready is device else "down"
                chunk, to = ready.recv(65536), cloud if ready is device else device
                if not chunk:
                    return
                fault = self._due(way)
                if fault is None:
                    to.sendall(chunk)
                elif fault.kind in SLOW:
                    _send_slowly(to, chunk, fault)
                else:
                    if fault.kind == "half-sent":
                        to.sendall(chunk[: max(1, min(int(fault.share * len(chunk)), len(chunk) - 1))])
                    _reset(device)
                    if fault.kind == "vanished":
                        self._left_behind.append(cloud)
                    else:
                        _reset(cloud)
                    return

    def _due(self, way: Way) -> Fault | None:
        """The fault that strikes this chunk, if any."""
        if not self._faults or self._faults[0].way != way:
            return None
        if self._passed < self._faults[0].after:
            self._passed += 1
            return None
        self._passed = 0
        fault = self._faults.popleft()
        self.happened[fault.kind] += 1
        return fault


def _send_slowly(to: socket.socket, chunk: bytes, fault: Fault) -> None:
    if fault.kind == "stalled":
        time.sleep(fault.seconds)
        to.sendall(chunk)
        return
    size = len(chunk) // 20 + 1
    for at in range(0, len(chunk), size):
        to.sendall(chunk[at : at + size])
        time.sleep(fault.seconds / 20)


def _reset(end: socket.socket) -> None:
    """Ends a connection without closing handshake or end of stream."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
