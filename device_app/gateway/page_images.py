"""Images as the page sends them and the history keeps them: data URLs (RFC 2397), in parts as in OpenAI's API."""

from __future__ import annotations

from typing import Any

from device_app.gateway.messages import image_bytes
from device_app.history import Content

MOST_IMAGES = 8  # of one question


def image_urls(content: Content) -> list[str]:
    """The data URLs in a message. No other URL gets into the page, which would load it."""
    urls = [] if isinstance(content, str) else [_url(part) for part in content if "image_url" in part]
    return [url for url in urls if url.startswith("data:image/")]


def with_files(content: Content) -> Content:
    """A message's content as the prompt takes it: files in the place of URLs. Raises ApiError for any but data URLs."""
    if isinstance(content, str):
        return content
    return [
        {"type": "image", "image": image_bytes(_url(part), "images")}
        if "image_url" in part
        else {"type": "text", "text": str(part.get("text", ""))}
        for part in content
    ]


def joined(first: Content, second: Content) -> Content:
    """Two messages in a row of one role as one, which more chat templates take."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_parts(first), *_parts(second)]


def _parts(content: Content) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _url(part: dict[str, Any]) -> str:
    given = part["image_url"]
    return str(given.get("url", "")) if isinstance(given, dict) else ""
