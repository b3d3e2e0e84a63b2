"""The examples run, as their first lines say, against a real cloud."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import RunningCloud, open_assistant, run_cloud

ROOT = Path(__file__).parents[2]
QUESTION = "the cat sat on the mat"


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.fixture(scope="module")
def wanted(tiny: Path, cloud: RunningCloud) -> str:
    """The device app's greedy answer of 8 tokens."""
    with open_assistant(tiny, cloud.url) as assistant:
        return assistant.chat([{"role": "user", "content": QUESTION}], max_tokens=8).finish().text


def run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """What a Python command prints. Fails where it does."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(export: Path, cloud: RunningCloud) -> Iterator[dict[str, str]]:
    """`stip-device serve` as its own process; gives what the environment of a client needs."""
    key = "stip-for-a-test-of-the-examples"
    command = ["-m", "device_app", "serve", export / "device", "--url", cloud.url, "--port", "0", "--no-history"]
    process = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"STIP_API_KEY": key}
    )
    try:
        assert process.stderr is not None
        said = next((line for line in process.stderr if "/v1" in line), None)
        assert said is not None, "it ended before it was listening"
        threading.Thread(target=lambda: list(process.stderr or ()), daemon=True).start()
        yield {"OPENAI_BASE_URL": said.split()[-1], "OPENAI_API_KEY": key}
    finally:
        process.terminate()
        process.wait(30)


def test_the_openai_package_streams_and_gets_what_fits_a_schema(tiny: Path, cloud: RunningCloud) -> None:
    with serving(tiny, cloud) as environment:
        printed = run("-m", "examples.openai_client", QUESTION, "--max-tokens", "8", environment=environment)
    assert " tokens read, 8 written]" in printed
    assert re.search(r"^name=.* country=.*$", printed, re.MULTILINE)


def test_several_questions_are_asked_at_once(tiny: Path, cloud: RunningCloud, wanted: str) -> None:
    command = ["-m", "examples.async_chat", tiny / "device", cloud.url, QUESTION, "the dog", "--max-tokens", "8"]
    printed = run(*command)
    assert f"> {QUESTION}\n{wanted}\n" in printed
    assert "> the dog\n" in printed


def test_llm_chats_with_the_plugin_installed(tiny: Path, cloud: RunningCloud, wanted: str, tmp_path: Path) -> None:
    site, user = tmp_path / "site", tmp_path / "user"
    shutil.copytree(ROOT / "examples" / "llm_stip", site)
    # What an installation would add to the module: the metadata by which llm finds it.
    metadata = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    subprocess.run([sys.executable, "-c", metadata], cwd=site, capture_output=True, check=True)
    environment = {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "LLM_LOAD_PLUGINS": "llm-stip",  # and none that happens to be installed
        "LLM_USER_PATH": str(user),
        "STIP_BUNDLE": str(tiny / "device"),
        "STIP_URL": cloud.url,
    }
    ask = ["-m", "llm", "-m", "stip", "-o", "max_tokens", "8"]
    assert run(*ask, QUESTION, environment=environment).rstrip("\n") == wanted.rstrip("\n")
    assert run(*ask, "-c", "and then", environment=environment)  # goes on with the conversation
    failed = subprocess.run(
        [sys.executable, *ask, QUESTION],
        env=os.environ | environment | {"STIP_BUNDLE": str(tiny / "cloud")},
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 1
    assert "this is the other half" in failed.stderr and "Traceback" not in failed.stderr
