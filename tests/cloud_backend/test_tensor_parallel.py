"""A model that two processes share: the answers of one process, and the end of all processes with any of them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from cloud_backend.opening import open_context
from cloud_backend.tensor_parallel.ranks import Ranks
from cloud_backend.tensor_parallel.split import WHOLE, split_of
from export.bundle import export_model
from shared import wire
from shared.errors import UsageError
from tests.checkpoints import ALL, SIZES
from tests.cloud_backend.device import PATIENCE, Device, close, open_of, table
from tests.conftest import open_assistant, run_cloud, run_cloud_process
from tests.processes import metric

# What is split: all of it; the feed-forward alone; with biases, experts, packed projections, norms of each head.
KINDS = ["llama", "llama-odd-heads", "llama-biases", "qwen3-tied", "mixtral", "phi3", "gemma2"]
SCARCE = 2**18  # bytes of KV memory: less than all sessions of a test want
TEXT = "the cat sat on the mat, and the dog sang in the rain; then all of them went home together"
PROMPTS = [TEXT[9 * start :] + TEXT[: 9 * start] for start in range(6)]
EMBEDDINGS = table()


@pytest.fixture(scope="module")
def shared(tiny_exports: Callable[..., Path]) -> Iterator[str]:
    """The URL of a server that shares a model of each kind with another process."""
    exports = [*map(tiny_exports, KINDS), tiny_exports("llama-tied", head="device")]
    folders = [export / "cloud" for export in exports]
    with run_cloud_process(*folders, "--tensor-parallel", 2, "--kv-bytes", SCARCE) as (url, _):
        yield url


def answered(export: Path, url: str) -> list[list[int]]:
    """Ids that follow each prompt, all asked at once, each twice as its continuation is asked on."""

    def ask(prompt: str) -> list[int]:
        with open_assistant(export, url) as assistant:
            first = assistant.complete(prompt, max_tokens=40).finish()
            return first.ids + assistant.complete(prompt + first.text, max_tokens=20).finish().ids

    with ThreadPoolExecutor(len(PROMPTS)) as together:
        return list(together.map(ask, PROMPTS))


@pytest.mark.parametrize("kind", KINDS)
def test_several_sessions_get_the_ids_of_one_process(
    tiny_exports: Callable[[str], Path], shared: str, kind: str
) -> None:
    export = tiny_exports(kind)
    with run_cloud(export) as alone:
        wanted = answered(export, alone.url)
    assert answered(export, shared) == wanted


def test_sessions_that_are_evicted_get_them_too(tiny_exports: Callable[[str], Path], shared: str) -> None:
    export = tiny_exports("llama-odd-heads")  # of which the memory holds 160 positions
    with run_cloud(export) as alone:
        wanted = answered(export, alone.url)
    before = metric(shared, "stip_evictions_total")
    assert answered(export, shared) == wanted
    assert metric(shared, "stip_evictions_total") > before


def test_a_cache_that_is_cut_back_goes_on_as_that_of_one_process(tiny: Path, shared: str) -> None:
    opening = open_of(tiny)
    with run_cloud(tiny) as alone, Device(alone.url, opening) as one, Device(shared, opening) as two:
        for keep, start, end in ((0, 0, 70), (70, 3, 4), (40, 9, 14), (44, 20, 21), (3, 100, 140)):
            new = EMBEDDINGS[start:end]
            rows = min(len(new), 5)  # all rows of a draft
            close(two.rows(keep, new, rows=rows), one.rows(keep, new, rows=rows))


def test_devices_that_classify_get_the_ids_of_one_process(tiny_exports: Callable[..., Path], shared: str) -> None:
    export = tiny_exports("llama-tied", head="device")
    with run_cloud(export) as alone:
        wanted = answered(export, alone.url)
    assert answered(export, shared) == wanted


# --- the end ---


@contextmanager
def started(export: Path, log: Path) -> Iterator[tuple[str, psutil.Process, psutil.Process]]:
    """A server that shares a model with another process: its URL, itself and the other."""
    command = [sys.executable, "-m", "cloud_backend", "serve", str(export / "cloud"), "--port", "0"]
    with log.open("w") as out, subprocess.Popen([*command, "--tensor-parallel", "2"], stderr=out) as process:
        try:
            deadline = time.monotonic() + 60
            while not (url := re.search(r"listening on (\S+)", log.read_text())):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            server = psutil.Process(process.pid)
            (other,) = server.children()
            yield url[1], server, other
        finally:
            process.kill()


def test_a_process_that_dies_in_a_step_ends_the_server_with_a_word(tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(tiny, log) as (url, server, other), Device(url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:3])
        other.suspend()
        device.send(device.append(3, EMBEDDINGS[3:4]))
        time.sleep(0.3)  # the step has begun, and waits
        other.kill()
        reply = device.receive()
        assert isinstance(reply, wire.Error) and reply.code == "internal"
        assert server.wait(PATIENCE) == 1
    *_, error, hint = log.read_text().splitlines()
    assert error == "stip-cloud: error: tensor parallel: process 1 of 2: killed by SIGKILL"
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_process_outlives_the_server(tiny: Path, tmp_path: Path, number: int, status: int) -> None:
    log = tmp_path / "log"
    with started(tiny, log) as (url, server, other), Device(url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:3])
        server.send_signal(number)
        assert server.wait(PATIENCE) == status
        gone, _ = psutil.wait_procs([other], PATIENCE)
        assert gone
    assert "Error" not in log.read_text() and "error" not in log.read_text()


# --- what cannot be split ---


def llama(**sizes: int) -> LlamaConfig:
    return LlamaConfig(**SIZES | sizes)


def test_heads_that_do_not_divide_stay_whole() -> None:
    split = split_of(LlamaForCausalLM, ALL["llama-odd-heads"], 2)
    assert str(split) == (
        "split over 2 processes; attention whole in each, as it has 9 heads over 3 of keys and values"
    )
    assert {style for name, style in split.rules.items() if "self_attn" in name} == {WHOLE}
    assert split.rules["model.layers.*.mlp.down_proj"] == "rowwise"


def test_a_feed_forward_that_does_not_divide_stays_whole() -> None:
    split = split_of(MixtralForCausalLM, ALL["mixtral"], 2)
    assert not split.whole and WHOLE not in {style for name, style in split.rules.items() if ".layers." in name}
    split = split_of(LlamaForCausalLM, llama(intermediate_size=81), 2)
    assert split.whole == ["feed-forward whole in each, as it has 81 features"]
    assert split.rules["model.layers.*.mlp.up_proj"] == WHOLE
    assert split.rules["model.layers.*.self_attn.q_proj"] == "colwise"


def test_a_number_that_divides_nothing_is_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match=r"seen 7, which divides neither 6 heads over 2 .* nor 80 features") as caught:
        split_of(LlamaForCausalLM, llama(), 7)
    assert caught.value.hint == "wanted one of 2, 4, 5, 8, 10, 16, 20, 40"


def test_an_architecture_without_a_plan_is_refused() -> None:
    with pytest.raises(UsageError, match="transformers has no plan to split the architecture 'gpt2'"):
        split_of(GPT2LMHeadModel, ALL["gpt2"], 2)


def test_a_model_that_is_no_decoder_is_refused(tiny_exports: Callable[[str], Path]) -> None:
    with Ranks(1, "cpu") as ranks, pytest.raises(UsageError, match="seen a model of the kind encoder, wanted a dec"):
        open_context(tiny_exports("bert") / "cloud", ranks=ranks)


def test_weights_of_llama_cpp_are_refused(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    export_model(str(tiny_checkpoints("llama")), tmp_path / "gguf", name="llama", gguf="f32")
    with Ranks(1, "cpu") as ranks, pytest.raises(UsageError, match=r"seen the engine llama\.cpp, wanted torch"):
        open_context(tmp_path / "gguf" / "cloud", ranks=ranks)
