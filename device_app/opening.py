"""What the device's sessions have in common, without I/O: a session is opened, refused, lost, and opened again.

`Session` asks a decoder, `EncoderSession` an encoder; `Connection` runs either over a socket.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from device_app.counters import Counters
from shared.errors import DishonestError, RefusedError, WireError
from shared.key import UserKey
from shared.wire import DTYPES, Error, Message, Open, Opened, decode, encode

MOST_REPLANS = 5  # times in a row that the cloud may lose track of one question
HEADER = 1024  # bytes of a frame that are kept free for its header
REPLY_HEADER = 2**16  # the same of a reply
OPEN_AGAIN = ("shutting_down", "idle", "too_many_sessions")  # the connection ends; a new one may help
TRY_AGAIN = ("out_of_step", "window_exceeded", "cancelled")  # the request failed; the same may succeed later


@dataclass(frozen=True)
class Widths:
    """What the cloud must say of the encoder that a decoder reads; all 0 where it reads none."""

    encoder_size: int = 0
    encoder_context: int = 0
    image_tokens: int = 0


NO_ENCODER = Widths()


class Opening(ABC):
    """A session up to its first request. `outbox` holds frames to send, in order; `opened` what the cloud said.

    `opened.context` is the smaller of the cloud's and the bundle's, which differ where the cloud's model could take
    more than it was made for. The device's table of positions ends with the bundle's, whatever a cloud says.
    """

    def __init__(
        self,
        key: UserKey,
        widths: Widths,
        *,
        served_name: str,
        context: int,
        token: str | None,
        counters: Counters | None,
    ) -> None:
        self.counters = counters or Counters()
        self.outbox: deque[bytes] = deque()
        self.opened: Opened | None = None
        self.farewell: str | None = None  # why the cloud is about to close the connection
        self._key = key
        self._widths = widths
        self._served_name = served_name
        self._context = context
        self._token = token
        self._seq = 0
        self._resume: str | None = None  # secret of the session that the next connection takes over
        self._planned = False  # whether the question's pieces were worked out
        self._replans = 0  # times in a row that the question was planned anew, and no more of it was done

    @property
    @abstractmethod
    def longest_reply(self) -> int:
        """Bytes of the longest frame that an honest cloud can send."""

    def connected(self) -> None:
        """A fresh connection is there: opens the session on it, or takes over the one that the last connection had."""
        self.lost()
        self.farewell = None
        opening = Open(
            model=self._served_name, key_id=self._key.key_id, dtype="auto", token=self._token, resume=self._resume
        )
        self.outbox.append(encode(opening))

    def lost(self) -> None:
        """The connection is gone. What the cloud still holds, the next Opened says."""
        self.opened = None
        self.outbox.clear()
        self._seq = 0
        self._planned = False

    def end(self) -> None:
        """The session is over: the next connection opens another one, which holds nothing."""
        self.lost()
        self._resume = None

    @abstractmethod
    def cancel(self) -> None:
        """Gives the question up; what the cloud has not started of it is dropped."""

    def receive(self, frame: bytes) -> None:
        """Takes one frame of the cloud's. Raises DishonestError for what cannot be true, RefusedError for a refusal."""
        try:
            with self.counters.timed("decode"):
                message = decode(frame)
        except WireError as error:
            raise DishonestError(f"reply: {error}") from None
        if isinstance(message, Opened):
            self._open(message)
        elif not isinstance(message, Error):
            self._reply(message)
        elif message.seq is not None:
            self._failed(message)
        elif message.code in OPEN_AGAIN:
            self.farewell = quoted(message)  # the connection closes; whoever runs it opens another
        else:
            raise RefusedError(message.code, f"the cloud refused the session: {quoted(message)}", hint=_hint(message))

    def _open(self, message: Opened) -> None:
        seen = (message.hidden_size, message.vocab_size)
        wanted = (self._key.hidden_size, self._key.vocab_size)
        if self.opened is not None or seen != wanted:
            raise DishonestError(f"Opened: seen widths {seen}, wanted {wanted}, once a connection")
        encoder = Widths(message.encoder_size, message.encoder_context, message.image_tokens)
        if encoder != self._widths:
            raise DishonestError(f"Opened: seen an encoder of {encoder}, wanted the bundle's {self._widths}")
        if message.max_frame < HEADER + 4 * message.hidden_size:
            raise DishonestError(f"Opened: a frame of {message.max_frame} bytes holds no embedding")
        if message.kv_length > self._longest_held:
            seen_length, most = message.kv_length, self._longest_held
            raise DishonestError(f"Opened: seen a KV length of {seen_length}, wanted at most {most}")
        self._take_over(message)
        self.opened = msgspec.structs.replace(message, context=min(message.context, self._context))
        self._plan()

    @property
    def _longest_held(self) -> int:
        """The greatest KV length that a cloud can honestly say it still has."""
        return 0

    @abstractmethod
    def _take_over(self, message: Opened) -> None:
        """Takes what the cloud still holds of the last connection, and counts whether anything is to be sent again."""

    def _plan_again(self, message: Error) -> None:
        """A request of the question failed: its pieces are to be worked out anew.

        Raises RefusedError for a failure that would come again, DishonestError where it comes too often.
        """
        if message.code not in TRY_AGAIN:
            raise refused(message)
        if self._planned:
            self._planned = False
            self._replans += 1
        if self._replans > MOST_REPLANS:
            raise DishonestError(f"the cloud lost its place {self._replans} times: {quoted(message)}")

    @abstractmethod
    def _plan(self) -> None:
        """Sends what the question needs, if there is one."""

    @abstractmethod
    def _reply(self, message: Message) -> None:
        """Takes the answer to a request."""

    @abstractmethod
    def _failed(self, message: Error) -> None:
        """Takes the failure of one request."""

    def _dtype(self) -> np.dtype[np.generic]:
        """That of embeddings and results."""
        assert self.opened is not None
        return DTYPES[self.opened.dtype]

    def _vectors_of_frame(self, width: int) -> int:
        """How many vectors a frame takes."""
        assert self.opened is not None
        return (self.opened.max_frame - HEADER) // (width * self._dtype().itemsize)

    def _fits(self, name: str, vectors: int, width: int) -> None:
        """Raises RefusedError where so many vectors, which cannot be cut, are more than a frame takes."""
        assert self.opened is not None
        if vectors > self._vectors_of_frame(width):
            size = HEADER + vectors * width * self._dtype().itemsize
            raise RefusedError(
                "too_large",
                f"{name}: it takes a frame of {size} bytes, the cloud takes {self.opened.max_frame}",
                hint=f"let the cloud take longer frames: stip-cloud serve --max-frame {size}",
            )


class _Numbered(Protocol):
    @property
    def seq(self) -> int: ...


F = TypeVar("F", bound=_Numbered)


def oldest(flights: deque[F], seq: int | None) -> F:
    """The oldest request, which a reply to `seq` must be for. Raises DishonestError."""
    if not flights or flights[0].seq != seq:
        wanted = f"seq {flights[0].seq}" if flights else "none, as nothing was asked"
        raise DishonestError(f"reply: seen seq {seq}, wanted {wanted}")
    return flights[0]


def refused(message: Error) -> RefusedError:
    """The error of a request that the cloud will not carry out."""
    return RefusedError(message.code, f"the cloud refused a request: {quoted(message)}", hint=_hint(message))


def quoted(message: Error) -> str:
    """Code and text of an error. The text is the cloud's: printable characters only."""
    return f"{message.code}: " + "".join(character for character in message.message[:300] if character.isprintable())


def _hint(message: Error) -> str | None:
    return {
        "unauthorized": "give the token with --token-file or STIP_TOKEN",
        "unknown_model": "is this bundle's cloud folder the one that is served? see served_name in both manifests",
        "wrong_key": "the cloud serves another export of this model; use the two halves of one export",
        "context_full": "shorten the prompt",
    }.get(message.code)
