"""A cloud that goes in mid-answer, two programs at once, a full disk: what each face of the device does."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
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
from tests.conftest import RunningCloud, open_assistant, run_cloud, run_cloud_process
from tests.device_app.gateway.asking import client_of
from tests.device_app.gateway.gateways import KEY, RunningGateway, run_gateway
from tests.processes import eventually
from tests.system.line import Line
from tests.terminals import Terminal

ON_BOTH_ENGINES = True
QUESTION: Any = [{"role": "user", "content": "the cat sat on the mat"}]
TOKENS = 200
AT_ONCE = 0.7  # seconds
DRAWN = {"temperature": 1.0, "seed": 3}  # an answer that does not repeat itself, so many round trips


class Tunnel(Line):
    """A line that can be gone for a while: what is open breaks, and nothing new comes through. A context manager."""

    def __init__(self, cloud: int) -> None:
        self.closed = False
        super().__init__(cloud)

    def close(self) -> None:
        self.closed = True
        self.cut()

    def open(self) -> None:
        self.closed = False

    def _carry(self, device: socket.socket) -> None:
        if self.closed:
            device.close()
        else:
            super()._carry(device)


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.fixture
def tunnel(cloud: RunningCloud) -> Iterator[Tunnel]:
    with Tunnel(int(cloud.url.rpartition(":")[2])) as line:
        yield line


@pytest.fixture
def gateway(tiny: Path, tunnel: Tunnel) -> Iterator[RunningGateway]:
    with run_gateway(tiny, cloud=tunnel.url, sessions=2) as running:
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


@pytest.mark.slow
def test_an_answer_goes_on_token_for_token_when_a_killed_cloud_is_back(tiny: Path, seconds: float = 20) -> None:
    lost: list[float] = []
    drawn, life = Sampling(**DRAWN), ExitStack()  # type: ignore[arg-type]
    with life:
        url, _ = life.enter_context(run_cloud_process(tiny / "cloud"))
        with open_assistant(tiny, url) as assistant:
            undisturbed = assistant.chat(QUESTION, sampling=drawn, max_tokens=TOKENS).finish()
        with open_assistant(tiny, url, on_lost=lambda: lost.append(time.monotonic())) as assistant:
            answer = assistant.chat(QUESTION, sampling=drawn, max_tokens=TOKENS)
            for _ in range(10):
                next(answer)
            life.close()  # SIGKILL: it says nothing to anyone

            def restart() -> None:
                time.sleep(seconds)
                life.enter_context(run_cloud_process(tiny / "cloud", port=int(url.rpartition(":")[2])))

            with ThreadPoolExecutor(1) as thread:
                restarted = thread.submit(restart)
                answer.finish()
                restarted.result()
    assert answer.ids == undisturbed.ids and answer.text == undisturbed.text
    assert len(lost) == 1 and answer.stats.counters.replays == 1


def test_any_client_and_the_page_get_the_whole_answer_when_the_cloud_is_back(
    gateway: RunningGateway, tunnel: Tunnel
) -> None:
    whole = streamed(gateway)
    page = PageStream(gateway, QUESTION[0]["content"], **DRAWN)
    expected = page.until("done")["text"]

    def restart() -> None:
        tunnel.close()
        threading.Timer(2, tunnel.open).start()

    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(lambda: streamed(gateway, 3, restart))
        page = PageStream(gateway, QUESTION[0]["content"], **DRAWN)
        assert page.until("done")["text"] == expected
        assert other.result(60) == whole


def test_stop_works_at_once_while_the_cloud_is_gone(tiny: Path, tunnel: Tunnel) -> None:
    assistant = open_assistant(tiny, tunnel.url)
    answer = assistant.chat(QUESTION, sampling=Sampling(**DRAWN), max_tokens=TOKENS)
    next(answer)
    tunnel.close()
    pressed: list[float] = []
    threading.Timer(1.5, lambda: (pressed.append(time.monotonic()), answer.cancel())).start()
    with pytest.raises(Cancelled):
        answer.finish()
    assert time.monotonic() - pressed[0] < AT_ONCE
    assert answer.text and answer.finish_reason == "cancelled"


def test_a_client_that_leaves_while_the_cloud_is_gone_frees_its_session_at_once(
    gateway: RunningGateway, tunnel: Tunnel
) -> None:
    with client_of(gateway) as client:
        stream = client.chat.completions.create(
            model="llama", messages=QUESTION, max_tokens=TOKENS, stream=True, **DRAWN
        )
        next(iter(stream))
        tunnel.close()
        time.sleep(1)
        assert idle_sessions(gateway) == 0
        stream.close()
    assert eventually(lambda: idle_sessions(gateway) == 1, AT_ONCE)
    tunnel.open()
    assert streamed(gateway)


def test_the_page_stops_at_once_while_the_cloud_is_gone_and_keeps_what_there_was(
    gateway: RunningGateway, tunnel: Tunnel
) -> None:
    page = PageStream(gateway, QUESTION[0]["content"], **DRAWN)
    page.until("html")
    tunnel.close()
    time.sleep(1)
    page.until("figures")  # they still come, so the page can say how long nothing came from the cloud
    began = time.monotonic()
    page.stop()
    assert time.monotonic() - began < AT_ONCE
    done = page.until("done")
    assert done["finish_reason"] == "cancelled"
    assert gateway.gateway.history.messages(page.chat)[1].content == done["text"] != ""


def test_the_terminal_says_so_and_ctrl_c_works_while_the_cloud_is_gone(
    tiny: Path, tunnel: Tunnel, tmp_path: Path
) -> None:
    environment = os.environ | {"TERM": "dumb", "XDG_DATA_HOME": str(tmp_path)}
    options = ("--max-tokens", TOKENS, "--temperature", 1, "--seed", 3)
    talk = Terminal("chat", tiny / "device", "--url", tunnel.url, *options, environment=environment)
    talk.expect("Ctrl-D leaves")
    talk.expect("\n> ")
    talk.write("the cat\n")
    talk.expect(r"the cat\r\n.*\w")
    tunnel.close()
    talk.expect("connection lost; trying again, the answer will go on")
    time.sleep(1)
    talk.write("\x03")
    talk.expect(r"\[stopped\]", 2)
    talk.expect("\n> ")
    tunnel.open()
    talk.write("the dog\n")
    talk.expect(r"the dog\r\n.*\w")
    talk.write("\x03")
    talk.expect(r"\[stopped\]")
    talk.expect("\n> ")
    talk.write("\x04")
    assert talk.leave() == 0
    talk.close()


# --- what is said to the page ---


def said_to_the_page(gateway: RunningGateway, body: bytes) -> tuple[int, list[dict[str, Any]]]:
    """The status and the events of a question in a fresh chat, or the error."""
    chat = json.loads(gateway.ask("/api/chats", method="POST", body=b"{}")[2])["id"]
    status, _, answer = gateway.ask(f"/api/chats/{chat}/answer", method="POST", body=body)
    if status != 200:
        return status, [json.loads(answer)]
    return status, [json.loads(line.removeprefix("data: ")) for line in answer.decode().split("\n\n") if line]


def test_a_paste_of_100000_characters_is_told_on_the_page_to_be_too_long(gateway: RunningGateway) -> None:
    status, events = said_to_the_page(gateway, json.dumps({"text": "rain " * 20_000}).encode())
    [error] = [event for event in events if event["kind"] == "error"]
    assert status == 200 and re.search(r"\d+ tokens, wanted at most \d+", error["message"])


@pytest.mark.parametrize(
    "body", [b'{"text": "the cat \xe2\x82"}', b'{"text": "the cat \\ud83d"}'], ids=["UTF-8", "JSON"]
)
def test_half_a_character_is_refused_by_the_page_and_the_api(body: bytes, gateway: RunningGateway) -> None:
    assert said_to_the_page(gateway, body)[0] == 400
    message = body.replace(b"text", b"content").replace(b"{", b'{"role": "user", ')
    whole = b'{"model": "llama", "messages": [' + message + b"]}"
    assert gateway.ask("/v1/chat/completions", method="POST", body=whole)[0] == 400


# --- two at once ---


def test_two_programs_and_the_page_at_once_get_what_they_get_alone(gateway: RunningGateway) -> None:
    alone = streamed(gateway)
    paged = PageStream(gateway, "all of them went home").until("done")["text"]
    with ThreadPoolExecutor(3) as threads:
        others = [threads.submit(streamed, gateway) for _ in range(2)]
        page = threads.submit(lambda: PageStream(gateway, "all of them went home").until("done")["text"])
        assert [other.result(60) for other in others] == [alone, alone]
        assert page.result(60) == paged


def test_a_talk_and_a_gateway_keep_their_chats_in_one_file(tiny: Path, cloud: RunningCloud, tmp_path: Path) -> None:
    path = tmp_path / "stip" / "history.sqlite3"
    environment = os.environ | {"TERM": "dumb", "XDG_DATA_HOME": str(tmp_path)}
    with run_gateway(tiny, cloud=cloud.url, history=History.open(path)) as gateway:
        talk = Terminal("chat", tiny / "device", "--url", cloud.url, "--max-tokens", 50, environment=environment)
        talk.expect("\n> ")
        talk.write("the cat\n")
        page = PageStream(gateway, "the dog", max_tokens=50)
        page.until("done")
        talk.expect("tokens/s")
        listed = json.loads(gateway.ask("/api/chats")[2])
        assert {chat["title"] for chat in listed} == {"the cat", "the dog"}
        talk.expect("\n> ")
        talk.write("/chats dog\n")
        talk.expect("the dog")
        talk.expect("\n> ")
        talk.write("/delete 1\n")
        talk.expect("Deleted: the dog")
        assert gateway.ask(f"/api/chats/{page.chat}")[0] == 404
        talk.expect("\n> ")
        talk.write("\x04")
        assert talk.leave() == 0
        talk.close()
