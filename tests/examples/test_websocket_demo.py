"""The demo of the raw protocol, against a real cloud: it says what the device app says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_app.bundle import Bundle
from examples.websocket_demo import frames
from examples.websocket_demo.client import Device, answer
from shared.wire import Append, decode
from tests.conftest import RunningCloud, open_assistant, run_cloud

DEMO = Path(__file__).parents[2] / "examples" / "websocket_demo"
PROMPT = "the cat sat on the"
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.fixture(scope="module")
def wanted(tiny: Path, cloud: RunningCloud) -> str:
    """The device app's greedy continuation."""
    with open_assistant(tiny, cloud.url) as assistant:
        return assistant.complete(PROMPT, max_tokens=12).finish().text


def whole(text: str) -> str:
    """A text without the character that was cut at its end: the demo never shows it."""
    return text.rstrip("\ufffd")


def test_the_client_says_what_the_device_app_says(tiny: Path, cloud: RunningCloud, wanted: str) -> None:
    pieces = list(answer(Device(tiny / "device"), cloud.url, PROMPT, 12, None, False))
    assert len(pieces) > 1  # it streams
    assert whole("".join(pieces)) == whole(wanted)


def test_the_client_rotates_too(tiny_exports: Callable[..., Path]) -> None:
    export = tiny_exports("llama", scheme="rotation")
    with run_cloud(export) as cloud, open_assistant(export, cloud.url) as assistant:
        text = assistant.complete(PROMPT, max_tokens=12).finish().text
        pieces = list(answer(Device(export / "device"), cloud.url, PROMPT, 12, None, False))
    assert whole("".join(pieces)) == whole(text)


def test_the_command_shows_the_frames_and_no_secret(tiny: Path, cloud: RunningCloud) -> None:
    command = [sys.executable, "-m", "examples.websocket_demo.client", tiny / "device", cloud.url, PROMPT]
    run = subprocess.run([*command, "--max-tokens", "3", "--frames"], capture_output=True, text=True, check=True)
    assert run.stdout.strip()
    assert run.stderr.count("▶") == run.stderr.count("◀") == 4  # Open, the prompt, and two tokens
    assert re.findall(r'"resume": "([^"]*)"', run.stderr) == ["…"]


def test_an_error_of_the_cloud_is_told(tiny: Path, cloud: RunningCloud) -> None:
    device = Device(tiny / "device")
    device.manifest["key_id"] = "another's"
    with pytest.raises(RuntimeError, match="wrong_key"):
        list(answer(device, cloud.url, PROMPT, 1, None, False))


def test_a_frame_of_the_demo_is_one_of_the_protocol(tiny: Path) -> None:
    rows = Device(tiny / "device").hidden([1, 2, 3], 0)
    frame = frames.write({"type": "append", "seq": 7, "keep": 3, "rows": 1, "top_k": 1}, rows)
    message = decode(frame)
    assert isinstance(message, Append)
    assert (message.seq, message.keep, message.embeddings.tolist()) == (7, 3, rows.tolist())


@pytest.mark.skipif(NODE is None, reason="node runs the page's modules")
def test_the_page_says_what_the_device_app_says(tiny: Path, cloud: RunningCloud, wanted: str) -> None:
    texts = ["the cat", "it's  2024\n\n\tnow…", "naïve 🚗 café", "<|user|>hi</s>", " "]
    script = [Path(__file__).with_name("websocket_page.mjs"), DEMO, tiny / "device", cloud.url, PROMPT, "12"]
    command = [str(NODE), "--no-warnings", "--experimental-websocket", *script, json.dumps(texts)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert whole(said["text"]) == whole(wanted)
    tokenizer = Bundle.open(tiny / "device").tokenizer
    assert said["encoded"] == [tokenizer.encode(text) for text in texts]
    assert said["frames"]["up"] == said["frames"]["down"] <= 13
