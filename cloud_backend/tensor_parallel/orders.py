"""What the server tells the other processes that share its models, over a socket between it and each of them.

Tensors do not go this way: the processes pass them to each other in collectives.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Any, TypeVar

import msgspec

from cloud_backend.log import LogFormat
from shared.wire import FloatName

_LENGTH = struct.Struct("<I")
T = TypeVar("T")


class Join(msgspec.Struct, frozen=True):
    """Who a process is among the others, and where it meets them."""

    rank: int
    processes: int
    meeting: str  # a file that does not exist yet
    device: str
    threads: int
    log: LogFormat


class Meet(msgspec.Struct, tag=True, frozen=True):
    """Meet the others: all have started."""


class Load(msgspec.Struct, tag=True, frozen=True):
    """Load your part of the model of a folder; answered by a `Reply`."""

    folder: str
    dtype: FloatName
    device: str
    rules: dict[str, str]  # of transformers' plan
    context: int | None
    kv_bytes: int | None


class Begin(msgspec.Struct, tag=True, frozen=True):
    """All have loaded: agree on the KV memory.

    A process that has loaded waits for this, as another may load for longer than collectives wait.
    """


class Piece(msgspec.Struct, array_like=True, frozen=True):
    """New tokens of one sequence, behind its first `start` positions, and the pages that hold it."""

    pages: tuple[int, ...]
    start: int
    tokens: int


class Run(msgspec.Struct, tag=True, frozen=True):
    """Run a step of the model that was loaded as the `model`-th. Its embeddings follow by broadcast."""

    model: int
    pieces: tuple[Piece, ...]


class Classify(msgspec.Struct, tag=True, frozen=True):
    """Classify so many last hidden states, which follow by broadcast."""

    model: int
    rows: int


Order = Meet | Load | Run | Classify


class Reply(msgspec.Struct, frozen=True):
    """What a process says when it has started, and after each `Load`: what is wrong, if anything."""

    wrong: str | None = None


class Line:
    """One end of such a socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: Any) -> None:
        """Raises OSError where the other end is gone."""
        content = msgspec.msgpack.encode(message)
        self._end.sendall(_LENGTH.pack(len(content)) + content)

    def receive(self, kind: type[T] | Any) -> T:
        """The next message. Raises EOFError where the other end is gone."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        message: T = msgspec.msgpack.decode(self._read(length), type=kind)
        return message

    def _read(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            if not (more := self._end.recv(size - len(content))):
                raise EOFError("the other end is gone")
            content += more
        return bytes(content)

    def wait_for_end(self) -> None:
        """Returns when the other end is gone, whatever it has sent before."""
        waiting = select.poll()
        waiting.register(self._end, 0)  # a hang-up is always told
        waiting.poll()

    def close(self) -> None:
        self._end.close()
