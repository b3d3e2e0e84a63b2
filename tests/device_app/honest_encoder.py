"""An encoder's cloud without a model, and any honest cloud behind a real socket. It keeps PROTOCOL.md to the letter."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from device_app.encode import EncoderSession, Want
from shared.key import UserKey
from shared.wire import SUBPROTOCOL, Array, Cancel, Encode, Encoded, Error, ErrorCode, Message, Open, decode, encode
from tests.device_app.bundles import CLASSES, CONTEXT
from tests.device_app.honest_cloud import HIDDEN, HonestCloud, opened

COUNT = len(CLASSES.vocab)  # type: ignore[arg-type]


def plain_result(embeddings: Array, want: Want) -> Array:
    """Of one sequence [n, HIDDEN]: [n, HIDDEN], [HIDDEN] or [COUNT]. Every row depends on all, and on its place."""
    places = np.arange(len(embeddings), dtype=np.float32)[:, None]
    hidden = (embeddings - embeddings.mean(0)) * (1 + places) + embeddings.std() + np.cos(embeddings)
    if want == "hidden":
        return hidden.astype(np.float32)
    return (hidden[0] * 2 if want == "pooled" else np.cos(hidden.sum(0))[:COUNT] * 4).astype(np.float32)


class HonestEncoder:
    """Takes what a session has to say, and answers one request a `step`."""

    def __init__(self, key: UserKey = CLASSES, **fields: object) -> None:
        self.opened = opened(**{"vocab_size": COUNT, "context": CONTEXT, "max_frame": 1 << 20} | fields)
        self.encodes: list[Encode] = []  # all that came
        self.failures: list[ErrorCode] = []  # codes for the next requests, which it then does not carry out
        self._key = key
        self._waiting: deque[tuple[Encode, int]] = deque()
        self._cancelled: set[int] = set()
        self._in_flight = 0

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self._waiting)

    def connect(self, session: EncoderSession) -> None:
        """A fresh connection."""
        session.connected()
        self._waiting.clear()
        self._cancelled.clear()
        self._in_flight = 0
        assert isinstance(decode(session.outbox.popleft()), Open)
        session.receive(encode(self.opened))
        self.take(session)

    def take(self, session: EncoderSession) -> None:
        """Takes all frames from the session's outbox."""
        while session.outbox:
            self.receive(session.outbox.popleft())

    def receive(self, frame: bytes) -> None:
        """Takes one frame of a device that keeps the limits."""
        message = decode(frame)
        if isinstance(message, Cancel):
            self._cancelled |= {request.seq for request, _ in self._waiting if request.seq >= message.seq}
            return
        assert isinstance(message, Encode)
        assert len(frame) <= self.opened.max_frame and max(message.lengths) <= self.opened.context
        assert message.embeddings.shape[1] == HIDDEN and message.embeddings.dtype.name == self.opened.dtype
        self._in_flight += len(frame)
        assert self._in_flight <= self.opened.window
        self.encodes.append(message)
        self._waiting.append((message, len(frame)))

    def reply(self) -> Message:
        """Works on the oldest request and gives the answer to it."""
        request, size = self._waiting.popleft()
        self._in_flight -= size
        if request.seq in self._cancelled:
            return Error(code="cancelled", message="", seq=request.seq)
        if self.failures:
            return Error(code=self.failures.pop(0), message="because", seq=request.seq)
        plain = self._key.reveal_hidden(request.embeddings.astype(np.float32))
        parts = np.split(plain, np.cumsum(request.lengths)[:-1])
        results = [plain_result(part, request.want) for part in parts]  # type: ignore[arg-type]
        if request.want == "logits":
            permuted = np.stack(results)[:, self._key.vocab]
        else:
            permuted = self._key.hide(np.concatenate(results) if request.want == "hidden" else np.stack(results))
        return Encoded(seq=request.seq, kv_length=0, compute_us=3, tensors=(permuted.astype(request.embeddings.dtype),))

    def step(self, session: EncoderSession) -> None:
        """Answers one request, and takes what the session says to that."""
        session.receive(encode(self.reply()))
        self.take(session)

    def settle(self, session: EncoderSession) -> None:
        """Answers until the session has its results."""
        self.take(session)
        while session.results is None:
            assert self._waiting, "the session waits, but has asked for nothing"
            self.step(session)


@contextmanager
def serving(
    new_cloud: Callable[[], HonestCloud | HonestEncoder], *, answers: int | None = None
) -> Iterator[tuple[str, list[HonestCloud | HonestEncoder]]]:
    """A fresh cloud for each connection, on loopback: its URL, and the clouds so far.

    answers: how many the first connection gives before it is cut.
    """
    clouds: list[HonestCloud | HonestEncoder] = []

    def handle(peer: ServerConnection) -> None:
        cloud = new_cloud()
        clouds.append(cloud)
        left = answers if len(clouds) == 1 else None
        with suppress(ConnectionClosed):
            peer.recv()
            peer.send(encode(cloud.opened))
            while True:
                cloud.receive(peer.recv())  # type: ignore[arg-type]
                while cloud.waiting:
                    if left == 0:
                        peer.socket.close()
                        return
                    peer.send(encode(cloud.reply()))
                    left = None if left is None else left - 1

    with serve(handle, "127.0.0.1", 0, subprotocols=[SUBPROTOCOL], compression=None, max_size=None) as server:  # type: ignore[list-item]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", clouds
        finally:
            server.shutdown()
            thread.join(10)
