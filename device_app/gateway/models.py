"""`GET /v1/models`: what is served."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from device_app.gateway.errors import json_response
from device_app.gateway.serving import Gateway, ServedModel


def routes(gateway: Gateway) -> list[Route]:
    """The list, and each model by itself."""

    async def every(request: Request) -> Response:
        return json_response({"object": "list", "data": [_model(served) for served in gateway.models.values()]})

    async def one(request: Request) -> Response:
        return json_response(_model(gateway.model(request.path_params["name"])))

    return [Route("/v1/models", every), Route("/v1/models/{name:path}", one)]


def _model(served: ServedModel) -> dict[str, Any]:
    manifest = served.bundle.manifest
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "stip",
        "stip": {
            "kind": manifest.kind,
            "scheme": manifest.scheme,
            "context": manifest.context,
            "chat": served.bundle.template is not None,
        },
    }
