"""The ASGI application: routes, and what becomes of errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from device_app.gateway import chat_completions, completions, embeddings, models, page_api, static
from device_app.gateway.errors import ApiError, api_error
from device_app.gateway.guard import Guard, Hosts
from device_app.gateway.serving import Gateway
from shared.errors import StipError


def application(gateway: Gateway, *, hosts: Hosts, key: str) -> ASGIApp:
    """The gateway as an ASGI application. Its sessions and its history are closed when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        gateway.cancel_all()
        await asyncio.to_thread(gateway.close)

    routes = [
        *chat_completions.routes(gateway),
        *completions.routes(gateway),
        *embeddings.routes(gateway),
        *models.routes(gateway),
        *page_api.routes(gateway),
        *static.routes(),
    ]
    handlers = {ApiError: _api_error, StipError: _stip_error, HTTPException: _http_error, Exception: _failure}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)  # type: ignore[arg-type]
    app.router.redirect_slashes = False
    return Guard(app, hosts=hosts, key=key)


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _stip_error(request: Request, error: StipError) -> Response:
    return api_error(error).response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method}: there is no such page" if error.status_code == 404 else error.detail
    return ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None).response()


async def _failure(request: Request, error: Exception) -> Response:
    return ApiError(500, "the gateway failed; its log says where").response()
