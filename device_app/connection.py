"""The socket: a thin shell around a session. A lost connection is made again; the session resumes, or replays."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import urlsplit

from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from device_app.dialing import cut, dialled, limit_silence, takes_more
from device_app.opening import Opening
from shared.errors import DishonestError, RefusedError, UnreachableError, UsageError
from shared.loopback import is_loopback
from shared.wire import SUBPROTOCOL, Array, Opened

if TYPE_CHECKING:
    from device_app.encode import EncoderSession, Want
    from device_app.sampler import Row
    from device_app.session import Session

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between attempts
POLL_SECONDS = 0.1  # between looks at an interruption
NORMAL, GOING_AWAY, MESSAGE_TOO_BIG = 1000, 1001, 1009  # RFC 6455 §7.4.1

S = TypeVar("S", bound=Opening)
T = TypeVar("T")


@dataclass(frozen=True)
class Address:
    """Where the cloud is. Raises UsageError for a URL that would send embeddings in the clear over a network.

    ca: PEM file of the authority to trust instead of the system's. insecure: allow ws:// beyond loopback.
    """

    url: str
    ca: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        try:
            parse_uri(self.url)
        except (InvalidURI, ValueError):
            raise UsageError(f"url: seen {self.url!r}, wanted ws://host:port or wss://host:port") from None
        parts = urlsplit(self.url)
        if parts.scheme == "ws" and not is_loopback(parts.hostname or "") and not self.insecure:
            raise UsageError(
                f"url: seen {self.url!r}, which crosses a network unencrypted, wanted wss://",
                hint="serve with --tls-cert and --tls-key, or accept it with --insecure",
            )

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context for wss://."""
        if urlsplit(self.url).scheme != "wss":
            return None
        try:
            return ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"--ca {self.ca}: {error}", hint="give a PEM file") from None


class Connection(Generic[S]):
    """Answers a session's questions over a socket that may break."""

    def __init__(
        self,
        session: S,
        address: Address,
        *,
        retry_seconds: float = 60.0,
        on_lost: Callable[[], None] = lambda: None,
        on_frame: Callable[[str, bytes], None] = lambda way, frame: None,
    ) -> None:
        """retry_seconds: how long a lost connection is tried again; the first one fails at once.

        on_lost: called when a connection breaks. on_frame: called with 'up' or 'down' and each frame as it travels.
        """
        self.session = session
        self._address = address
        self._tls = address.tls()
        self._retry_seconds = retry_seconds
        self._on_lost = on_lost
        self._on_frame = on_frame
        self._socket: ClientConnection | None = None
        self._closing = ExitStack()  # what ends the socket
        self._was_open = False
        self._interruption: BaseException | None = None
        self._sending: tuple[ClientConnection, bytes] | None = None  # a frame, and the socket that is to take it

    def open(self) -> Opened:
        """Connects unless connected, and gives the session's limits. Raises UnreachableError, RefusedError."""
        self._until(lambda: self.session.opened is not None)
        assert self.session.opened is not None
        return self.session.opened

    def rows(
        self: Connection[Session],
        ids: Sequence[int],
        *,
        source: Sequence[int] | None = None,
        rows: int = 1,
        top_k: int,
        temperature: float = 1.0,
    ) -> list[Row]:
        """Of a decoder: the logits after each of the last `rows` of `ids`. Raises CloudError."""
        session = self.session
        return self._answer(
            lambda: session.ask(ids, source=source, rows=rows, top_k=top_k, temperature=temperature),
            lambda: session.rows,
        )

    def results(self: Connection[EncoderSession], sequences: Sequence[Array], want: Want) -> list[Array]:
        """Of an encoder: one result for each of `sequences`, plain embeddings. Raises CloudError."""
        session = self.session
        return self._answer(lambda: session.ask(sequences, want), lambda: session.results)

    def _answer(self, ask: Callable[[], None], answer: Callable[[], T | None]) -> T:
        try:
            ask()
        except KeyboardInterrupt:
            self._drop()
            raise
        self._until(lambda: answer() is not None)
        answered = answer()
        assert answered is not None
        return answered

    def interrupt(self, error: BaseException) -> None:
        """For signal handlers and other threads: who waits for the cloud raises `error`, where no frame is half way.

        A frame that the line does not take is given up with its connection.
        """
        self._interruption = error
        if (sending := self._sending) is not None:
            _soon(self._give_up, sending)

    def attend(self) -> None:
        """Forgets an interruption that nobody has noticed."""
        self._interruption = None

    def cancel(self) -> None:
        """Gives up the question that is open, if any; the cloud is told, by the line's end if it takes no more."""
        self.session.cancel()
        if self._socket is None or not self.session.outbox:
            return
        limit = _soon(cut, self._socket)
        try:
            self._send(self._socket)
        except (ConnectionClosed, OSError):
            self._drop()
        finally:
            limit.cancel()

    def close(self) -> None:
        """Ends the session. The next question, if there is one, is put to a fresh one."""
        self._drop(NORMAL)
        self.session.end()

    def _until(self, done: Callable[[], bool]) -> None:
        waited = 0.0  # for a connection, within this question: a cloud that always opens and closes is given up too
        pause = FIRST_PAUSE
        while not done():
            self._check_interrupted()
            began = time.monotonic()
            try:
                if self._socket is None:
                    self._connect()
                assert self._socket is not None
                self._send(self._socket, self._check_interrupted)
                try:
                    frame = self._socket.recv(timeout=POLL_SECONDS)
                except TimeoutError:
                    self._end_farewell(self._socket)
                    continue
                if isinstance(frame, str):
                    raise DishonestError("reply: seen text, wanted a binary frame")
                self.session.counters.bytes_down += len(frame)
                self._on_frame("down", frame)
                self._end_farewell(self._socket)
                self.session.receive(frame)
                self._was_open = self._was_open or self.session.opened is not None
            except (ConnectionClosed, OSError, InvalidHandshake, InvalidMessage, TimeoutError) as error:
                reason = self._reason(error)
                lost = self.session.opened is not None
                self._drop()
                self._check_interrupted()  # which may be what broke it
                waited += pause + (0.0 if lost else time.monotonic() - began)
                if lost:
                    self._on_lost()
                if not self._was_open or waited > self._retry_seconds:
                    raise UnreachableError(
                        f"cloud {self._address.url}: {reason}", hint="is stip-cloud running there? see --url"
                    ) from None
                self._sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            except (DishonestError, RefusedError):
                self.close()  # nothing of such a session is relied on again
                raise
            except KeyboardInterrupt:
                self._drop()  # a frame may have been between session and socket: the session finds out what arrived
                raise

    def _end_farewell(self, socket: ClientConnection) -> None:
        """Of a cloud that said it would close the connection, and did not: not even after POLL_SECONDS."""
        if self.session.farewell is not None:
            cut(socket)

    def _check_interrupted(self) -> None:
        if self._interruption is not None:
            interruption, self._interruption = self._interruption, None
            raise interruption

    def _give_up(self, sending: tuple[ClientConnection, bytes]) -> None:
        if self._sending is sending:
            cut(sending[0])

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
            self._check_interrupted()

    def _connect(self) -> None:
        try:
            socket = dialled(self._dial, self._check_interrupted, POLL_SECONDS)
            self._socket = self._closing.enter_context(socket)
            limit_silence(socket)
        except AssertionError:  # of websockets, where a server speaks before it is spoken to (SSH, SMTP)
            raise InvalidMessage("did not receive a valid HTTP response") from None
        except InvalidStatus as error:
            status = error.response.status_code
            if status >= 500:
                raise  # a proxy whose server is not back yet, say
            raise RefusedError("handshake", f"cloud {self._address.url}: answered HTTP status {status}") from None
        except (InvalidURI, ssl.SSLCertVerificationError) as error:
            raise RefusedError("handshake", f"cloud {self._address.url}: {error}", hint="see --ca") from None
        if self._socket.protocol.uri != parse_uri(self._address.url):
            # Elsewhere may be beyond loopback, in the clear; nothing but the handshake went there.
            raise RefusedError("handshake", f"cloud {self._address.url}: it redirects elsewhere")
        if self._socket.subprotocol != SUBPROTOCOL:
            # A portal may accept any WebSocket. The cloud itself would have refused another subprotocol.
            raise RefusedError("handshake", f"cloud {self._address.url}: it does not speak {SUBPROTOCOL}")
        self.session.connected()

    def _dial(self) -> ClientConnection:
        return connect(
            self._address.url,
            ssl=self._tls,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,
            max_size=self.session.longest_reply,  # anything longer is not a reply
            open_timeout=10,
            close_timeout=2,
            proxy=None if is_loopback(urlsplit(self._address.url).hostname or "") else True,
        )

    def _send(self, socket: ClientConnection, check: Callable[[], None] = lambda: None) -> None:
        try:
            while self.session.outbox:
                # In this order: an interruption from now on sees what is being sent.
                self._sending = (socket, self.session.outbox[0])
                check()
                frame = self.session.outbox.popleft()
                self.session.counters.bytes_up += len(frame)
                self._on_frame("up", frame)
                socket.send(frame)
        finally:
            self._sending = None

    def _reason(self, error: WebSocketException | OSError) -> str:
        if isinstance(error, ConnectionClosed):
            if error.sent is not None and error.sent.code == MESSAGE_TOO_BIG:
                self.close()
                raise DishonestError("reply: seen a frame longer than any reply can be") from None
            code = error.rcvd.code if error.rcvd is not None else "none"
            return f"the connection was closed ({self.session.farewell or f'code {code}'})"
        return str(getattr(error, "strerror", None) or error or type(error).__name__)

    def _drop(self, code: int = GOING_AWAY) -> None:
        """Ends the connection. Unless the code is that of a normal end, the device means to resume the session."""
        socket, self._socket = self._socket, None
        if socket is not None:
            if not takes_more(socket):  # nobody would learn why
                cut(socket)
            socket.close(code)
        self._closing.close()
        self.session.lost()


def _soon(function: Callable[[T], None], argument: T) -> threading.Timer:
    """Calls `function` after POLL_SECONDS, in a thread, unless it is cancelled."""
    timer = threading.Timer(POLL_SECONDS, function, [argument])
    timer.daemon = True
    timer.start()
    return timer
