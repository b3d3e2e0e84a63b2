"""The least of a device: sends any bytes, believes nothing, and never tries again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from cloud_backend.decoder import DecoderEngine
from cloud_backend.engine import AppendWork, LogitRows
from shared import wire
from shared.manifest import CloudManifest, read_manifest

PATIENCE = 20.0  # seconds; longer is a hang


def open_of(export: Path, **fields: Any) -> wire.Open:
    """The Open for an exported OUT folder."""
    manifest = read_manifest(export / "cloud", CloudManifest)
    return wire.Open(model=manifest.served_name, key_id=manifest.key_id, **fields)


def dial(url: str, **options: Any) -> ClientConnection:
    """A connection with the subprotocol and nothing sent on it, as a context manager."""
    options = {"subprotocols": [Subprotocol(wire.SUBPROTOCOL)], "compression": None, "max_size": None} | options
    return connect(url, open_timeout=PATIENCE, close_timeout=PATIENCE, ping_interval=None, proxy=None, **options)


class Device:
    """A connection that was opened for one exported model, as a context manager."""

    def __init__(self, url: str, opening: wire.Open, **options: Any) -> None:
        self.socket = dial(url, **options).__enter__()
        self.seq = 0
        self.opened = self.ask(opening)
        assert isinstance(self.opened, wire.Opened), self.opened

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def ask(self, message: wire.Message | bytes | str) -> Any:
        self.send(message)
        return self.receive()

    def send(self, message: wire.Message | bytes | str) -> None:
        self.socket.send(wire.encode(message) if isinstance(message, wire.Message) else message)

    def receive(self) -> Any:
        frame = self.socket.recv(PATIENCE)
        assert isinstance(frame, bytes)
        return wire.decode(frame)

    def append(self, keep: int, embeddings: np.ndarray, **fields: Any) -> wire.Append:
        """The next Append, not sent yet."""
        self.seq += 1
        return wire.Append(seq=self.seq, keep=keep, tensors=(embeddings,), **fields)

    def encode(self, embeddings: np.ndarray, lengths: Sequence[int], **fields: Any) -> wire.Encode:
        """The next Encode, not sent yet."""
        self.seq += 1
        return wire.Encode(seq=self.seq, lengths=tuple(lengths), tensors=(embeddings,), **fields)

    def rows(self, keep: int, embeddings: np.ndarray, **fields: Any) -> np.ndarray:
        """Full rows for the last embedding (or `rows` of them), from an Append that must succeed."""
        reply = self.ask(self.append(keep, embeddings, **({"top_k": 0} | fields)))
        assert isinstance(reply, wire.Logits), reply
        return reply.values


def encode(device: Device, sequences: Sequence[np.ndarray], want: str) -> Any:
    """The reply to one Encode of these sequences."""
    return device.ask(device.encode(np.concatenate(sequences), [len(rows) for rows in sequences], want=want))


def close(seen: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
    """Asserts that arrays are equal, up to a share of the largest value."""
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def close_code(socket: ClientConnection) -> int | None:
    """Reads to the end, and gives the code with which the server closed."""
    try:
        while True:
            socket.recv(PATIENCE)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


def table(seed: int = 0, vocab: int = 320, width: int = 48) -> np.ndarray:
    """Embeddings for ids to decode with."""
    return np.random.default_rng(seed).normal(size=(vocab, width)).astype(np.float32)


def decode_greedily(step: Callable[[int, np.ndarray], np.ndarray], count: int, *, first: int = 7) -> list[np.ndarray]:
    """Rows of logits, each for the likeliest id of the row before. `step` takes keep and an embedding."""
    embeddings, rows, chosen = table(), [], first
    for keep in range(count):
        rows.append(step(keep, embeddings[chosen : chosen + 1])[0])
        chosen = int(rows[-1].argmax())
    return rows


def engine_step(engine: DecoderEngine) -> Callable[[int, np.ndarray], np.ndarray]:
    """A step of decode_greedily in this process, on a cache of its own."""
    cache = engine.new_cache()

    def step(keep: int, embeddings: np.ndarray) -> np.ndarray:
        (result,) = engine.run([AppendWork(cache, keep, embeddings, 1, "logits", 0, 1.0, engine.dtype)])
        assert isinstance(result, LogitRows)
        return result.values

    return step
