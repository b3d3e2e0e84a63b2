"""Hidden states down instead of logits: real sockets, tiny tied models, both schemes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from device_app import Sampling
from device_app.drafting import NO_DRAFTS
from device_app.printing import summary
from export.scheme import SchemeName
from tests.conftest import open_assistant, run_cloud, run_cloud_process

TIED = ["llama-tied", "qwen2-tied", "qwen3-tied"]
SCHEMES: list[SchemeName] = ["permutation", "rotation"]
PROMPT = "the cat sat on the mat"
Exports = Callable[..., Path]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", TIED)
def test_greedy_ids_are_those_of_generate_on_the_original(
    tiny_exports: Exports, tiny_checkpoints: Callable[[str], Path], kind: str, scheme: SchemeName
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints(kind)).eval()
    export = tiny_exports(kind, scheme, "device")
    with run_cloud(export) as cloud, open_assistant(export, cloud.url) as assistant:
        answer = assistant.complete(PROMPT, max_tokens=40).finish()
        ids = torch.tensor([assistant.bundle.tokenizer.encode(PROMPT)])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert answer.ids == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(temperature=0.8, seed=5), marks=pytest.mark.slow),
        pytest.param(Sampling(temperature=1.5, top_k=40, seed=6), marks=pytest.mark.slow),
        Sampling(temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=7),
        pytest.param(Sampling(repetition_penalty=1.3), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sampled_ids_are_those_of_the_classifier_in_the_cloud(tiny_exports: Exports, sampling: Sampling) -> None:
    answers = []
    for head in ("cloud", "device"):
        export = tiny_exports("llama-tied", head=head)
        with run_cloud(export) as cloud, open_assistant(export, cloud.url) as assistant:
            answers.append(assistant.complete(PROMPT, sampling=sampling, max_tokens=40).finish())
    assert answers[0].ids == answers[1].ids
    assert answers[1].stats.counters.full_rows == 0


def test_a_token_brings_down_one_hidden_state(tiny_exports: Exports) -> None:
    export = tiny_exports("llama-tied", head="device")
    with run_cloud(export) as cloud, open_assistant(export, cloud.url, drafting=NO_DRAFTS) as assistant:
        assistant.complete(PROMPT, max_tokens=1).finish()
        answer = assistant.complete(PROMPT, max_tokens=20).finish()
    counters = answer.stats.counters
    assert counters.round_trips == 20
    assert 4 * 48 < counters.bytes_down / 20 < 4 * 48 + 100
    assert counters.work_ns["classify"] > 0
    assert "KiB of hidden states" in summary(answer.stats)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(), marks=pytest.mark.slow, id="greedy"),
        pytest.param(Sampling(temperature=0.8, seed=11), id="sampled"),
    ],
)
def test_a_cloud_killed_and_started_again_does_not_change_the_answer(
    sampling: Sampling, scheme: SchemeName, tiny_exports: Exports
) -> None:
    export = tiny_exports("llama-tied", scheme, "device")
    with run_cloud_process(export / "cloud") as (url, process), open_assistant(export, url) as assistant:
        undisturbed = assistant.complete(PROMPT, sampling=sampling, max_tokens=30).finish()
        answer = assistant.complete(PROMPT, sampling=sampling, max_tokens=30)
        for _ in answer:
            if len(answer.ids) >= 12:
                break
        process.kill()
        process.wait()
        with run_cloud_process(export / "cloud", port=int(url.rsplit(":", 1)[1])):
            answer.finish()
    assert answer.ids == undisturbed.ids
    assert answer.stats.counters.replays == 1


def test_the_commands_export_and_answer(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export", "model", tiny_checkpoints("llama-tied"), "--out", tmp_path / "out"]
    exported = subprocess.run([*command, "--head", "device", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(exported.stdout)["head"] == "device"
    with run_cloud_process(tmp_path / "out" / "cloud") as (url, _):
        command = [sys.executable, "-m", "device_app", "chat", tmp_path / "out" / "device", "--url", url]
        done = subprocess.run(
            [*command, "--max-tokens", "8", "--json", "-p", PROMPT], capture_output=True, text=True, check=True
        )
    timings = json.loads(done.stdout)["timings"]
    assert timings["device_seconds"]["classify"] > 0
