"""Messages as OpenAI's API has them, as `Assistant` takes them. The device fetches nothing: images come with them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import msgspec

from device_app.gateway.errors import refused_value
from device_app.gateway.openai_types import ChatMessage, Part, PastCall

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def assistant_messages(messages: Sequence[ChatMessage], *, images: bool) -> list[dict[str, Any]]:
    """The same conversation. images: whether the model takes any. Raises ApiError (400) naming what does not fit."""
    if not messages:
        raise refused_value("messages", "none", "at least one")
    return [_message(message, f"messages[{at}]", images) for at, message in enumerate(messages)]


def _message(message: ChatMessage, at: str, images: bool) -> dict[str, Any]:
    if message.role not in ROLES:
        raise refused_value(f"{at}.role", repr(message.role[:40]), f"one of {', '.join(ROLES)}")
    if message.content is None and not message.tool_calls:
        raise refused_value(f"{at}.content", "none", "text, or a list of parts")
    shown: dict[str, Any] = {"role": ROLES[message.role], "content": _content(message.content, at, images)}
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        shown["tool_calls"] = [
            _past_call(call, f"{at}.tool_calls[{number}]") for number, call in enumerate(message.tool_calls)
        ]
    return shown


def _content(content: str | list[Part] | None, at: str, images: bool) -> str | list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [_part(part, f"{at}.content[{number}]", images) for number, part in enumerate(content)]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def _part(part: Part, at: str, images: bool) -> dict[str, Any]:
    if part.type == "text" and part.text is not None:
        return {"type": "text", "text": part.text}
    if part.type == "image_url" and part.image_url is not None:
        if not images:
            raise refused_value(at, "an image", "text, as this model takes no images")
        return {"type": "image", "image": image_bytes(part.image_url.url, f"{at}.image_url.url")}
    raise refused_value(f"{at}.type", repr(part.type[:40]), "text with text, or image_url with image_url")


def image_bytes(url: str, at: str) -> bytes:
    """The file in a data: URL (RFC 2397), base64. Raises ApiError (400); no other URL is followed."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        raise refused_value(
            at, f"a URL of the scheme {scheme[:20]!r}" if rest else "no URL", "a data: URL: this device fetches nothing"
        )
    kind, comma, data = rest.partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        raise refused_value(at, "a data: URL of another form", "data:image/…;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise refused_value(at, "characters that are not base64", "data:image/…;base64,…") from None


def _past_call(call: PastCall, at: str) -> dict[str, Any]:
    """Templates write arguments as JSON themselves, so they take them as an object."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise refused_value(f"{at}.function.arguments", "no JSON object", "one, as text") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
