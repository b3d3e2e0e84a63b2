"""Answers that end when their reader goes: server-sent events, and plain ones that take long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from device_app.gateway.errors import ApiError, api_error
from shared.errors import StipError

R = TypeVar("R")
DONE = b"data: [DONE]\n\n"


class ReaderLeftError(Exception):
    """Whoever asked has closed the connection."""


async def while_read(receive: Receive, work: Coroutine[Any, Any, R]) -> R:
    """What `work` gives; it is cancelled as soon as the reader goes. The request's body must have been read.

    Raises ReaderLeftError then.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ReaderLeftError
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answered(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` makes, unless its reader goes first."""
    try:
        return await while_read(request.receive, work)
    except ReaderLeftError:
        return Response(status_code=499)  # nobody reads it


class EventStream(Response):
    """Objects as server-sent events, then `[DONE]`.

    The first event is waited for before anything is sent, so that what fails until then has its own status. What fails
    later is an event too: an object with `error`, behind which nothing comes.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ReaderLeftError):
            await while_read(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            begun = False
            try:
                async for event in events:
                    if not begun:
                        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                        await send(start)
                        begun = True
                    await send(_body(_event(event)))
            except (ApiError, StipError) as error:
                if not begun:
                    raise
                await send(
                    _body(_event((error if isinstance(error, ApiError) else api_error(error)).body()), more=False)
                )
                return
            await send(_body(DONE, more=False))


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _body(content: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}
