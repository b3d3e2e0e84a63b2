"""Bearer tokens: shown once, stored as hashes, in a file of their owner's alone."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloud_backend.cli import main
from cloud_backend.tokens import Tokens, add_token
from shared.errors import BundleError

HASH = "sha256:" + hashlib.sha256(b"stip_known").hexdigest()


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def written(folder: Path, text: str) -> Path:
    path = folder / "tokens.txt"
    path.write_text(text)
    return path


# --- making ---


def test_the_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    with umask(0):
        add_token(tmp_path / "tokens.txt", "phone")
    assert stat.S_IMODE((tmp_path / "tokens.txt").stat().st_mode) == 0o600


def test_the_file_holds_the_hash_and_the_name(tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens.txt", "phone")
    digest = hashlib.sha256(token.encode()).hexdigest()
    assert (tmp_path / "tokens.txt").read_text() == f"sha256:{digest} phone\n"


def test_a_token_has_256_random_bits_and_is_new_each_time(tmp_path: Path) -> None:
    made = {add_token(tmp_path / "tokens.txt", "phone") for _ in range(8)}
    assert len(made) == 8 and min(map(len, made)) >= len("stip_") + 43  # base64


def test_another_token_leaves_the_first_one_valid(tmp_path: Path) -> None:
    one, other = (add_token(tmp_path / "tokens.txt", name) for name in ("phone", "laptop"))
    tokens = Tokens(tmp_path / "tokens.txt")
    assert tokens.accept(one) and tokens.accept(other)


def test_a_token_added_to_a_file_without_a_last_newline_is_valid(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HASH} phone")
    token = add_token(path, "laptop")
    assert Tokens(path).accept(token)


def test_a_file_that_cannot_be_written_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="missing") as caught:
        add_token(tmp_path / "missing" / "tokens.txt", "phone")
    assert caught.value.hint


def run_token_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stip-cloud", "token", "--token-file", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


def test_the_command_prints_the_token_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_token_command(tmp_path / "tokens.txt", monkeypatch)
    out, err = capsys.readouterr()
    assert Tokens(tmp_path / "tokens.txt").accept(out.strip())
    assert out.strip() not in err


def test_the_command_stores_the_hash_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_token_command(tmp_path / "tokens.txt", monkeypatch)
    token = capsys.readouterr().out.strip()
    assert all(token not in path.read_text() for path in tmp_path.iterdir())


# --- accepting ---


def test_a_known_token_is_accepted(tmp_path: Path) -> None:
    assert Tokens(written(tmp_path, f"{HASH} phone\n")).accept("stip_known")


@pytest.mark.parametrize("token", [None, "", "stip_", "stip_knowN", "stip_known ", HASH, "stip_knöwn", "\0"])
def test_any_other_token_is_refused(tmp_path: Path, token: str | None) -> None:
    assert not Tokens(written(tmp_path, f"{HASH} phone\n")).accept(token)


def test_comments_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    assert Tokens(written(tmp_path, f"# mine\n\n  \n{HASH} phone\n\n")).accept("stip_known")


def test_a_name_may_be_missing_or_have_spaces(tmp_path: Path) -> None:
    assert Tokens(written(tmp_path, f"{HASH}\n{HASH} my old phone\n")).accept("stip_known")


@pytest.mark.parametrize(
    "line",
    [
        "stip_a-token-itself phone",
        HASH[:-1] + " phone",
        HASH + "0 phone",
        HASH.replace("sha256:", "md5:") + " phone",
        "sha256:" + "g" * 64 + " phone",
        "sha256:" + "é" * 64 + " phone",
    ],
    ids=["token", "short", "long", "another hash", "not hex", "not ASCII"],
)
def test_a_line_that_is_no_hash_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    with pytest.raises(BundleError, match="line 2"):
        Tokens(written(tmp_path, f"{HASH} phone\n{line}\n"))


def test_a_bad_line_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        Tokens(written(tmp_path, "stip_a-token-itself phone\n"))
    assert "stip_a-token" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing yet\n"])
def test_a_file_without_tokens_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BundleError, match="no token"):
        Tokens(written(tmp_path, text))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"stip_token phone\n", b""])
def test_every_error_of_the_file_has_a_hint(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokens.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        Tokens(path)
    assert caught.value.hint
