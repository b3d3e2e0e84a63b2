"""What the command line does not wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each takes 10 to 300 ms to import and serves other commands, or a part of a chat that comes later or never.
LATER = (
    "asyncio",
    "device_app.batch",
    "device_app.encoder",
    "llguidance",
    "markdown_it",
    "PIL",
    "prompt_toolkit",
    "rich",
    "sentencepiece",
    "sqlite3",
    "starlette",
    "tokenizers",
    "uvicorn",
)


def imported_by(statement: str) -> set[str]:
    """The modules of a fresh interpreter after a statement."""
    command = [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_an_answer_on_stdout_imports_nothing_that_it_does_not_need() -> None:
    assert sorted(imported_by("import device_app.chat").intersection(LATER)) == []


def test_the_package_itself_imports_no_library() -> None:
    assert sorted(imported_by("import device_app").intersection({*LATER, "numpy", "onnxruntime", "websockets"})) == []


def test_the_package_gives_its_public_names_and_no_others() -> None:
    import device_app

    for name in device_app.__all__:
        assert getattr(device_app, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Wizard'"):
        _ = device_app.Wizard
