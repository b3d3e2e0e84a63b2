"""The web page's files, as they lie beside the code."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from device_app.gateway.errors import ApiError

PAGE = (Path(__file__).parent.parent / "page").resolve()
TYPES = {  # said here, as a machine's own table may say otherwise and browsers are told not to guess
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}


def routes() -> list[Route]:
    """`/` and `/static/…`."""

    async def index(request: Request) -> Response:
        return _file("index.html")

    async def file(request: Request) -> Response:
        return _file(request.path_params["name"])

    return [Route("/", index), Route("/static/{name:path}", file)]


def _file(name: str) -> Response:
    if "\0" in name:
        raise _missing()
    path = (PAGE / name).resolve()
    kind = TYPES.get(path.suffix)
    if not path.is_relative_to(PAGE) or kind is None or not path.is_file():
        raise _missing()
    return FileResponse(path, media_type=kind)


def _missing() -> ApiError:
    return ApiError(404, "there is no such page", code="not_found")
