"""What the gateway cannot serve, as the classes of the official `openai` package."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from device_app.bundle import Bundle
from device_app.template import ChatTemplate
from tests.device_app.gateway.asking import FRANCE, client_of
from tests.device_app.gateway.gateways import RunningGateway, run_gateway


def test_a_wrong_key_is_an_authentication_error(tiny_gateway: RunningGateway) -> None:
    with client_of(tiny_gateway, api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize("header", [{"Origin": "https://evil.example"}, {"Host": "evil.example"}])
def test_a_foreign_page_is_denied(header: dict[str, str], tiny_gateway: RunningGateway) -> None:
    with client_of(tiny_gateway, default_headers=header) as page, pytest.raises(openai.PermissionDeniedError):
        page.chat.completions.create(model="llama", messages=FRANCE)


def test_a_model_that_is_not_served_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="wanted one of llama") as refusal:
        client.chat.completions.create(model="gpt-4o", messages=FRANCE)
    assert refusal.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 1000}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "cat"}}}},
            "response_format",
        ),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_a_value_that_cannot_be_served_is_a_bad_request_that_names_it(
    options: Any, param: str, stream: bool, client: OpenAI
) -> None:
    asked = {"model": "llama", "messages": FRANCE, "stream": stream} | options
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**asked)
    assert refusal.value.param == param and refusal.value.type == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "\xff"}', b"[" * 100_000, b'{"model": "llama"}'])
def test_a_broken_body_is_a_bad_request(body: bytes, tiny_gateway: RunningGateway) -> None:
    status, _, answer = tiny_gateway.ask("/v1/chat/completions", method="POST", body=body)
    assert status == 400 and json.loads(answer)["error"]["message"]


def test_a_body_that_is_too_long_is_refused_unread(tiny_gateway: RunningGateway) -> None:
    headers = {"Content-Length": str(2**30)}
    status, _, answer = tiny_gateway.ask("/v1/chat/completions", method="POST", headers=headers)
    assert status == 413 and json.loads(answer)["error"]["code"] == "request_too_large"


def test_a_prompt_beyond_the_context_is_refused(client: OpenAI) -> None:
    paste: Any = [{"role": "user", "content": "rain " * 20_000}]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="llama", messages=paste)
    assert refusal.value.code == "context_length_exceeded"


def test_a_cloud_that_is_not_there_is_unavailable(tiny: Path) -> None:
    with run_gateway(tiny) as running, client_of(running) as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as failure:
                client.chat.completions.create(model="llama", messages=FRANCE, stream=stream)
            assert failure.value.status_code == 503 and failure.value.code == "cloud_unreachable"
            assert int(failure.value.response.headers["retry-after"]) > 0


def test_a_template_that_refuses_a_conversation_is_a_bad_request(tiny: Path) -> None:
    def strict(bundle: Bundle) -> Bundle:
        template = "{% if messages[0].role != 'user' %}{{ raise_exception('only users speak here') }}{% endif %}"
        return dataclasses.replace(bundle, template=ChatTemplate(template, {}))

    asked: Any = [{"role": "system", "content": "a secret"}, *FRANCE]
    with (
        run_gateway(tiny, change=strict) as running,
        client_of(running) as client,
        pytest.raises(openai.BadRequestError, match="only users speak here") as refusal,
    ):
        client.chat.completions.create(model="llama", messages=asked)
    assert refusal.value.param == "messages" and "a secret" not in str(refusal.value)


def test_a_model_without_a_chat_template_chats_not(tiny: Path) -> None:
    def plain(bundle: Bundle) -> Bundle:
        return dataclasses.replace(bundle, template=None)

    with (
        run_gateway(tiny, change=plain) as running,
        client_of(running) as client,
        pytest.raises(openai.BadRequestError, match="no chat template"),
    ):
        client.chat.completions.create(model="llama", messages=FRANCE)
