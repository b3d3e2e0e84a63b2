"""Errors in OpenAI's shape, {"error": {"message", "type", "param", "code"}}, which its clients map to their classes."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import msgspec
from starlette.responses import Response

from shared.errors import BundleError, Cancelled, CloudError, RefusedError, StipError, UnreachableError, UsageError

log = logging.getLogger("stip.gateway")

RETRY_SECONDS = 5
BUSY = ("too_many_sessions", "shutting_down", "idle")  # of the cloud: later it may answer
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    502: "cloud_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that is not answered, as its sender is told. `retry_after`: seconds, where it may be sent again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer, with its status."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return json_response(self.body(), status=self.status, headers=headers)


def json_response(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` as JSON."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def log_failure(what: str, error: BaseException) -> None:
    """Logs that something failed. The error's text may quote a request: its kind and its place are told alone."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    log.error("%s failed: %s at %s:%s", what, type(error).__name__, Path(place.filename).name, place.lineno)


def refused_value(param: str, seen: str, wanted: str) -> ApiError:
    """A value of a request's field that cannot be served."""
    return ApiError(400, f"{param}: seen {seen}, wanted {wanted}", param=param, code="unsupported_value")


def api_error(error: StipError) -> ApiError:
    """What the sender of a request is told of an error of ours: whose fault it is, and whether to try again."""
    message = str(error) + (f" ({error.hint})" if error.hint else "")
    if isinstance(error, RefusedError) and error.code == "context_full":
        return ApiError(400, message, param="messages", code="context_length_exceeded")
    if isinstance(error, UnreachableError):
        return ApiError(503, message, code="cloud_unreachable", retry_after=RETRY_SECONDS)
    if isinstance(error, RefusedError) and error.code in BUSY:
        return ApiError(503, message, code=f"cloud_{error.code}", retry_after=RETRY_SECONDS)
    if isinstance(error, Cancelled):
        return ApiError(503, message, code="cancelled")
    if isinstance(error, CloudError):
        return ApiError(502, message, code=f"cloud_{getattr(error, 'code', 'dishonest')}")
    # Bundles are checked when they are opened: what a chat template refuses later are the roles and their order.
    if isinstance(error, (UsageError, BundleError)):
        return ApiError(400, message)
    return ApiError(500, message)
