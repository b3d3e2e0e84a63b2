"""Requests as OpenAI's API has them (API reference of 2026), and how they are read.

Fields that are not named here are ignored, as OpenAI's own servers do with those of other versions. Beside them stand
`top_k`, `min_p` and `repetition_penalty`, which many local servers take.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

import msgspec
from starlette.requests import Request

from device_app.gateway.errors import ApiError

MOST_BYTES = 64 * 2**20  # of a request: a few photographs


class Options(msgspec.Struct, kw_only=True):
    """What chat completions and completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    response_format: ResponseFormat | None = None


class StreamOptions(msgspec.Struct):
    """include_usage: a last chunk without choices tells of the tokens used."""

    include_usage: bool | None = None


class JsonSchema(msgspec.Struct, kw_only=True):
    """A schema, by its name."""

    name: str | None = None
    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ImageUrl(msgspec.Struct):
    """Where an image is: here only within the URL itself."""

    url: str


class Part(msgspec.Struct, kw_only=True):
    """A part of a message's content."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


class CalledFunction(msgspec.Struct):
    """A call as the model made it; arguments: JSON text."""

    name: str
    arguments: str = "{}"


class PastCall(msgspec.Struct, kw_only=True):
    """A call of an earlier answer."""

    function: CalledFunction
    id: str = ""


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None


class OfferedFunction(msgspec.Struct, kw_only=True):
    """What a function is called, and what it takes (a JSON schema)."""

    name: str
    parameters: dict[str, Any] | None = None


class OfferedTool(msgspec.Struct, kw_only=True):
    """A tool that the model may call; only functions are known."""

    type: str
    function: OfferedFunction | None = None


class ChatRequest(Options, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None


class CompletionRequest(Options, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings."""

    model: str
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


T = TypeVar("T")


async def read(request: Request, kind: type[T]) -> T:
    """The body of a request. Raises ApiError: 413 where it is too long, 400 naming the field that is not as wanted."""
    return parsed(await body(request), kind)


async def body(request: Request) -> bytes:
    """The bytes of a request, at most 64 MiB. Raises ApiError (413)."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > MOST_BYTES:
        raise _too_long()
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BYTES:
            raise _too_long()
    return bytes(content)


def _too_long() -> ApiError:
    return ApiError(413, f"request: wanted at most {MOST_BYTES} bytes", code="request_too_large")


def parsed(content: bytes | dict[str, Any], kind: type[T], at: str = "") -> T:
    """JSON, as text or read already, as a value of `kind`. at: where in the request it stood."""
    try:
        if isinstance(content, dict):
            return msgspec.convert(content, kind)
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at ")
        param = at + re.sub(r"^\$\.?", "." if at else "", place.strip("`"))
        missing = re.search(r"missing required field `(\w+)`", message)
        if missing:
            param = f"{param}.{missing[1]}" if param else missing[1]
        raise ApiError(400, f"{param or 'request'}: {message}", param=param or None, code="invalid_value") from None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ApiError(400, "request: wanted JSON", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "request: its JSON is nested too deep", code="invalid_json") from None
