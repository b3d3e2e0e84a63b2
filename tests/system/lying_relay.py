"""A cloud that lies: a websocket server on loopback that passes frames on to an honest one and changes what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

from shared.wire import SUBPROTOCOL, Array, Logits, Message, decode, encode

Lie = Callable[[Message], Iterable[Message]]  # what is said in place of a message
M = TypeVar("M", bound=Message)
PROTOCOLS = [Subprotocol(SUBPROTOCOL)]


@contextmanager
def lying_relay(cloud: str, lie: Lie) -> Iterator[str]:
    """Relays to the cloud at a URL; gives its own."""

    def attend(device: ServerConnection) -> None:
        with connect(cloud, subprotocols=PROTOCOLS, compression=None, max_size=None, close_timeout=1) as behind:

            def up() -> None:
                with suppress(ConnectionClosed, OSError):
                    for frame in device:
                        behind.send(frame)
                behind.close()

            threading.Thread(target=up, daemon=True).start()
            with suppress(ConnectionClosed, OSError):
                for frame in behind:
                    assert isinstance(frame, bytes)
                    for said in lie(decode(frame)):
                        device.send(encode(said))

    server = serve(attend, "127.0.0.1", 0, subprotocols=PROTOCOLS, compression=None, max_size=None, close_timeout=1)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()
        thread.join(10)


def changed(message: M, **fields: object) -> M:
    """The same message, but for these fields."""
    kept = {name: getattr(message, name) for name in message.__struct_fields__}
    return type(message)(**kept | fields)


def with_tensors(message: Logits, **tensors: Array) -> Logits:
    """The same rows, but for these of `values`, `ids` and `log_sum_exp`."""
    names = ("values", "ids", "log_sum_exp")
    return changed(message, tensors=tuple(tensors.get(name, getattr(message, name)) for name in names))
