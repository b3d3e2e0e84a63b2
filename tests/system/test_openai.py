"""The official `openai` package, unmodified, and `llm`, against a gateway over a real cloud."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from PIL import Image
from transformers import AutoModelForCausalLM

from benchmarks.plain import plain_model
from device_app.assistant import Assistant
from device_app.connection import Address
from device_app.encoder import Encoder
from device_app.gateway import pool
from device_app.sampler import Sampling
from device_app.template import ChatTemplate
from export.source import open_source
from tests.conftest import RunningCloud, open_assistant, run_cloud
from tests.device_app.gateway.gateways import KEY, RunningGateway, run_gateway
from tests.processes import eventually, metric

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
STORY: Any = [{"role": "user", "content": "Tell me a long story about a lighthouse keeper and a storm."}]
LONG_AGO = "Once upon a time, there was a lighthouse"


def client_of(gateway: RunningGateway, **options: Any) -> OpenAI:
    """As anybody would make it, but that it does not try again."""
    return OpenAI(**{"base_url": gateway.url, "api_key": KEY, "max_retries": 0, "timeout": 60} | options)


@pytest.fixture(scope="module")
def cloud(smollm2: Path) -> Iterator[RunningCloud]:
    with run_cloud(smollm2) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(smollm2: Path, cloud: RunningCloud) -> Iterator[RunningGateway]:
    with run_gateway(smollm2, cloud=cloud.url) as running:
        yield running


@pytest.fixture(scope="module")
def smollm(gateway: RunningGateway) -> Iterator[OpenAI]:
    with client_of(gateway) as client:
        yield client


@pytest.fixture(scope="module")
def tiny_cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.fixture(scope="module")
def tiny_gateway(tiny: Path, tiny_cloud: RunningCloud) -> Iterator[RunningGateway]:
    with run_gateway(tiny, cloud=tiny_cloud.url) as running:
        yield running


@pytest.fixture(scope="module")
def client(tiny_gateway: RunningGateway) -> Iterator[OpenAI]:
    """Of a tiny model, which says nothing that makes sense, quickly."""
    with client_of(tiny_gateway) as one:
        yield one


# --- a real model ---


def test_a_chat_is_answered(smollm: OpenAI) -> None:
    answer = smollm.chat.completions.create(model="smollm2", messages=FRANCE, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.role == "assistant"
    assert (
        answer.usage is not None
        and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    )
    figures = answer.model_extra["stip"]  # type: ignore[index]
    assert figures["bytes_up"] > 0 and figures["round_trips"] <= answer.usage.completion_tokens
    assert answer.system_fingerprint == "stip-permutation-cloud-float32"


@torch.inference_mode()
def check_logprobs(client: OpenAI, gateway: RunningGateway, cloud: RunningCloud, model: Any, biased: str) -> None:
    """A sampled answer's log-probabilities are those of the stock model over its whole vocabulary, at temperature 1,
    whatever else was asked for."""
    [served] = gateway.gateway.models.values()
    bundle = served.bundle
    assert bundle.template is not None
    answer = client.chat.completions.create(
        model=served.name,
        messages=STORY,
        max_tokens=12,
        temperature=1.3,
        seed=5,
        logprobs=True,
        top_logprobs=20,
        logit_bias={biased: -100},
        frequency_penalty=1.0,
    )
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 12
    prompt = bundle.tokenizer.encode(bundle.template.render(STORY))
    sampling = Sampling(temperature=1.3, seed=5, logit_bias={int(biased): -100}, frequency_penalty=1.0)
    with Assistant(bundle, Address(cloud.url)) as assistant:
        ids = assistant.chat(STORY, sampling=sampling, max_tokens=12).finish().ids
    reference = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
    for one, token, row in zip(content, ids, reference, strict=True):
        assert bytes(one.bytes or ()) == bundle.tokenizer.token_bytes(token)
        assert abs(one.logprob - float(row[token])) < 1e-3
        top = row.topk(20)
        assert np.abs(np.array([other.logprob for other in one.top_logprobs]) - top.values.numpy()).max() < 1e-3
        assert bytes(one.top_logprobs[0].bytes or ()) == bundle.tokenizer.token_bytes(int(top.indices[0]))


def test_logprobs_are_those_of_the_stock_model(
    client: OpenAI, tiny_gateway: RunningGateway, tiny_cloud: RunningCloud, tiny_checkpoints: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints("llama"), dtype=torch.float32)
    check_logprobs(client, tiny_gateway, tiny_cloud, model.eval(), "28")


@pytest.mark.slow
def test_logprobs_of_a_real_model_are_those_of_its_whole_vocabulary(
    smollm: OpenAI, gateway: RunningGateway, cloud: RunningCloud, smollm2_gguf: Path
) -> None:
    check_logprobs(smollm, gateway, cloud, plain_model(open_source(str(smollm2_gguf)), torch.float32), "28")


def test_closing_a_stream_stops_the_cloud(smollm: OpenAI, cloud: RunningCloud) -> None:
    with smollm.chat.completions.create(model="smollm2", messages=STORY, stream=True) as stream:
        for at, _ in enumerate(stream):
            if at == 3:
                break
    time.sleep(1)
    before = metric(cloud.url, "stip_positions_total")
    time.sleep(0.5)
    assert metric(cloud.url, "stip_positions_total") == before


def test_a_client_that_gives_up_waiting_stops_the_cloud(smollm: OpenAI, cloud: RunningCloud) -> None:
    with pytest.raises(openai.APITimeoutError):
        smollm.with_options(timeout=0.5).chat.completions.create(model="smollm2", messages=STORY)
    time.sleep(1)
    before = metric(cloud.url, "stip_positions_total")
    time.sleep(0.5)
    assert metric(cloud.url, "stip_positions_total") == before


def test_a_conversation_that_goes_on_sends_its_new_part_alone(smollm: OpenAI) -> None:
    first = smollm.chat.completions.create(model="smollm2", messages=FRANCE, temperature=0)
    content = first.choices[0].message.content
    more = [*FRANCE, {"role": "assistant", "content": content}, {"role": "user", "content": "And of Italy?"}]
    smollm.completions.create(model="smollm2", prompt=LONG_AGO, max_tokens=4)  # of somebody else, between the two
    second = smollm.chat.completions.create(model="smollm2", messages=more, temperature=0, max_tokens=20)
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1  # the end token was never appended
    assert second.usage.prompt_tokens_details.cached_tokens in (held, held - 1)
    sent = second.model_extra["stip"]["vectors_up"] - second.model_extra["stip"]["drafted"]  # type: ignore[index]
    assert sent <= second.usage.prompt_tokens - held + second.usage.completion_tokens + 1


def test_llm_completes_a_chat(smollm2: Path, gateway: RunningGateway, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: private\n  model_name: smollm2\n  api_base: {gateway.url}\n  api_key_name: stip\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"stip": KEY}))
    command = [sys.executable, "-m", "llm", "-m", "private", "-o", "temperature", "0", FRANCE[0]["content"]]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "Paris" in done.stdout, done.stderr


# --- every option, on a tiny model ---


def text_of(client: OpenAI, **options: Any) -> str:
    """A whole chat completion's text."""
    answer = client.chat.completions.create(**{"model": "llama", "messages": STORY, "max_tokens": 24} | options)
    return answer.choices[0].message.content or ""


def test_a_stream_gives_the_same_text_and_its_usage(client: OpenAI) -> None:
    options: Any = {"model": "llama", "messages": STORY, "max_tokens": 40, "seed": 3}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert not chunks[-1].choices and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].model_extra["stip"]["seed"] == 3  # type: ignore[index]


def test_the_answer_is_that_of_the_device_s_own_api(client: OpenAI, tiny: Path, tiny_cloud: RunningCloud) -> None:
    with open_assistant(tiny, tiny_cloud.url) as assistant:
        expected = assistant.chat(STORY, max_tokens=24).finish().text
    assert text_of(client, temperature=0) == expected


def test_a_seed_decides_the_answer(client: OpenAI) -> None:
    texts = [text_of(client, seed=seed, temperature=1.5) for seed in (1, 1, 2, -1)]
    assert texts[0] == texts[1] != texts[2] != texts[3]


def test_sampling_without_a_seed_varies(client: OpenAI) -> None:
    assert text_of(client) != text_of(client)


def test_top_p_top_k_and_biases_are_followed(client: OpenAI, tiny_gateway: RunningGateway) -> None:
    greedy = text_of(client, temperature=0)
    assert text_of(client, top_p=0.001) == greedy == text_of(client, extra_body={"top_k": 1})
    tokens = tiny_gateway.gateway.model("llama").bundle.tokenizer.encode("cat")
    biased = text_of(client, logit_bias={str(tokens[0]): 100}, max_tokens=5)
    assert biased == tiny_gateway.gateway.model("llama").bundle.tokenizer.token_bytes(tokens[0]).decode() * 5
    varied = text_of(client, logit_bias={str(tokens[0]): 100}, presence_penalty=2, frequency_penalty=2, max_tokens=60)
    assert varied != biased[: len(biased) // 5] * 60


def test_stop_strings_end_an_answer(client: OpenAI) -> None:
    text = text_of(client, temperature=0, max_tokens=40)
    stop = text[10:13]
    end = text.index(stop)
    for given in (stop, ["never to be seen", stop], [f"{number}..." for number in range(9)] + [stop]):
        answer = client.chat.completions.create(
            model="llama", messages=STORY, max_tokens=40, temperature=0, stop=given, logprobs=True
        )
        assert answer.choices[0].message.content == text[:end] and answer.choices[0].finish_reason == "stop"


def test_several_choices_share_one_prompt(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="llama", messages=FRANCE, max_tokens=8, seed=10, n=3)
    alone = [text_of(client, messages=FRANCE, max_tokens=8, seed=seed) for seed in (10, 11, 12)]
    assert [choice.message.content for choice in answer.choices] == alone
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    figures = answer.model_extra["stip"]  # type: ignore[index]
    assert figures["vectors_up"] - figures["drafted"] <= answer.usage.prompt_tokens + 24
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="llama", messages=FRANCE, max_tokens=8, seed=10, n=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == alone


def test_max_completion_tokens_wins_over_its_old_name(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="llama", messages=FRANCE, max_completion_tokens=3, max_tokens=9, temperature=0
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_an_answer_without_a_limit_ends_with_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="llama", messages=FRANCE, logit_bias={"2": -100}, extra_body={"unknown": {"fields": "are ignored"}}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.total_tokens == 257  # the last token needs no place


def test_a_developer_is_the_system(client: OpenAI) -> None:
    system, developer = ([{"role": role, "content": "Be short."}, *FRANCE] for role in ("system", "developer"))
    assert text_of(client, messages=system, temperature=0) == text_of(client, messages=developer, temperature=0)


def test_completions_go_on_from_text_and_from_ids(client: OpenAI, tiny_gateway: RunningGateway) -> None:
    ids = tiny_gateway.gateway.model("llama").bundle.tokenizer.encode(LONG_AGO)
    options: Any = {"model": "llama", "temperature": 0}
    one = client.completions.create(prompt=LONG_AGO, **options)
    assert one.usage is not None and one.usage.completion_tokens <= 16  # OpenAI's default
    assert client.completions.create(prompt=ids, **options).choices[0].text == one.choices[0].text
    echoed = client.completions.create(prompt=LONG_AGO, echo=True, **options)
    assert echoed.choices[0].text == LONG_AGO + one.choices[0].text
    several = client.completions.create(prompt=["A cat", LONG_AGO], n=2, **options)
    assert [choice.text for choice in several.choices][2:] == [one.choices[0].text] * 2
    streamed = client.completions.create(prompt=LONG_AGO, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text


def test_logprobs_of_completions(client: OpenAI) -> None:
    options: Any = {"model": "llama", "prompt": LONG_AGO, "max_tokens": 6, "temperature": 0, "logit_bias": {"2": -100}}
    chosen = client.completions.create(**options, logprobs=3).choices[0]
    logprobs = chosen.logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or ()) == len(logprobs.text_offset or ()) == 6
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs or (), logprobs.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())


def test_models_are_listed(client: OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "llama" == client.models.retrieve("llama").id and model.created > 1.7e9


def test_json_of_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "sunny": {"type": "boolean"}},
        "required": ["city", "sunny"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
    answer = client.chat.completions.create(model="llama", messages=STORY, response_format=form, n=3)
    for choice in answer.choices:
        value = json.loads(choice.message.content or "")
        assert value.keys() == {"city", "sunny"} and choice.finish_reason == "stop"


def test_any_json_object(client: OpenAI) -> None:
    text = text_of(client, response_format={"type": "json_object"}, max_tokens=200)
    assert text.startswith("{")


def test_two_clients_at_once_get_what_they_get_alone(tiny_gateway: RunningGateway, client: OpenAI) -> None:
    prompts = [FRANCE, STORY] * 4  # more than there are sessions
    alone = [text_of(client, messages=prompt, seed=at) for at, prompt in enumerate(prompts)]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=tiny_gateway.url, api_key=KEY, max_retries=0) as one:
            answers = await asyncio.gather(
                *(
                    one.chat.completions.create(model="llama", messages=prompt, max_tokens=24, seed=at)
                    for at, prompt in enumerate(prompts)
                )
            )
        return [answer.choices[0].message.content or "" for answer in answers]

    assert asyncio.run(together()) == alone


# --- tools ---

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
    assert free.choices[0].finish_reason == "length"


def test_tools_are_refused_where_the_template_has_no_place_for_them(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no place for them") as refusal:
        client.chat.completions.create(model="llama", messages=FRANCE, tools=[WEATHER])
    assert refusal.value.param == "tools"


# --- images and vectors ---


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


# --- errors ---


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


def test_more_requests_than_may_wait_are_a_rate_limit(
    smollm2: Path, cloud: RunningCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MOST_WAITING", 0)
    with run_gateway(smollm2, cloud=cloud.url, sessions=1) as running, client_of(running) as client:
        with client.chat.completions.create(model="smollm2", messages=STORY, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as refusal:
                client.chat.completions.create(model="smollm2", messages=FRANCE)
        assert refusal.value.code == "queue_full" and "retry-after" in refusal.value.response.headers
        monkeypatch.undo()
        client.chat.completions.create(model="smollm2", messages=FRANCE, max_tokens=2)  # it was closed: there is room


def test_a_cloud_that_is_not_there_is_unavailable(tiny: Path) -> None:
    with run_gateway(tiny) as running, client_of(running) as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as failure:
                client.chat.completions.create(model="llama", messages=FRANCE, stream=stream)
            assert failure.value.status_code == 503 and failure.value.code == "cloud_unreachable"
            assert int(failure.value.response.headers["retry-after"]) > 0


def test_a_cloud_that_goes_for_good_ends_the_stream_with_an_error(smollm2: Path) -> None:
    with ExitStack() as life:
        url = life.enter_context(run_cloud(smollm2)).url
        with run_gateway(smollm2, cloud=url, retry_seconds=0.2) as running, client_of(running) as client:
            stream = client.chat.completions.create(model="smollm2", messages=STORY, stream=True)
            with pytest.raises(openai.APIError) as failure:
                for at, _ in enumerate(stream):
                    if at == 5:
                        life.close()
            assert type(failure.value) is openai.APIError and failure.value.code == "cloud_unreachable"
            began = time.monotonic()
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(model="smollm2", messages=STORY)
            assert time.monotonic() - began < 2  # a session that never was there is not waited for


# --- the process ---


def test_the_process_serves_says_nothing_of_prompts_and_ends_in_mid_answer(smollm2: Path, cloud: RunningCloud) -> None:
    before = metric(cloud.url, "stip_sessions_open")
    command = [sys.executable, "-m", "device_app", "serve", smollm2 / "device", "--url", cloud.url, "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "STIP_API_KEY"}
    process = subprocess.Popen([*command, "--no-history"], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = ""
    while "#key=" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    [(base, key)] = re.findall(r"page at (http://127\.0\.0\.1:\d+)/#key=(\S+)", said)
    with OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0) as client:
        stream = client.chat.completions.create(model="smollm2", messages=STORY, stream=True)
        with pytest.raises(openai.APIError):
            for at, _ in enumerate(stream):
                if at == 3:
                    began = time.monotonic()
                    process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5
    said += process.stderr.read()
    assert "lighthouse" not in said and "Traceback" not in said, said
    assert eventually(lambda: metric(cloud.url, "stip_sessions_open") == before, 5)
    assert metric(cloud.url, "stip_sessions_held") == 0  # it was ended, not lost
