"""Every command of the README that asks a cloud something works as it is printed there, on models of random weights."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import run_cloud_process

README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = re.findall(r"^(stip-device (?!serve).*)$", README, re.MULTILINE)
[SERVE] = set(re.findall(r"^(stip-device serve .*)$", README, re.MULTILINE))
[CLIENT] = re.findall(
    r"^OPENAI_BASE_URL=http://127\.0\.0\.1:8080/v1 OPENAI_API_KEY=stip-… python -m (.*)$", README, re.MULTILINE
)
MODELS = {  # folder in the README → tiny checkpoint of the same kind
    "smollm2": "llama",
    "minilm": "bert",
    "sentiment": "bert-classifier",
    "vit": "vit",
    "llava": "llava",
    "opus": "marian",
}


@pytest.fixture(scope="module")
def place(tiny_exports: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and images that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    for name, kind in MODELS.items():
        (folder / name).symlink_to(tiny_exports(kind))
    for image in ("photo.jpg", "another.png"):
        Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB").save(folder / image)
    return folder


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    """One cloud that serves all of them."""
    with run_cloud_process(*(place / name / "cloud" for name in MODELS)) as (url, _):
        yield url


def run(command: str, place: Path, url: str) -> str:
    """What a printed command prints."""
    _, *words = shlex.split(command)
    words = [url if word.startswith("ws://") else word for word in words]
    if words[0] in ("chat", "describe", "translate"):
        words += ["--max-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "device_app", *words],
        cwd=place,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "permutation is not encryption" in done.stderr
    return done.stdout


def test_there_is_a_command_for_each_kind_of_use() -> None:
    uses = {re.sub(r"(\S+) (\S+) (\w+)/device.*", r"\2 \3", command) for command in COMMANDS}
    assert uses == {
        "chat smollm2", "embed minilm", "classify sentiment", "classify vit", "chat llava", "describe llava",
        "translate opus",
    }  # fmt: skip
    assert "chat llava/device --url ws://127.0.0.1:8765 --image" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_command_works(command: str, place: Path, url: str) -> None:
    printed = run(command, place, url)
    lines = printed.splitlines()
    if "--json" in command:
        assert json.loads(printed)["finish_reason"] in ("stop", "length")
    elif " embed " in command:
        assert [len(json.loads(line)) for line in lines] == [48, 48]
    elif " classify " in command:
        assert len(lines) == (3 if "--top 3" in command else 1)
        assert all(re.fullmatch(r"LABEL_\d\t0\.\d{6}", line) for line in lines)
    elif " describe " in command:
        assert [line.partition("\t")[0] for line in lines] == ["photo.jpg", "another.png"]
    elif " -p " in command or " translate " in command:
        assert printed.endswith("\n")


def test_the_openai_package_talks_to_what_is_served(place: Path, url: str) -> None:
    _, *words = shlex.split(SERVE)
    words = [url if word.startswith("ws://") else word for word in words]
    serve = [sys.executable, "-m", "device_app", *words, "--port", "0", "--no-history"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    with subprocess.Popen(serve, cwd=place, env=environment, stderr=subprocess.PIPE, text=True) as gateway:
        try:
            assert gateway.stderr is not None
            page = next(found for line in gateway.stderr if (found := re.search(r"(http://\S+)/#key=(\S+)", line)))
            done = subprocess.run(
                [sys.executable, "-m", *shlex.split(CLIENT), "--max-tokens", "60"],
                env=environment | {"OPENAI_BASE_URL": f"{page[1]}/v1", "OPENAI_API_KEY": page[2]},
                capture_output=True,
                text=True,
            )
        finally:
            gateway.terminate()
    assert done.returncode == 0, done.stderr
    assert " written]\n" in done.stdout and "name=" in done.stdout
    assert gateway.returncode == 0
