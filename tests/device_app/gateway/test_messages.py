"""Messages of OpenAI's API, as the device takes them."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from device_app.gateway.errors import ApiError
from device_app.gateway.messages import assistant_messages
from device_app.gateway.openai_types import ChatRequest, parsed

PNG = b"\x89PNG of nothing"
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


def read(*messages: Any, images: bool = True) -> list[dict[str, Any]]:
    request = parsed({"model": "m", "messages": list(messages)}, ChatRequest)
    return assistant_messages(request.messages, images=images)


def image(url: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def test_roles_and_texts() -> None:
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    assert read(
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "Yes."},
    ) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One.\nTwo.", "name": "ann"},
        {"role": "assistant", "content": "Yes."},
    ]


def test_an_image_comes_as_its_bytes() -> None:
    content = [{"type": "text", "text": "What is it?"}, *image(DATA_URL)["content"]]
    [message] = read({"role": "user", "content": content})
    assert message["content"] == [{"type": "text", "text": "What is it?"}, {"type": "image", "image": PNG}]


def test_arguments_of_past_calls_are_objects_for_the_template() -> None:
    call = {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    asked, answered = read(
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "rain"},
    )
    assert asked["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"} and asked["content"] == ""
    assert answered == {"role": "tool", "content": "rain", "tool_call_id": "abc"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "narrator", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 7}, "messages[0].content"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0].type"),
        (image("https://example.com/cat.png"), "messages[0].content[0].image_url.url"),
        (image("HTTP://example.com/cat.png"), "messages[0].content[0].image_url.url"),
        (image("file:///etc/passwd"), "messages[0].content[0].image_url.url"),
        (image("cat.png"), "messages[0].content[0].image_url.url"),
        (image("data:image/png,raw"), "messages[0].content[0].image_url.url"),
        (image("data:image/png;base64,!!!"), "messages[0].content[0].image_url.url"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_place(message: Any, param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        read(message)
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_no_messages_are_refused() -> None:
    with pytest.raises(ApiError, match="messages: seen none"):
        read()


def test_an_image_for_a_model_of_text_is_refused() -> None:
    with pytest.raises(ApiError, match="this model takes no images"):
        read(image(DATA_URL), images=False)
