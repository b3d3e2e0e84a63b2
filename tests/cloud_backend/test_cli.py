"""What the options of `stip-cloud serve` mean."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_backend.cli import command_line


def parsed(*options: str) -> Any:
    return command_line().parse_args(["serve", "cloud", *options])


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("4096", 4096), ("3K", 3 * 2**10), ("512M", 512 * 2**20), ("8G", 8 * 2**30)]
)
def test_a_size_may_have_a_unit(text: str, size: int) -> None:
    assert parsed("--kv-bytes", text).kv_bytes == size


@pytest.mark.parametrize("text", ["0", "-1", "8g", "8GB", "1.5G", "G", "", " 8G", "８G", "1e9", "1" * 40])
def test_another_size_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(f"--kv-bytes={text}")
    assert ended.value.code == 2 and "wanted a number of bytes, or one with K, M or G" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "--threads=0",
        "--token-sessions=0",
        "--token-rate=-1",
        "--grace-seconds=0",
        "--drain-seconds=0",
        "--log=xml",
        "--tensor-parallel=65",
    ],
)
def test_an_option_out_of_its_range_is_a_usage_error(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(option)
    assert ended.value.code == 2 and option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("--port=abc", "seen abc, wanted 0 to 65535"),
        ("--port=1.5", "seen 1.5, wanted 0 to 65535"),
        ("--idle-seconds=x", "seen x, wanted a number of seconds, more than 0"),
        ("--idle-seconds=nan", "seen nan, wanted a number of seconds, more than 0"),
    ],
)
def test_what_is_no_number_is_told_what_is_wanted(option: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(option)
    assert ended.value.code == 2 and wanted in capsys.readouterr().err


def test_what_is_not_said_is_left_to_the_model_and_the_machine() -> None:
    options = parsed()
    assert (options.kv_bytes, options.threads, options.context, options.metrics_port) == (None,) * 4
