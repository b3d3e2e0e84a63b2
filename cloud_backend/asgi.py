"""The cloud as an ASGI application, for servers other than its own listener: uvicorn, or a replica of Ray Serve.

    STIP_CLOUD="OUT/cloud --token-file tokens.txt" uvicorn --factory cloud_backend.asgi:application

Its lifespan loads the models, so nobody is served before they are there. At its end every session is answered and told,
where the server leaves the sockets open until then; uvicorn cuts them first, with code 1012, and devices come back. A
device's WebSocket stays with the process that took its handshake.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, MutableMapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

from websockets.frames import CloseCode

from cloud_backend.http import Answer, Pages
from cloud_backend.last_resort import answering_seconds, last_resort
from cloud_backend.limits import Limits
from cloud_backend.memory import give_back
from cloud_backend.server import CloudServer
from cloud_backend.serving import Serving, load_models, prepare
from cloud_backend.sockets import GOODBYE, LONGEST_OPEN, Closed, bearer_tokens
from cloud_backend.tasks import running
from cloud_backend.words import Options, parse
from shared.errors import StipError, UsageError
from shared.loopback import is_loopback
from shared.wire import SUBPROTOCOL

log = logging.getLogger("stip.cloud")
Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Beside = Callable[[CloudServer], Coroutine[Any, Any, None]]

VARIABLE = "STIP_CLOUD"
KEEPING = 64  # bytes that a frame in memory takes besides its own: without them empty frames would count nothing


def application(options: Options | None = None) -> Application:
    """The application for the options of `stip-cloud serve`, as words or as a mapping; see `words`.

    None: the words of the environment variable STIP_CLOUD, as a shell would split them.

    Raises UsageError for options that cannot be carried out, and BundleError for folders that are not whole.
    """
    if options is None:
        if not (words := os.environ.get(VARIABLE, "")):
            raise UsageError(f"{VARIABLE}: not set", hint=f'{VARIABLE}="OUT/cloud --token-file tokens.txt"')
        options = shlex.split(words)
    parsed = parse(options)
    return Application(prepare(parsed), parsed.origin)


class Application:
    """An ASGI 3 application that serves devices, and says how it is at /healthz, /readyz and, on loopback, /metrics.

    Like the listener it takes devices without tokens over loopback alone, and there only under a loopback name.
    """

    def __init__(self, serving: Serving, origins: Iterable[str] = (), beside: Beside | None = None) -> None:
        """origins: of browser pages that may connect. beside: runs beside the server while it serves."""
        self.server = serving.server
        self._serving = serving
        self._origins = frozenset(origins)
        self._beside = beside
        self.server.health.loading = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection, or the application's life."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await self._device(scope, receive, send)
        elif scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            await _respond(self._pages(scope).page(scope["method"], path, _headers(scope)), send, "http.response")

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        started, drain_seconds = False, self._serving.drain_seconds
        try:
            with ExitStack() as ended:
                async with self._working():
                    await send({"type": "lifespan.startup.complete"})
                    started = True
                    await receive()
                    ended.callback(last_resort(drain_seconds, 1).cancel)
                    await self.server.drain(answering_seconds(drain_seconds))
                    await self.server.farewell()
        except Exception as error:
            if started:
                raise
            # Whatever it is: a server that is not told of it may take devices, and load for ever.
            await send({"type": "lifespan.startup.failed", "message": _reported(error)})
            return
        await send({"type": "lifespan.shutdown.complete"})

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as ending:
            if self._serving.ranks is not None:
                ending.enter_context(self._serving.ranks)
            await ending.enter_async_context(self.server.working())
            await load_models(self._serving)
            await ending.enter_async_context(running("memory", give_back(self._serving.scheduler)))
            if self._beside is not None:
                await ending.enter_async_context(running("beside", self._beside(self.server)))
            self.server.health.loading = False
            yield

    async def _device(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # that it wants to connect
        if (refused := self._refused(scope)) is not None:
            return await _refuse(refused, scope, send)
        client = scope.get("client")
        leave = self.server.doorstep.enter(client and client[0])
        if leave is None:
            return await _refuse(Answer(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n"), scope, send)
        try:
            await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
            socket = ASGISocket(scope, receive, send, self.server.limits, leave)
            async with running("reader", socket.read()):
                await self.server.serve(socket)
        except OSError:  # gone before it was let in
            pass
        finally:
            leave()

    def _refused(self, scope: Scope) -> Answer | None:
        """Why a device's handshake may not go on."""
        pages = self._pages(scope)
        if (answer := pages.handshake(_headers(scope))) is not None:
            return answer
        if self.server.takes_anyone and not pages.only_loopback:
            return Answer(HTTPStatus.FORBIDDEN, "beyond loopback this server wants a token file\n")
        if SUBPROTOCOL not in scope["subprotocols"]:
            return Answer(HTTPStatus.BAD_REQUEST, f"subprotocol: wanted {SUBPROTOCOL}\n")
        return None

    def _pages(self, scope: Scope) -> Pages:
        """What is answered over this connection: it depends on the address that it came to."""
        server = self.server
        loopback = scope.get("server") is not None and is_loopback(scope["server"][0])
        return Pages(server.health, server.metrics if loopback else None, loopback, self._origins, devices=True)


class ASGISocket:
    """A Socket of an ASGI server. It reads ahead: Ray Serve would keep without end what nobody takes.

    A device may be as far ahead of its answers as its window lets it; one that is further ahead is closed.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits, leave: Callable[[], None]) -> None:
        """leave: takes it from the doorstep."""
        self.bearers = bearer_tokens(_headers(scope)("Authorization"))
        self.said_goodbye = False
        self._receive = receive
        self._send = send
        self._leave = leave
        self._most = min(LONGEST_OPEN, limits.longest_frame)
        self._most_ahead = limits.window + limits.longest_frame
        self._ahead = 0  # bytes of memory for what was read and not received
        self._frames: deque[bytes | str] = deque()
        self._came = asyncio.Event()  # a frame, or the end
        self._gone = False  # the device, or this end of it: nothing more will be read
        self._closed = False  # by this end

    async def read(self) -> None:
        """Reads until the device is gone, or too far ahead."""
        try:
            while not self._closed:
                message = await self._receive()
                if message["type"] == "websocket.disconnect":
                    self.said_goodbye = message.get("code") == GOODBYE
                    return
                frame: bytes | str = message["text"] if message.get("bytes") is None else message["bytes"]
                self._frames.append(frame)
                self._ahead += len(frame) + KEEPING
                self._came.set()
                if self._ahead > self._most_ahead:
                    await self.close(CloseCode.POLICY_VIOLATION, "further ahead than the window")
        finally:  # also where the server that brings it fails
            self._gone = True
            self._came.set()

    async def receive(self) -> bytes | str:
        """The next message. Raises Closed."""
        while not self._frames and not self._gone:
            self._came.clear()
            await self._came.wait()
        if self._closed or not self._frames:
            raise Closed
        frame = self._frames.popleft()
        self._ahead -= len(frame) + KEEPING
        if len(frame) > self._most:
            await self.close(CloseCode.MESSAGE_TOO_BIG, "")
            raise Closed
        return frame

    async def send(self, frame: bytes) -> None:
        """Sends a binary message. Raises Closed."""
        await self._say({"type": "websocket.send", "bytes": frame})

    async def close(self, code: int, reason: str) -> None:
        """Closes it."""
        with suppress(Closed):
            await self._say({"type": "websocket.close", "code": int(code), "reason": reason})
        self.abort()

    async def _say(self, message: Message) -> None:
        if self._closed or self._gone:
            raise Closed
        try:
            await self._send(message)
        except (OSError, RuntimeError):  # how ASGI servers say that the device is gone, before `read` knows of it
            self.abort()
            raise Closed from None

    def abort(self) -> None:
        """Ends it with whoever receives: ASGI knows no other way to give up a connection that takes nothing."""
        self._closed = self._gone = True
        self._frames.clear()
        self._came.set()

    def came_in(self, max_size: int) -> None:
        """A session was opened on it."""
        self._leave()
        self._most = max_size


def _reported(error: Exception) -> str:
    """Logs why a model cannot be loaded, and says it in a line."""
    if not isinstance(error, StipError):
        log.error("loading failed: %s", type(error).__name__)  # its text could quote tensors
        return f"loading failed: {type(error).__name__}"
    log.error("%s", error if error.hint is None else f"{error}; {error.hint}")
    return str(error)


def _headers(scope: Scope) -> Callable[[str], list[str]]:
    """Gives every value of a header."""
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return lambda name: [value.decode("latin-1") for key, value in headers if key == name.lower().encode()]


async def _respond(answer: Answer, send: Send, kind: str) -> None:
    body = answer.text.encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": f"{kind}.start", "status": int(answer.status), "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


async def _refuse(answer: Answer, scope: Scope, send: Send) -> None:
    """Ends a device's handshake. To a server that can only say 403, which no device tries again, it is not said of what
    passes: such a device is let in and sent away."""
    if "websocket.http.response" in (scope.get("extensions") or {}):
        await _respond(answer, send, "websocket.http.response")
    elif answer.status is HTTPStatus.SERVICE_UNAVAILABLE:
        await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL})
        await send({"type": "websocket.close", "code": int(CloseCode.TRY_AGAIN_LATER), "reason": answer.text.strip()})
    else:
        await send({"type": "websocket.close", "code": int(CloseCode.POLICY_VIOLATION)})
