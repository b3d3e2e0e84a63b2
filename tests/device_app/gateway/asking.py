"""Asking a gateway as anybody would, and what its answers are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openai import OpenAI

from device_app.assistant import Assistant
from device_app.connection import Address
from device_app.sampler import Sampling
from tests.conftest import RunningCloud
from tests.device_app.gateway.gateways import KEY, RunningGateway

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
STORY: Any = [{"role": "user", "content": "Tell me a long story about a lighthouse keeper and a storm."}]
LONG_AGO = "Once upon a time, there was a lighthouse"


def client_of(gateway: RunningGateway, **options: Any) -> OpenAI:
    """As anybody would make it, but that it does not try again."""
    return OpenAI(**{"base_url": gateway.url, "api_key": KEY, "max_retries": 0, "timeout": 60} | options)


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
