"""The official `openai` package, unmodified, and `llm`, against a gateway over a real cloud."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
import torch
from openai import OpenAI

from benchmarks.plain import plain_model
from device_app.gateway import pool
from export.source import open_source
from tests.conftest import RunningCloud, run_cloud
from tests.device_app.gateway.asking import FRANCE, LONG_AGO, STORY, check_logprobs, client_of
from tests.device_app.gateway.gateways import KEY, RunningGateway, run_gateway
from tests.processes import eventually, metric


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
    # All of the first turn but for its end: whether that was appended, and guesses behind it, depends on the drafts.
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and held - 1 <= cached < second.usage.prompt_tokens
    figures = second.model_extra["stip"]  # type: ignore[index]
    sent = figures["vectors_up"] - figures["drafted"]
    assert sent <= second.usage.prompt_tokens - cached + second.usage.completion_tokens + 1


def test_llm_completes_a_chat(smollm2: Path, gateway: RunningGateway, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: private\n  model_name: smollm2\n  api_base: {gateway.url}\n  api_key_name: stip\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"stip": KEY}))
    command = [sys.executable, "-m", "llm", "-m", "private", "-o", "temperature", "0", FRANCE[0]["content"]]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "Paris" in done.stdout, done.stderr


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
