"""Replicas under a real Ray Serve, with devices that answer while replicas are killed, come and go."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from device_app.answer import Answer
from device_app.assistant import Assistant
from shared.errors import BundleError, UsageError
from tests.cloud_backend.asking import get
from tests.cloud_backend.own_network import own_network
from tests.conftest import open_assistant, run_cloud

ROOT = Path(__file__).parents[2]
PROMPTS = [f"Device {number} asks what the capital of France is." for number in range(10)]
TOKENS = 64
PATIENCE = 60.0  # seconds; replicas take their time to start where processors are few

needs_ray = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of one node with 4 CPUs in a network of its own; gives the URL of its proxy."""
    import ray
    from ray import serve

    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",  # it would write a token to the home of whoever runs the tests
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with own_network(), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"ws://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture
def serving(cluster: str, tiny: Path) -> Iterator[Callable[..., str]]:
    """Serves the tiny llama with these options until the test ends; gives its URL."""
    from ray import serve

    from cloud_backend.ray_serve import application

    def start(*options: str) -> str:
        words = [str(tiny / "cloud"), "--cpus", "0.5", "--kv-bytes", "64M", *options]
        serve.run(application(words), name="stip", route_prefix="/")
        return cluster

    yield start
    serve.delete("stip")


@pytest.fixture(scope="module")
def wanted(tiny: Path) -> list[list[int]]:
    """What each prompt is answered where nothing happens."""
    with run_cloud(tiny) as cloud, open_assistant(tiny, cloud.url) as assistant:
        return [assistant.complete(prompt, max_tokens=TOKENS).finish().ids for prompt in PROMPTS]


def replica_processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may end meanwhile
            if "ServeReplica:stip" in " ".join(child.cmdline()):
                found.append(child)
    return found


def running_replicas() -> int:
    """As Ray Serve counts them."""
    from ray import serve

    states = serve.status().applications["stip"].deployments["Cloud"].replica_states
    return int(states.get("RUNNING", 0)) if set(states) == {"RUNNING"} else 0


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether `holds` becomes true in time."""
    deadline = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.2)
    return holds()


@dataclass
class Devices:
    """Devices that answer their prompts over and over, each in a thread."""

    folder: Path
    answers: dict[int, list[Answer]] = field(default_factory=dict)  # by the number of the device
    failures: list[BaseException] = field(default_factory=list)
    _leaving: dict[int, threading.Event] = field(default_factory=dict)
    _threads: dict[int, threading.Thread] = field(default_factory=dict)

    def come(self, url: str, numbers: Sequence[int], each: Callable[[Answer], object] = lambda answer: None) -> None:
        """each: called after every piece of text."""
        for number in numbers:
            self.answers[number], self._leaving[number] = [], threading.Event()
            self._threads[number] = threading.Thread(target=self._live, args=(url, number, each), daemon=True)
            self._threads[number].start()

    def leave(self, numbers: Sequence[int]) -> None:
        """After the answer that each of them is at."""
        for number in numbers:
            self._leaving[number].set()
        for number in numbers:
            self._threads[number].join(PATIENCE)
            assert not self._threads[number].is_alive()

    def all_answered(self, times: int = 1) -> bool:
        """Whether everyone has so many answers."""
        return all(len(answers) >= times for answers in self.answers.values())

    def _live(self, url: str, number: int, each: Callable[[Answer], object]) -> None:
        try:
            with open_assistant(self.folder, url, retry_seconds=PATIENCE) as assistant:
                while True:
                    self.answers[number].append(_answered(assistant, PROMPTS[number], each))
                    if self._leaving[number].wait(0.2):
                        return
        except BaseException as failure:
            self.failures.append(failure)
            raise


def _answered(assistant: Assistant, prompt: str, each: Callable[[Answer], object]) -> Answer:
    answer = assistant.complete(prompt, max_tokens=TOKENS)
    for _ in answer:
        each(answer)
    return answer


@pytest.fixture
def devices(tiny: Path) -> Iterator[Devices]:
    """Nobody yet; whoever comes leaves at the end of the test."""
    devices = Devices(tiny)
    yield devices
    devices.leave(list(devices.answers))


@needs_ray
def test_a_killed_replica_costs_no_answer(
    serving: Callable[..., str], devices: Devices, wanted: list[list[int]]
) -> None:
    url = serving("--min-replicas", "2")
    half_way, go_on = threading.Barrier(9), threading.Event()

    def each(answer: Answer) -> None:
        if len(answer.ids) >= 8 and not go_on.is_set() and answer not in waiting:
            waiting.append(answer)
            half_way.wait(PATIENCE)
            go_on.wait(PATIENCE)

    waiting: list[Answer] = []
    devices.come(url, range(8), each)
    half_way.wait(PATIENCE)
    victim, survivor = replica_processes()
    victim.send_signal(signal.SIGKILL)
    go_on.set()
    assert eventually(devices.all_answered)
    devices.leave(range(8))

    assert not devices.failures
    assert [devices.answers[number][0].ids for number in range(8)] == wanted[:8]
    counters = [devices.answers[number][0].stats.counters for number in range(8)]
    moved = sum(each.replays > 0 for each in counters)
    assert 0 < moved < 8 and not any(each.resumes for each in counters)
    assert eventually(lambda: running_replicas() == 2)
    assert survivor in replica_processes() and victim not in replica_processes()


@needs_ray
def test_replicas_that_come_and_go_cost_no_session(
    serving: Callable[..., str], devices: Devices, wanted: list[list[int]]
) -> None:
    scaling = ("--max-replicas", "2", "--target-sessions", "6", "--upscale-seconds", "0", "--downscale-seconds", "1")
    url = serving(*scaling, "--drain-seconds", "90")  # it would be killed long after our patience
    devices.come(url, range(7))
    assert eventually(lambda: running_replicas() == 2)
    devices.come(url, range(7, 10))  # they find the new one
    assert eventually(devices.all_answered)
    before = {number: len(answers) for number, answers in devices.answers.items()}
    devices.leave(range(4))
    assert eventually(lambda: running_replicas() == 1 and len(replica_processes()) == 1)
    after = {number: len(answers) for number, answers in devices.answers.items()}
    assert eventually(lambda: all(len(devices.answers[number]) > after[number] for number in range(4, 10)))
    devices.leave(range(4, 10))

    assert not devices.failures
    for number, answers in devices.answers.items():
        assert all(answer.ids == wanted[number] for answer in answers)
    since = [devices.answers[number][before[number] :] for number in range(4, 10)]
    moved = [answers for answers in since if any(answer.stats.counters.replays for answer in answers)]
    assert 0 < len(moved) <= 3  # who was between two answers has nothing to replay


@needs_ray
def test_a_replica_says_how_it_is_and_when_it_is_full(serving: Callable[..., str], tiny: Path) -> None:
    from shared import wire
    from tests.cloud_backend.device import Device, close_code, dial, open_of

    url = serving("--max-sessions", "1")
    assert get(url, "/healthz") == (200, "ok\n") and "stip_sessions_open" in get(url, "/metrics")[1]
    with Device(url, open_of(tiny)) as device:
        assert device.opened.kv_length == 0
        with dial(url) as second:
            refused: Any = wire.decode(second.recv(PATIENCE))  # type: ignore[arg-type]
            assert refused.code == "too_many_sessions" and refused.retryable
            assert close_code(second) == 1013


@needs_ray
@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (
            ["--cpus", "1000"],
            "seen 4 CPUs and 0 GPUs on 1 nodes, room for 0 replicas of 1000 CPUs and 0",
        ),
        (["--gpus", "1"], "seen 4 CPUs and 0 GPUs on 1 nodes, room for 0 replicas of 1 CPUs and 1 GPUs"),
        (["--cpus", "2", "--min-replicas", "3"], "room for 2 replicas of 2 CPUs and 0 GPUs, wanted 3"),
        (["--gpus", "1", "--tensor-parallel", "2"], "--gpus: seen 1, wanted one for each of --tensor-parallel 2"),
        (["--device", "cuda"], "--device cuda: seen --gpus 0"),
        (["--min-replicas", "2", "--max-replicas", "1"], "--max-replicas: seen 1, wanted 2 or more"),
        (
            ["--max-replicas", "2", "--max-sessions", "32"],
            "--target-sessions: seen 64, wanted fewer than --max-sessions, 32",
        ),
        (["--port", "80"], "--port: this server does not listen by itself"),
    ],
)
def test_what_a_cluster_cannot_do_is_a_usage_error(cluster: str, tiny: Path, options: list[str], seen: str) -> None:
    from cloud_backend.ray_serve import application

    with pytest.raises(UsageError) as caught:
        application([str(tiny / "cloud"), *options])
    assert seen in str(caught.value) and caught.value.hint
    assert caught.value.__notes__ == [f"hint: {caught.value.hint}"]  # Ray shows the traceback alone


@needs_ray
def test_a_folder_that_is_not_there_is_an_error_before_anything_is_deployed(cluster: str, tmp_path: Path) -> None:
    from cloud_backend.ray_serve import application

    with pytest.raises(BundleError) as caught:
        application({"folders": str(tmp_path / "none")})
    assert caught.value.hint


@needs_ray
def test_the_deployed_file_is_one_that_ray_serve_and_the_builder_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    from cloud_backend.ray_serve import _add_replicas, _check
    from cloud_backend.words import parse

    config = yaml.safe_load((ROOT / "deploy" / "ray.yaml").read_text())
    (app,) = ServeDeploySchema.model_validate(config).applications
    assert app.import_path == "cloud_backend.ray_serve:application"
    options = parse(app.args, _add_replicas)
    _check(options)
    assert options.token_file and config["http_options"]["ssl_certfile"]


def test_a_missing_ray_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "cloud_backend.ray_serve", raising=False)
    with pytest.raises(UsageError, match="the package 'ray' is not installed") as caught:
        import cloud_backend.ray_serve  # noqa: F401
    assert caught.value.hint == "pip install 'stip[cloud,ray]'"
