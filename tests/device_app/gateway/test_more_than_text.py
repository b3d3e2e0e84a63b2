"""Tools, images and vectors, through the official `openai` package, on tiny models."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from device_app.encoder import Encoder
from device_app.template import ChatTemplate
from tests.conftest import RunningCloud, open_assistant, run_cloud
from tests.device_app.gateway.asking import FRANCE, client_of
from tests.device_app.gateway.gateways import run_gateway

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }}{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|end|>\n{% endfor %}<|start|>assistant\n"
)


def test_a_forced_call_comes_with_arguments_of_its_schema(tiny: Path, tiny_cloud: RunningCloud) -> None:
    def with_tools(bundle: Any) -> Any:
        return dataclasses.replace(bundle, template=ChatTemplate(TOOL_TEMPLATE, {}))

    question: Any = [{"role": "user", "content": "rain?"}]
    asked: Any = {"model": "llama", "messages": question, "tools": [WEATHER], "tool_choice": "required"}
    with run_gateway(tiny, cloud=tiny_cloud.url, change=with_tools) as running, client_of(running) as client:
        [choice] = client.chat.completions.create(**asked).choices
        streamed = list(client.chat.completions.create(**asked, stream=True))
        assert choice.message.tool_calls is not None
        past = choice.message.model_dump(exclude_none=True)
        result: Any = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "rain"}
        free = client.chat.completions.create(
            model="llama", messages=[*question, past, result], tools=[WEATHER], max_tokens=5
        )
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
    deltas = [chunk.choices[0].delta for chunk in streamed if chunk.choices]
    [[again]] = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert again.function is not None and again.function.name == "weather" and again.index == 0
    assert not any(delta.content for delta in deltas)
    assert free.choices[0].finish_reason in ("length", "stop")  # a free answer, of random weights


def test_tools_are_refused_where_the_template_has_no_place_for_them(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no place for them") as refusal:
        client.chat.completions.create(model="llama", messages=FRANCE, tools=[WEATHER])
    assert refusal.value.param == "tools"


def test_an_image_in_a_message_is_looked_at(tiny_exports: Callable[[str], Path]) -> None:
    export = tiny_exports("llava")
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    with run_cloud(export) as cloud:
        with open_assistant(export, cloud.url) as assistant:
            parts = [{"type": "image", "image": file.getvalue()}, content[1]]
            expected = assistant.chat([{"role": "user", "content": parts}], max_tokens=8).finish().text
        with run_gateway(export, cloud=cloud.url) as running, client_of(running) as client:
            asked: Any = {"model": "llava", "max_tokens": 8, "temperature": 0}
            answer = client.chat.completions.create(messages=[{"role": "user", "content": content}], **asked)
            again = client.chat.completions.create(messages=[{"role": "user", "content": content}], **asked)
            with pytest.raises(openai.BadRequestError, match="100 images take") as too_many:
                client.chat.completions.create(messages=[{"role": "user", "content": content[:1] * 100}], **asked)
            content[0]["image_url"]["url"] = "https://example.com/cat.png"
            with pytest.raises(openai.BadRequestError, match="this device fetches nothing") as refusal:
                client.chat.completions.create(messages=[{"role": "user", "content": content}], **asked)
            content[0]["image_url"]["url"] = "data:image/png;base64,AAAA"
            with pytest.raises(openai.BadRequestError, match="image: it is no image"):
                client.chat.completions.create(messages=[{"role": "user", "content": content}], **asked)
    assert answer.choices[0].message.content == expected
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert refusal.value.param == "messages[0].content[0].image_url.url"
    assert too_many.value.code == "context_length_exceeded"


def test_vectors_are_those_of_the_encoder(tiny_exports: Callable[[str], Path]) -> None:
    export, texts = tiny_exports("bert"), ["rain", "then all of them went home together", "a dog"]
    with run_cloud(export) as cloud:
        with Encoder.open(export / "device", cloud.url) as encoder:
            expected = encoder.embed(texts)
        with run_gateway(export, cloud=cloud.url) as running, client_of(running) as client:
            answer = client.embeddings.create(model="bert", input=texts)  # as base64, unless another form is asked for
            plain = client.embeddings.create(model="bert", input="rain", encoding_format="float")
            for wrong, param in (("", "input"), ([], "input"), ([1, 2], "input"), ("rain " * 500, "input")):
                with pytest.raises(openai.BadRequestError) as refusal:
                    client.embeddings.create(model="bert", input=wrong)
                assert refusal.value.param == param
            with pytest.raises(openai.BadRequestError, match="wanted a decoder"):
                client.chat.completions.create(model="bert", messages=FRANCE)
    assert np.abs(np.array([one.embedding for one in answer.data]) - expected).max() < 1e-6
    assert np.abs(np.array(plain.data[0].embedding) - expected[0]).max() < 1e-6
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > plain.usage.prompt_tokens > 0
