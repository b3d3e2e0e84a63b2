"""An environment with only the `device` extra, as on a car's computer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_cloud_process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def device_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment made as the README says, from a copy of the project."""
    folder = tmp_path_factory.mktemp("device-only")
    for name in ("pyproject.toml", "README.md", "LICENSE", "shared", "export", "cloud_backend", "device_app"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, f"{folder}[device]"], check=True)
    return python


def test_the_device_extra_brings_neither_torch_nor_transformers(device_python: Path) -> None:
    code = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx', 'gguf') if u.find_spec(n)])"
    done = subprocess.run([device_python, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_it_answers_prompts(device_python: Path, smollm2: Path) -> None:
    with run_cloud_process(smollm2 / "cloud") as (url, _):
        command = [device_python.parent / "stip-device", "chat", smollm2 / "device", "--url", url]
        done = subprocess.run(
            [*command, "-p", "What is the capital of France?"], capture_output=True, text=True, check=True, cwd="/"
        )
    assert "Paris" in done.stdout


def test_other_commands_say_which_extra_is_missing(device_python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [device_python.parent / "stip-cloud", "serve", tmp_path], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 1
    assert re.fullmatch(r"stip-cloud: error: the package '\w+' is not installed", done.stderr.splitlines()[0])
    assert done.stderr.splitlines()[1] == "hint: pip install 'stip[cloud]'"
