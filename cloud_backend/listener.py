"""Listeners and the tasks beside them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve

from shared.errors import UsageError

log = logging.getLogger("stip.cloud")
Handler = Callable[[ServerConnection], Awaitable[None]]


@asynccontextmanager
async def running(name: str, work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """A task beside the block, which ends with it."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def _report(task: asyncio.Task[None]) -> None:
    """Says that a task failed at once, not when someone asks for its result."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("%s ended: %s", task.get_name(), type(error).__name__)


async def listen(option: str, handler: Handler, host: str, port: int, **options: Any) -> Server:
    """A listener at an address. Raises UsageError, which names the option of the port, where it cannot be had."""
    try:
        return await serve(
            handler,
            host,
            port,
            compression=None,  # floats hardly shrink, and it costs 100 times the transfer
            close_timeout=2,
            server_header=None,
            **options,
        )
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}", hint=f"is it in use? try {option}"
        ) from None


async def nobody(socket: ServerConnection) -> None:
    """Where no websockets are taken."""


def url(scheme: str, host: str, listener: Server) -> str:
    """Where a listener can be reached."""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.sockets[0].getsockname()[1]}"
