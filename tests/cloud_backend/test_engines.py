"""`stip-cloud engines`: what this machine can run, and why not the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cloud_backend.cli import main
from cloud_backend.llama.library import library

NAMES = ["torch on cpu", "torch on cuda", "tensor parallel", "llama.cpp", "Ray Serve"]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Gives what the command prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["stip-cloud", "engines", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def by_name(printed: Callable[..., str]) -> dict[str, Any]:
    return {one["name"]: one for one in json.loads(printed("--json"))}


def test_every_engine_is_named_with_whether_it_runs(printed: Callable[..., str]) -> None:
    found = by_name(printed)
    assert list(found) == NAMES
    assert found["torch on cpu"]["runs"] and found["torch on cpu"]["version"] == torch.__version__


def test_what_does_not_run_says_why_and_what_would_change_that(printed: Callable[..., str]) -> None:
    for one in by_name(printed).values():
        assert one["detail"] and one["runs"] == (one["command"] is None)


def test_for_people_there_is_a_line_each_and_one_more_for_what_does_not_run(printed: Callable[..., str]) -> None:
    found, lines = by_name(printed), printed().splitlines()
    assert len(lines) == sum(1 + (not one["runs"]) for one in found.values())
    assert [name for name in NAMES if any(line.startswith(name) for line in lines)] == NAMES


def test_a_llama_cpp_that_is_not_installed_is_told_with_its_command(
    printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    library.cache_clear()
    try:
        one = by_name(printed)["llama.cpp"]
    finally:
        library.cache_clear()
    assert (one["runs"], one["command"]) == (False, "pip install 'stip[llama.cpp]'")


@pytest.mark.llama
def test_llama_cpp_says_what_its_build_can_use(printed: Callable[..., str]) -> None:
    one = by_name(printed)["llama.cpp"]
    assert one["runs"] and "CPU: " in one["detail"] and "card" in one["detail"]
