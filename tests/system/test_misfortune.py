"""A cloud that goes in mid-answer, two programs at once, a full disk: what each face of the device does."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from device_app.assistant import RETRY_SECONDS
from device_app.history import History
from device_app.options import cloud as cloud_options
from device_app.sampler import Sampling
from shared.errors import Cancelled
from tests.conftest import open_assistant, run_cloud, run_cloud_process
from tests.device_app.gateway.asking import client_of
from tests.device_app.gateway.gateways import KEY, RunningGateway, run_gateway
from tests.processes import eventually
from tests.terminals import Terminal

QUESTION: Any = [{"role": "user", "content": "the cat sat on the mat"}]
TOKENS = 200
AT_ONCE = 0.7  # seconds
DRAWN = {"temperature": 1.0, "seed": 3}  # an answer that does not repeat itself, so many round trips


class Cloud:
    """`stip-cloud serve` as a process, which is killed and comes back on the same port. A context manager."""

    def __init__(self, export: Path) -> None:
        self._export = export
        self._running = ExitStack()
        self._port = 0
        self.url = ""

    def __enter__(self) -> Cloud:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self.url, _ = self._running.enter_context(run_cloud_process(self._export / "cloud", port=self._port))
        self._port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        """SIGKILL: it says nothing to anyone."""
        self._running.close()


@pytest.fixture
def cloud(tiny: Path) -> Iterator[Cloud]:
    with Cloud(tiny) as running:
        yield running


@pytest.fixture
def gateway(tiny: Path, cloud: Cloud) -> Iterator[RunningGateway]:
    with run_gateway(tiny, cloud=cloud.url, sessions=2) as running:
        yield running


class PageStream:
    """An answer as the page reads it."""

    def __init__(self, gateway: RunningGateway, text: str, **settings: Any) -> None:
        self._gateway = gateway
        body = json.dumps({"settings": {"temperature": 0, "max_tokens": TOKENS} | settings}).encode()
        self.chat = json.loads(gateway.ask("/api/chats", method="POST", body=body)[2])["id"]
        self._connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
        headers = {"Authorization": f"Bearer {KEY}"}
        self._connection.request("POST", f"/api/chats/{self.chat}/answer", json.dumps({"text": text}), headers)
        self._response = self._connection.getresponse()

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        while True:
            line = self._response.readline()
            assert line, f"the stream ended without {kind}"
            event: dict[str, Any] = json.loads(line.removeprefix(b"data: ")) if line.strip() else {}
            if event.get("kind") == kind:
                return event

    def stop(self) -> None:
        """Presses the button."""
        assert self._gateway.ask(f"/api/chats/{self.chat}/stop", method="POST", body=b"")[0] == 204


def streamed(gateway: RunningGateway, at: int = -1, then: Any = None) -> str:
    """An answer as any OpenAI client reads it; `then` is called at a chunk."""
    with client_of(gateway) as client:
        stream = client.chat.completions.create(
            model="llama", messages=QUESTION, max_tokens=TOKENS, stream=True, **DRAWN
        )
        text = ""
        for number, chunk in enumerate(stream):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            if number == at:
                then()
    return text


def idle_sessions(gateway: RunningGateway) -> int:
    [served] = gateway.gateway.models.values()
    return len(served.pool._idle)


# --- the cloud is gone in mid-answer ---


def test_a_lost_cloud_is_tried_for_ten_minutes() -> None:
    """Unless the user says otherwise: long enough for a tunnel, or a restart."""
    assert RETRY_SECONDS == cloud_options().parse_args(["--url", "ws://localhost"]).retry_seconds == 600


@pytest.mark.parametrize("seconds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_an_answer_goes_on_token_for_token_when_the_cloud_is_back(seconds: float, tiny: Path, cloud: Cloud) -> None:
    lost: list[float] = []
    with open_assistant(tiny, cloud.url) as assistant:
        undisturbed = assistant.chat(QUESTION, sampling=Sampling(**DRAWN), max_tokens=TOKENS).finish()
    with open_assistant(tiny, cloud.url, on_lost=lambda: lost.append(time.monotonic())) as assistant:
        answer = assistant.chat(QUESTION, sampling=Sampling(**DRAWN), max_tokens=TOKENS)
        for _ in range(10):
            next(answer)
        cloud.kill()
        threading.Timer(seconds, cloud.start).start()
        began = time.monotonic()
        answer.finish()
        assert time.monotonic() - began > seconds - 1
    assert answer.ids == undisturbed.ids and answer.text == undisturbed.text
    assert len(lost) == 1 and answer.stats.counters.replays == 1


def test_any_client_and_the_page_get_the_whole_answer_when_the_cloud_is_back(
    gateway: RunningGateway, cloud: Cloud
) -> None:
    whole = streamed(gateway)
    page = PageStream(gateway, QUESTION[0]["content"], **DRAWN)
    expected = page.until("done")["text"]

    def restart() -> None:
        cloud.kill()
        threading.Timer(2, cloud.start).start()

    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(lambda: streamed(gateway, 3, restart))
        page = PageStream(gateway, QUESTION[0]["content"], **DRAWN)
        assert page.until("done")["text"] == expected
        assert other.result(60) == whole


def test_stop_works_at_once_while_the_cloud_is_gone(tiny: Path, cloud: Cloud) -> None:
    assistant = open_assistant(tiny, cloud.url)
    answer = assistant.chat(QUESTION, sampling=Sampling(**DRAWN), max_tokens=TOKENS)
    next(answer)
    cloud.kill()
    pressed: list[float] = []
    threading.Timer(1.5, lambda: (pressed.append(time.monotonic()), answer.cancel())).start()
    with pytest.raises(Cancelled):
        answer.finish()
    assert time.monotonic() - pressed[0] < AT_ONCE
    assert answer.text and answer.finish_reason == "cancelled"


def test_a_client_that_leaves_while_the_cloud_is_gone_frees_its_session_at_once(
    gateway: RunningGateway, cloud: Cloud
) -> None:
    with client_of(gateway) as client:
        stream = client.chat.completions.create(
            model="llama", messages=QUESTION, max_tokens=TOKENS, stream=True, **DRAWN
        )
        next(iter(stream))
        cloud.kill()
        time.sleep(1)
        assert idle_sessions(gateway) == 0
        stream.close()
    assert eventually(lambda: idle_sessions(gateway) == 1, AT_ONCE)
    cloud.start()
    assert streamed(gateway)


def test_the_page_stops_at_once_while_the_cloud_is_gone_and_keeps_what_there_was(
    gateway: RunningGateway, cloud: Cloud
) -> None:
    page = PageStream(gateway, QUESTION[0]["content"], **DRAWN)
    page.until("html")
    cloud.kill()
    time.sleep(1)
    page.until("figures")  # they still come, so the page can say how long nothing came from the cloud
    began = time.monotonic()
    page.stop()
    assert time.monotonic() - began < AT_ONCE
    done = page.until("done")
    assert done["finish_reason"] == "cancelled"
    assert gateway.gateway.history.messages(page.chat)[1].content == done["text"] != ""


def test_the_terminal_says_so_and_ctrl_c_works_while_the_cloud_is_gone(
    tiny: Path, cloud: Cloud, tmp_path: Path
) -> None:
    environment = os.environ | {"TERM": "dumb", "XDG_DATA_HOME": str(tmp_path)}
    options = ("--max-tokens", TOKENS, "--temperature", 1, "--seed", 3)
    talk = Terminal("chat", tiny / "device", "--url", cloud.url, *options, environment=environment)
    talk.expect("Ctrl-D leaves")
    talk.expect("\n> ")
    talk.write("the cat\n")
    talk.expect(r"the cat\r\n.*\w")
    cloud.kill()
    talk.expect("connection lost; trying again, the answer will go on")
    time.sleep(1)
    talk.write("\x03")
    talk.expect(r"\[stopped\]", 2)
    talk.expect("\n> ")
    cloud.start()
    talk.write("the dog\n")
    talk.expect("tokens/s")
    talk.expect("\n> ")
    talk.write("\x04")
    assert talk.leave() == 0
    talk.close()


# --- two at once ---


def test_two_programs_and_the_page_at_once_get_what_they_get_alone(tiny: Path) -> None:
    with run_cloud(tiny) as running, run_gateway(tiny, cloud=running.url, sessions=2) as gateway:
        alone = streamed(gateway)
        paged = PageStream(gateway, "all of them went home").until("done")["text"]
        with ThreadPoolExecutor(3) as threads:
            others = [threads.submit(streamed, gateway) for _ in range(2)]
            page = threads.submit(lambda: PageStream(gateway, "all of them went home").until("done")["text"])
            assert [other.result(60) for other in others] == [alone, alone]
            assert page.result(60) == paged


def test_a_talk_and_a_gateway_keep_their_chats_in_one_file(tiny: Path, tmp_path: Path) -> None:
    environment = os.environ | {"TERM": "dumb", "XDG_DATA_HOME": str(tmp_path), "STIP_API_KEY": KEY}
    with run_cloud(tiny) as running:
        command = [sys.executable, "-m", "device_app", "serve", tiny / "device", "--url", running.url, "--port", "0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stderr is not None
            [port] = [line.rpartition(":")[2].strip(" /\n") for line in process.stderr if "page at" in line][:1] or [""]
        except BaseException:
            process.kill()
            raise
    assert port
