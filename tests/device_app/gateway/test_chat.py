"""Every option of chat completions and completions, through the official `openai` package, on a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import openai
import torch
from openai import OpenAI
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from tests.conftest import RunningCloud, open_assistant
from tests.device_app.gateway.asking import FRANCE, LONG_AGO, STORY, check_logprobs
from tests.device_app.gateway.gateways import KEY, RunningGateway


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


class Weather(BaseModel):
    city: Literal["Bern", "Rome"]
    sunny: bool


def test_an_answer_is_parsed_into_a_class(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="llama", messages=STORY, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)


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


def test_logprobs_are_those_of_the_stock_model(
    client: OpenAI, tiny_gateway: RunningGateway, tiny_cloud: RunningCloud, tiny_checkpoints: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints("llama"), dtype=torch.float32)
    check_logprobs(client, tiny_gateway, tiny_cloud, model.eval(), "28")
