"""Clients that mean harm, each a process of its own: they hurt themselves, and not the device beside them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from cloud_backend.tokens import add_token
from shared import wire
from tests.cloud_backend.device import PATIENCE, Device, decode_greedily, dial, open_of, table
from tests.cloud_backend.hostile import ATTACKS
from tests.conftest import ENGINES, run_cloud_process
from tests.processes import Held, at_rest, eventually, held_by, metric

pytestmark = pytest.mark.alone

MAX_FRAME, WINDOW, TOKEN_SESSIONS = 2**16, 2**18, 8
TOKENS = 200  # in a row, for the median of their latency
SLOWER = 5.0  # times as long, at most, a token takes beside an attack
MOST_ROUNDS = 3  # the machine is shared: another program that spoils one of them does not spoil all
QUICKEST = 0.003  # seconds; below it the machine's own noise is all there is
MOST_MEMORY = 32 * 2**20  # bytes more beside an attack, above what the interpreter takes at times
HUGE = 3e38  # finite in float32; its square is not


@dataclass(frozen=True)
class Guarded:
    """A server that wants tokens."""

    url: str
    pid: int
    honest: wire.Open
    hostile: wire.Open

    def held(self) -> Held:
        return held_by(self.pid)


@pytest.fixture(scope="module")
def guarded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.txt"
    honest, hostile = (open_of(tiny, token=add_token(tokens, name)) for name in ("honest", "hostile"))
    options = {"--max-frame": MAX_FRAME, "--window": WINDOW, "--token-sessions": TOKEN_SESSIONS, "--grace-seconds": 1}
    arguments = [str(word) for option in options.items() for word in option]
    with run_cloud_process(tiny / "cloud", "--token-file", tokens, *arguments) as (url, process):
        yield Guarded(url, process.pid, honest, hostile)


@contextmanager
def attacked(guarded: Guarded, kind: str) -> Iterator[None]:
    """While the block runs, someone attacks."""
    command = [sys.executable, "-m", "tests.cloud_backend.hostile", kind, guarded.url]
    attacker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert attacker.stdin is not None and attacker.stdout is not None
    try:
        attacker.stdin.write(wire.encode(guarded.hostile))
        attacker.stdin.close()
        assert attacker.stdout.readline() == b"attacking\n"
        yield
        assert attacker.poll() is None, "the attack is over already"
    finally:
        attacker.kill()
        attacker.wait()
        attacker.stdout.close()


def decode(device: Device, on_token: Callable[[], object] = lambda: None) -> tuple[list[np.ndarray], float]:
    """Rows of a greedy answer, and the median time of a token in seconds."""
    seconds: list[float] = []

    def step(keep: int, embeddings: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        rows = device.rows(keep, embeddings)
        seconds.append(time.perf_counter() - started)
        on_token()
        return rows

    return decode_greedily(step, TOKENS), median(seconds)


@dataclass(frozen=True)
class Round:
    """What an honest device got alone, and beside an attack."""

    alone: list[np.ndarray]  # rows of its answer
    beside: list[np.ndarray]
    quick: float  # median seconds a token
    slow: float
    memory: int  # bytes more that the server had beside the attack

    @property
    def at_pace(self) -> bool:
        return self.slow < SLOWER * max(self.quick, QUICKEST)


def attacked_once(guarded: Guarded, kind: str) -> Round:
    with Device(guarded.url, guarded.honest) as device:
        alone, quick = decode(device)
    before = at_rest(guarded.pid)
    memory: list[int] = []
    # Who comes in the middle of it is let in.
    with attacked(guarded, kind), Device(guarded.url, guarded.honest) as device:
        beside, slow = decode(device, lambda: memory.append(guarded.held().memory))
    done = Round(alone, beside, quick, slow, max(memory) - before.memory)
    print(f"{kind}: {1e3 * quick:.1f} ms a token, {1e3 * slow:.1f} beside it; {done.memory:,} bytes more")
    return done


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_costs_the_device_beside_it_neither_its_answer_nor_its_pace(guarded: Guarded, kind: str) -> None:
    """Nor the server its memory; and once it is over, all that it took is given back."""
    before = at_rest(guarded.pid)
    rounds = [attacked_once(guarded, kind)]
    while not rounds[-1].at_pace and len(rounds) < MOST_ROUNDS:
        rounds.append(attacked_once(guarded, kind))
    for one in rounds:
        np.testing.assert_allclose(one.beside, one.alone, rtol=0, atol=1e-4)
        assert one.memory < MOST_MEMORY, f"{one.memory:,} bytes"
    assert rounds[-1].at_pace, [(one.quick, one.slow) for one in rounds]
    for name in ("stip_sessions_open", "stip_sessions_held", "stip_kv_used_bytes", "stip_requests_waiting"):
        assert eventually(lambda: metric(guarded.url, name) == 0, PATIENCE), name  # noqa: B023  # used at once
    assert eventually(lambda: guarded.held().descriptors <= before.descriptors, PATIENCE)
    assert guarded.held().threads <= before.threads


def test_a_token_has_so_many_sessions_and_another_token_its_own(guarded: Guarded) -> None:
    with ExitStack() as sessions:
        for _ in range(TOKEN_SESSIONS):
            sessions.enter_context(Device(guarded.url, guarded.hostile))
        with dial(guarded.url) as one_more:
            one_more.send(wire.encode(guarded.hostile))
            error = wire.decode(one_more.recv(PATIENCE))  # type: ignore[arg-type]
            assert isinstance(error, wire.Error) and error.code == "too_many_sessions"
        with Device(guarded.url, guarded.honest) as other:
            assert other.opened.kv_length == 0


# --- embeddings that no model was made for ---


@dataclass(frozen=True)
class LayerNorms:
    """A server, its export, and how far the same answer may differ."""

    url: str
    export: Path
    tolerance: float


@pytest.fixture(scope="module", params=ENGINES)
def layer_norms(request: pytest.FixtureRequest, tiny_exports: Callable[..., Path]) -> Iterator[LayerNorms]:
    """A server of a model that makes NaN of what is too large: its norms subtract the mean."""
    # llama.cpp looks GELU up in a table of float16, which makes more of the order of sums.
    gguf, tolerance = ("f32", 1e-2) if request.param == "llama.cpp" else (None, 1e-4)
    export = tiny_exports("gpt2", gguf=gguf)
    with run_cloud_process(export / "cloud") as (url, _):
        yield LayerNorms(url, export, tolerance)


def poison(device: Device, stop: Callable[[], bool]) -> list[str]:
    """Appends huge embeddings until `stop`; gives the codes of the answers."""
    codes = []
    huge = np.full((3, table().shape[1]), HUGE, np.float32)
    while not stop():
        reply = device.ask(device.append(0, huge))
        codes.append(reply.code if isinstance(reply, wire.Error) else type(reply).__name__)
    return codes


def test_sessions_that_make_nan_fail_alone(layer_norms: LayerNorms) -> None:
    url, export = layer_norms.url, layer_norms.export
    honest, count = 4, 40
    with ExitStack() as sessions:
        devices = [sessions.enter_context(Device(url, open_of(export))) for _ in range(honest)]
        poisoned = [sessions.enter_context(Device(url, open_of(export))) for _ in range(3)]
        alone = [decode_greedily(device.rows, count, first=first) for first, device in enumerate(devices)]
        over = threading.Event()
        with ThreadPoolExecutor(honest + len(poisoned)) as threads:
            failing = [threads.submit(poison, device, over.is_set) for device in poisoned]
            answers = [
                threads.submit(decode_greedily, device.rows, count, first=first) for first, device in enumerate(devices)
            ]
            try:
                beside = [answer.result(PATIENCE) for answer in answers]
            finally:
                over.set()
            codes = [code for one in failing for code in one.result(PATIENCE)]
    assert set(codes) == {"internal"} and len(codes) > 3
    np.testing.assert_allclose(beside, alone, rtol=0, atol=layer_norms.tolerance)


def test_memory_that_held_nan_serves_the_next_session_as_new(layer_norms: LayerNorms) -> None:
    url, export = layer_norms.url, layer_norms.export
    with Device(url, open_of(export)) as device:
        expected = decode_greedily(device.rows, 20)
    for _ in range(3):
        with ExitStack() as sessions:
            for _ in range(6):
                poisoned = sessions.enter_context(Device(url, open_of(export)))
                length = poisoned.opened.context
                huge = np.full((length, table().shape[1]), HUGE, np.float32)
                assert poisoned.ask(poisoned.append(0, huge)).code == "internal"
        with ExitStack() as sessions:
            for _ in range(6):
                device = sessions.enter_context(Device(url, open_of(export)))
                rows = decode_greedily(device.rows, 20)
                np.testing.assert_allclose(rows, expected, rtol=0, atol=layer_norms.tolerance)
