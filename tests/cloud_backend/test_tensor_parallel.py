"""A model that two processes share: the answers of one process, and the end of all processes with any of them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from cloud_backend.cli import command_line
from cloud_backend.limits import Limits
from cloud_backend.opening import open_context
from cloud_backend.scheduler import Scheduler
from cloud_backend.server import CloudServer
from cloud_backend.serving import Serving, load_models, prepare
from cloud_backend.tensor_parallel.engine import split_of_folder
from cloud_backend.tensor_parallel.orders import Begin, Line, Load, Reply
from cloud_backend.tensor_parallel.rank import _load
from cloud_backend.tensor_parallel.ranks import Ranks, environment
from cloud_backend.tensor_parallel.split import WHOLE, split_of
from cloud_backend.words import parse
from export.bundle import export_model
from shared import wire
from shared.errors import BundleError, EngineError, UsageError
from shared.manifest import CloudManifest, read_manifest
from tests.checkpoints import ALL, SIZES
from tests.cloud_backend.device import PATIENCE, Device, close, open_of, table
from tests.conftest import open_assistant, run_cloud, run_cloud_process
from tests.processes import metric

ROOT = Path(__file__).parents[2]
# Beside the plain llama: the feed-forward alone is split; biases, experts, packed projections, norms of each head.
KINDS = ["llama-odd-heads", "llama-biases", "qwen3-tied", "mixtral", "phi3", "gemma2"]
SCARCE = 2**18  # bytes of KV memory: less than all sessions of a test want
TEXT = "the cat sat on the mat, and the dog sang in the rain; then all of them went home together"
PROMPTS = [TEXT[9 * start :] + TEXT[: 9 * start] for start in range(6)]
EMBEDDINGS = table()


@pytest.fixture(scope="module")
def shared(tiny_exports: Callable[..., Path]) -> Iterator[str]:
    """The URL of a server that shares a model of each kind with another process."""
    exports = [*map(tiny_exports, ["llama", *KINDS]), tiny_exports("llama-tied", head="device")]
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


def test_two_processes_give_the_ids_of_one(tiny: Path) -> None:
    with run_cloud(tiny) as alone:
        wanted = answered(tiny, alone.url)
    with run_cloud_process(tiny / "cloud", "--tensor-parallel", 2, "--kv-bytes", "16M") as (url, _):
        assert answered(tiny, url) == wanted


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_they_do_for_each_kind_where_memory_is_scarce(
    tiny_exports: Callable[[str], Path], shared: str, kind: str
) -> None:
    export = tiny_exports(kind)
    with run_cloud(export) as alone:
        wanted = answered(export, alone.url)
    assert answered(export, shared) == wanted


@pytest.mark.ranks
def test_sessions_that_are_evicted_get_them_too(tiny_exports: Callable[[str], Path], shared: str) -> None:
    export = tiny_exports("llama-odd-heads")  # of which the memory holds 160 positions
    with run_cloud(export) as alone:
        wanted = answered(export, alone.url)
    before = metric(shared, "stip_evictions_total")
    assert answered(export, shared) == wanted
    assert metric(shared, "stip_evictions_total") > before


@pytest.mark.ranks
def test_a_cache_that_is_cut_back_goes_on_as_that_of_one_process(tiny: Path, shared: str) -> None:
    opening = open_of(tiny)
    with run_cloud(tiny) as alone, Device(alone.url, opening) as one, Device(shared, opening) as two:
        for keep, start, end in ((0, 0, 70), (70, 3, 4), (40, 9, 14), (44, 20, 21), (3, 100, 140)):
            new = EMBEDDINGS[start:end]
            rows = min(len(new), 5)  # all rows of a draft
            close(two.rows(keep, new, rows=rows), one.rows(keep, new, rows=rows))


@pytest.mark.ranks
def test_devices_that_classify_get_the_ids_of_one_process(tiny_exports: Callable[..., Path], shared: str) -> None:
    export = tiny_exports("llama-tied", head="device")
    with run_cloud(export) as alone:
        wanted = answered(export, alone.url)
    assert answered(export, shared) == wanted


# --- the end ---


@contextmanager
def started(export: Path, log: Path) -> Iterator[tuple[str, psutil.Process, psutil.Process]]:
    """A server that shares a model with another process: its URL, itself and the other.

    Its current folder is that of its log, from which it imports nothing.
    """
    command = [sys.executable, "-P", "-m", "cloud_backend", "serve", str(export / "cloud"), "--port", "0"]
    command += ["--tensor-parallel", "2"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as out, subprocess.Popen(command, stderr=out, cwd=log.parent, env=variables) as process:
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


@pytest.mark.ranks
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


def test_a_process_that_dies_in_the_first_forward_is_named(tiny: Path) -> None:
    manifest, engine = open_context(tiny / "cloud", device="cpu")
    scheduler = Scheduler()
    server = CloudServer([], Limits(), None, scheduler)

    def dies(batch: object) -> NoReturn:
        error = EngineError("process 1 of 2: killed")
        scheduler.lose(error)
        raise error

    engine.run = dies  # type: ignore[method-assign]

    async def load() -> None:
        async with server.working():
            await load_models(Serving(server, scheduler, [lambda: (manifest, engine)], None, 1.0))

    with pytest.raises(EngineError, match="process 1 of 2: killed"):
        asyncio.run(load())


# --- the beginning ---


def test_a_process_that_has_loaded_waits_for_the_others(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment("cpu", 0).items():
        monkeypatch.setenv(name, value)  # as the ranks do, but undone
    folder = tiny / "cloud"
    rules = split_of_folder(folder, read_manifest(folder, CloudManifest), 1).rules
    order = Load(str(folder), "float32", "cpu", dict(rules), None, SCARCE)
    ours, theirs = map(Line, socket.socketpair())
    with Ranks(1, "cpu") as ranks, ThreadPoolExecutor(1) as beside, closing(ours):
        ranks.start_loading(order)
        part = beside.submit(_load, theirs, order)
        reply: Reply = ours.receive(Reply)
        assert reply.wrong is None
        with pytest.raises(TimeoutError):
            part.result(1)
        ours.send(Begin())
        assert part.result(PATIENCE).pool.pages


@pytest.mark.ranks
def test_the_processes_import_from_where_the_server_does(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('another msgspec')")
    with started(tiny, tmp_path / "log") as (url, _, _), Device(url, open_of(tiny)) as device:
        device.rows(0, EMBEDDINGS[:3])


def nothing_starts(*_: object, **__: object) -> NoReturn:
    raise AssertionError("it would have started processes")


@pytest.mark.parametrize(
    ("kind", "processes", "wrong"),
    [("bert", 2, "seen a model of the kind encoder"), ("llama", 7, "seen 7, which divides neither")],
)
def test_what_cannot_be_split_starts_no_process(
    tiny_exports: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str, processes: int, wrong: str
) -> None:
    monkeypatch.setattr("cloud_backend.serving.Ranks", nothing_starts)
    options = parse([str(tiny_exports(kind) / "cloud"), "--tensor-parallel", str(processes)])
    with pytest.raises(UsageError, match=wrong):
        prepare(options)


def test_options_that_cannot_be_carried_out_start_no_process(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud_backend.serving.Ranks", nothing_starts)
    words = ["serve", str(tiny / "cloud"), "--tensor-parallel", "2", "--tls-cert", "cert.pem"]
    options = command_line().parse_args(words)
    with pytest.raises(UsageError, match="--tls-key"):
        options.command(options)


# --- what cannot be split ---


def test_a_config_that_cannot_be_read_is_named(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BundleError, match=r"config\.json"):
        split_of_folder(tmp_path, read_manifest(tiny / "cloud", CloudManifest), 2)


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
