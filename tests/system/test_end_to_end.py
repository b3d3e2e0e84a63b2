"""The main job, on a real model: SmolLM2-135M-Instruct, a cloud in its own process, sockets on loopback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.plain import plain_model
from benchmarks.prompts import PROMPTS
from device_app import Sampling
from device_app.drafting import NO_DRAFTS
from export.source import open_source
from tests.conftest import open_assistant, run_cloud_process

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a long story about a lighthouse keeper and a storm."}]


@pytest.fixture(scope="module")
def cloud(smollm2: Path) -> Iterator[str]:
    with run_cloud_process(smollm2 / "cloud") as (url, _):
        yield url


def test_a_prompt_is_answered(smollm2: Path, cloud: str) -> None:
    with open_assistant(smollm2, cloud) as assistant:
        answer = assistant.chat(FRANCE).finish()
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_the_command_answers_once(smollm2: Path, cloud: str) -> None:
    command = [sys.executable, "-m", "device_app", "chat", smollm2 / "device", "--url", cloud, "--json", "-p"]
    done = subprocess.run([*command, FRANCE[0]["content"]], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert "Paris" in answer["text"] and answer["finish_reason"] == "stop"


def test_greedy_ids_are_those_of_generate_on_the_original(smollm2: Path, smollm2_gguf: Path, cloud: str) -> None:
    # Three prompts here; `make bench-equivalence` takes all twenty.
    model = plain_model(open_source(str(smollm2_gguf)), torch.float32)
    with open_assistant(smollm2, cloud) as assistant:
        for prompt in (PROMPTS[0], PROMPTS[4], PROMPTS[12]):
            answer = assistant.chat([{"role": "user", "content": prompt}], max_tokens=32).finish()
            assert assistant.bundle.template is not None
            text = assistant.bundle.template.render([{"role": "user", "content": prompt}])
            ids = torch.tensor([assistant.bundle.tokenizer.encode(text)])
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
            assert answer.ids == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 5 * 1024), ("bfloat16", 3 * 1024)])
def test_a_token_costs_few_bytes_both_ways(dtype: str, limit: int, smollm2: Path) -> None:
    with (
        run_cloud_process(smollm2 / "cloud", "--dtype", dtype) as (url, _),
        open_assistant(smollm2, url, drafting=NO_DRAFTS) as assistant,
    ):
        first = assistant.chat(STORY, max_tokens=1).finish().stats.counters
        more = assistant.chat(STORY, max_tokens=33).finish().stats.counters
    # The second question replays nothing: only its last position is appended again.
    sent = more.bytes_up + more.bytes_down
    assert first.bytes_up > sent / 33
    websocket_headers = 8 + 4  # client frames are masked: 4 bytes more (RFC 6455 §5.2)
    assert sent / 33 + websocket_headers <= limit


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(), marks=pytest.mark.slow, id="greedy"),
        pytest.param(Sampling(temperature=0.8, top_p=0.95, seed=11), id="sampled"),
    ],
)
def test_a_cloud_killed_and_started_again_does_not_change_the_answer(sampling: Sampling, smollm2: Path) -> None:
    with run_cloud_process(smollm2 / "cloud") as (url, _), open_assistant(smollm2, url) as assistant:
        undisturbed = assistant.chat(STORY, sampling=sampling, max_tokens=40).finish()
    port = int(url.rsplit(":", 1)[1])
    with run_cloud_process(smollm2 / "cloud", port=port) as (_, process), open_assistant(smollm2, url) as assistant:
        answer = assistant.chat(STORY, sampling=sampling, max_tokens=40)
        for _ in answer:
            if len(answer.ids) >= 15:
                break
        process.kill()
        process.wait()
        with run_cloud_process(smollm2 / "cloud", port=port):
            answer.finish()
    assert answer.ids == undisturbed.ids and answer.text == undisturbed.text
    assert answer.stats.counters.replays == 1


def test_the_demo_shows_the_answer_and_what_the_cloud_saw() -> None:
    command = [sys.executable, "-m", "examples.demo", "--prompt", FRANCE[0]["content"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    shown = done.stdout
    assert "Paris" in shown
    seen = shown[shown.index("What the cloud saw") :]
    assert re.search(r"finds (\d+) of \1 tokens", seen)  # the sorted look-up finds everything, drafts too
    assert "capital of France" in seen
    assert "permutation is not encryption" in seen
