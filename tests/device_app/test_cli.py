"""`stip-device chat` as people and scripts meet it: a process, its streams, its exit status, a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cloud_backend.engine import Engine, LogitRows, Result, Work
from cloud_backend.tokens import Tokens, add_token
from device_app.bundle import Bundle
from device_app.cli import main
from device_app.sampler import Sampling
from shared.errors import BundleError
from shared.levels import limit
from tests.conftest import RunningCloud, open_assistant, run_cloud
from tests.terminals import Terminal

SECRET = "my secret illness"


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "STIP_TOKEN"}
    return kept | {"NO_COLOR": "1", "TERM": "dumb", "PYTHONUNBUFFERED": "1"} | variables


def device(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """`stip-device …`, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "device_app", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=environment(**variables),
    )


def called(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, which is far faster."""
    out, err = io.StringIO(), io.StringIO()
    command = ["stip-device", *map(str, arguments)]
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, environment(**variables), clear=True),
        pytest.raises(SystemExit) as left,
    ):
        main()
    assert isinstance(left.value.code, int)
    return subprocess.CompletedProcess(command, left.value.code, out.getvalue(), err.getvalue())


def assert_failed(result: subprocess.CompletedProcess[str], status: int, error: str, hint: str | None = ".") -> None:
    """One line of error, one of hint, nothing else: no traceback, nothing of the prompt."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr and SECRET not in result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].startswith("stip-device: error: ") and re.search(error, lines[0]), result.stderr
    if hint is None:
        assert len(lines) == 1
    else:
        assert len(lines) == 2 and re.match(rf"hint: .*{hint}", lines[1]), result.stderr


# --- one answer ---


def test_a_prompt_is_answered_on_stdout_and_all_else_goes_to_stderr(tiny: Path, cloud: RunningCloud) -> None:
    result = device("chat", tiny / "device", "--url", cloud.url, "-p", "the cat", "--max-tokens", 20)
    with open_assistant(tiny, cloud.url) as assistant:
        expected = assistant.chat([{"role": "user", "content": "the cat"}], max_tokens=20).finish()
    assert result.returncode == 0
    assert result.stdout == expected.text + "\n"
    assert re.search(r"20 tokens, .* left the device: \d+ permuted vectors .* no text", result.stderr)
    assert "the cat" not in result.stderr


def test_the_limit_of_the_protection_is_said(tiny: Path, cloud: RunningCloud) -> None:
    result = called("chat", tiny / "device", "--url", cloud.url, "-p", "the cat", "--max-tokens", 2)
    assert result.stderr.splitlines()[-1] == f"stip-device: {limit('permutation')}"


def test_json_is_one_object_with_the_figures(tiny: Path, cloud: RunningCloud) -> None:
    options = ("--temperature", 1.0, "--seed", 7, "--max-tokens", 12, "--system", "the rain")
    result = device("chat", tiny / "device", "--url", cloud.url, "-p", "the cat", "--json", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    fields = json.loads(result.stdout)
    assert fields.keys() >= {
        "text",
        "ids",
        "finish_reason",
        "timings",
        "bytes_up",
        "bytes_down",
        "round_trips",
        "prompt_tokens",
        "replays",
        "resumes",
    }
    messages = [{"role": "system", "content": "the rain"}, {"role": "user", "content": "the cat"}]
    with open_assistant(tiny, cloud.url) as assistant:
        expected = assistant.chat(messages, sampling=Sampling(temperature=1.0, seed=7), max_tokens=12).finish()
    assert (fields["text"], fields["ids"]) == (expected.text, expected.ids)
    assert fields["prompt_tokens"] == expected.stats.prompt_tokens
    assert fields["finish_reason"] == expected.finish_reason
    assert fields["round_trips"] >= 12 and fields["bytes_up"] > 0 and fields["bytes_down"] > 0
    assert fields["timings"]["seconds"] > 0


def test_stop_ends_the_answer_and_may_be_given_twice(tiny: Path, cloud: RunningCloud) -> None:
    with open_assistant(tiny, cloud.url) as assistant:
        whole = assistant.chat([{"role": "user", "content": "the cat"}], max_tokens=60).finish().text
    stop = next(part for at in range(8, 60) if (part := whole[at : at + 2]).isascii() and part.isprintable())
    options = ("-p", "the cat", "--max-tokens", 60, "--stop", "never met", "--stop", stop)
    result = called("chat", tiny / "device", "--url", cloud.url, *options)
    assert result.stdout == whole[: whole.index(stop)] + "\n"


def test_a_token_comes_from_a_file_or_the_environment(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(add_token(tmp_path / "tokens.txt", "device") + "\n")
    with run_cloud(tiny, tokens=Tokens(tmp_path / "tokens.txt")) as cloud:
        ask = ("chat", tiny / "device", "--url", cloud.url, "-p", SECRET, "--max-tokens", 2)
        assert called(*ask, "--token-file", tmp_path / "token").returncode == 0
        assert called(*ask, STIP_TOKEN=(tmp_path / "token").read_text().strip()).returncode == 0
        assert_failed(called(*ask), 1, "unauthorized", "--token-file or STIP_TOKEN")
        assert_failed(called(*ask, STIP_TOKEN="wrong"), 1, "unauthorized", "--token-file or STIP_TOKEN")


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--temperature", "-1"), "temperature: seen -1.0, wanted"),
        (("--top-p", "0"), "top_p: seen 0.0, wanted"),
        (("--min-p", "2"), "min_p: seen 2.0, wanted"),
        (("--repetition-penalty", "0"), "repetition_penalty: seen 0.0, wanted"),
        (("--seed", "-1"), "seed: seen -1, wanted"),
        (("--max-tokens", "0"), "max_tokens: seen 0, wanted at least 1"),
        (("--token-file", "/nowhere/token"), "--token-file /nowhere/token"),
        (("--ca", "/nowhere/ca.pem", "--url", "wss://127.0.0.1:1"), "--ca /nowhere/ca.pem"),
        (("--url", "ftp://127.0.0.1"), "url: seen 'ftp://127.0.0.1'"),
        (("--url", "ws://127.0.0.1:99999"), "url: seen"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_cannot_be_carried_out_are_usage_errors(
    tiny: Path, cloud: RunningCloud, options: tuple[str, ...], error: str
) -> None:
    result = called("chat", tiny / "device", "--url", cloud.url, "-p", SECRET, *options)
    assert result.returncode == 2
    assert result.stdout == "" and SECRET not in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("stip-device: error: ") and error in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("chat",), ("chat", "folder"), ("chat", "folder", "--url"), ("sing",), ("chat", "folder", "--nonsense")],
    ids=" ".join,
)
def test_a_command_line_that_is_none_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = called(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: stip-device" in result.stderr


def test_json_without_a_prompt_is_a_usage_error(tiny: Path, cloud: RunningCloud) -> None:
    assert_failed(called("chat", tiny / "device", "--url", cloud.url, "--json"), 2, "--json: it goes with -p", None)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, cloud: RunningCloud) -> None:
    result = device("chat", tmp_path / "nowhere", "--url", cloud.url, "-p", SECRET)
    assert_failed(result, 1, f"{tmp_path}/nowhere/manifest.json: No such file", "OUT/device")


def test_the_cloud_folder_given_by_mistake_is_recognised(tiny: Path, cloud: RunningCloud) -> None:
    result = called("chat", tiny / "cloud", "--url", cloud.url, "-p", SECRET)
    assert_failed(result, 1, "manifest.json", "this is the other half")


def test_a_cloud_that_is_not_there_is_named(tiny: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = time.monotonic()
    result = called("chat", tiny / "device", "--url", f"ws://127.0.0.1:{port}", "-p", SECRET)
    assert_failed(result, 1, f"cloud ws://127.0.0.1:{port}: ", "stip-cloud")
    assert time.monotonic() - started < 20


def test_plain_ws_beyond_this_machine_is_refused_and_not_tried(tiny: Path) -> None:
    started = time.monotonic()
    result = device("chat", tiny / "device", "--url", "ws://10.0.0.1:8765", "-p", SECRET)
    assert_failed(result, 2, "ws://10.0.0.1:8765", "--insecure")
    assert time.monotonic() - started < 8  # connecting there would time out after 10 s


def test_a_prompt_that_does_not_fit_is_refused(tiny: Path, cloud: RunningCloud) -> None:
    result = called("chat", tiny / "device", "--url", cloud.url, "-p", f"{SECRET} " * 50)
    assert_failed(result, 1, "the last turn alone takes", "shorten")


def test_half_a_character_in_a_prompt_is_one_that_cannot_be_read(tiny: Path, cloud: RunningCloud) -> None:
    halved = called("chat", tiny / "device", "--url", cloud.url, "-p", "the caf\udcc3", "--max-tokens", 4)
    replaced = called("chat", tiny / "device", "--url", cloud.url, "-p", "the caf\ufffd", "--max-tokens", 4)
    assert halved.returncode == 0
    assert halved.stdout == replaced.stdout


def test_drafts_change_round_trips_and_not_a_token(tiny: Path, cloud: RunningCloud) -> None:
    ask = ("chat", tiny / "device", "--url", cloud.url, "-p", "the cat", "--max-tokens", 40, "--json")
    drafted, plain = (json.loads(called(*ask, "--draft-tokens", most).stdout) for most in (8, 0))
    assert drafted["ids"] == plain["ids"]
    assert plain["drafted"] == plain["accepted"] == 0
    assert drafted["drafted"] >= drafted["accepted"]


def test_drafts_out_of_range_are_a_usage_error(tiny: Path, cloud: RunningCloud) -> None:
    result = called("chat", tiny / "device", "--url", cloud.url, "-p", SECRET, "--draft-tokens", -1)
    assert_failed(result, 2, "seen -1, wanted 0 to 64 drafted tokens", None)


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(BundleError):  # for Python to print
        called("chat", tmp_path / "nowhere", "--url", "ws://127.0.0.1:1", "--debug")


# --- in a terminal ---


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments, environment=environment()))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


PROMPT = r"\n> "
SUMMARY = r"(\d+) tokens, [\d.]+ tokens/s, .* left the device: \d+ permuted vectors \(\d+ KiB\), no text .* came back"


def slowed(engine: Engine, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every token take a while, as a large model would."""
    run = engine.run

    def slow(batch: object) -> object:
        time.sleep(seconds)
        return run(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "run", slow)


def test_a_chat_answers_is_stopped_answers_again_and_is_left(
    tiny: Path, cloud: RunningCloud, terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = terminal("chat", tiny / "device", "--url", cloud.url, "--max-tokens", 40)
    chat.expect("Ctrl-C stops an answer, Ctrl-D leaves")
    chat.expect(PROMPT)
    chat.write("the cat\n")
    assert "40 tokens" in chat.expect(SUMMARY)

    chat.expect(PROMPT)
    with monkeypatch.context() as slow:
        slowed(cloud.engine, 0.1, slow)
        chat.write("and the dog\n")
        chat.expect("and the dog\r\n[^\r\n]")  # the answer has begun
        chat.write("\x03")
        shown = chat.expect(SUMMARY, seconds=3)
    assert "[stopped]" in shown
    assert int(re.findall(r"(\d+) tokens,", shown)[-1]) < 40

    chat.expect(PROMPT)
    chat.write("then all of them\n")
    assert "40 tokens" in chat.expect(SUMMARY)
    chat.expect(PROMPT)
    chat.write("\x04")
    assert chat.leave() == 0
    assert "Traceback" not in chat.shown


def test_ctrl_c_at_the_prompt_does_not_leave(
    tiny: Path, cloud: RunningCloud, terminal: Callable[..., Terminal]
) -> None:
    chat = terminal("chat", tiny / "device", "--url", cloud.url, "--max-tokens", 5)
    chat.expect(PROMPT)
    chat.insist("\x03", "Ctrl-D leaves")
    chat.expect(PROMPT)
    chat.write("\n")  # nothing is no question
    chat.expect(PROMPT)
    chat.write("the cat\n")
    chat.expect(SUMMARY)
    chat.expect(PROMPT)
    chat.write("\x04")
    assert chat.leave() == 0


def test_a_question_that_fails_is_reported_and_the_chat_goes_on(
    tiny: Path, cloud: RunningCloud, terminal: Callable[..., Terminal]
) -> None:
    chat = terminal("chat", tiny / "device", "--url", cloud.url, "--max-tokens", 20)
    chat.expect(PROMPT)
    chat.write("the cat sat " * 120 + "\n")
    chat.expect("error: prompt: the last turn alone takes")
    chat.expect("hint: shorten it")
    chat.expect(PROMPT)
    chat.write("the cat\n")
    assert "20 tokens" in chat.expect(SUMMARY)
    chat.expect(PROMPT)
    chat.write("\x04")
    assert chat.leave() == 0


def test_the_user_is_told_which_turns_were_left_out(
    tiny: Path, cloud: RunningCloud, terminal: Callable[..., Terminal]
) -> None:
    chat = terminal("chat", tiny / "device", "--url", cloud.url, "--max-tokens", 2)
    for _ in range(4):
        chat.expect(PROMPT)
        chat.write("the cat sat on the mat, and the dog sang; " * 6 + "\n")
        shown = chat.expect(SUMMARY)
    assert re.search(r"the context is full: the oldest \d+ turns? w", shown)
    chat.expect(PROMPT)
    chat.write("\x04")
    assert chat.leave() == 0


def test_stop_strings_hold_in_a_chat_too(tiny: Path, cloud: RunningCloud, terminal: Callable[..., Terminal]) -> None:
    chat = terminal("chat", tiny / "device", "--url", cloud.url, "--max-tokens", 200, "--stop", "e")
    with open_assistant(tiny, cloud.url) as assistant:
        answer = assistant.chat([{"role": "user", "content": "the cat"}], max_tokens=200, stop=["e"]).finish()
    assert answer.stats.tokens < 200
    chat.expect(PROMPT)
    chat.write("the cat\n")
    assert f"{answer.stats.tokens} tokens" in chat.expect(SUMMARY)
    chat.expect(PROMPT)
    chat.write("\x04")
    assert chat.leave() == 0


def speaking(engine: Engine, bundle: Bundle, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a cloud that has the key say `text`: the worst that any cloud can do to a device's terminal."""
    run, permuted = engine.run, np.argsort(bundle.key.vocab)
    ids = iter([*bundle.tokenizer.encode(text), bundle.manifest.end_ids[0]])

    def said(work: Work, honest: Result) -> Result:
        if not work.rows:
            return honest
        top = permuted[next(ids)]
        order = [top, *(other for other in range(bundle.manifest.vocab_size) if other != top)][: work.top_k]
        values = np.zeros((1, len(order)), np.float32)
        values[0, 0] = 90.0  # beside which the mass of the others is nothing
        return LogitRows(values, np.array([order], np.uint32), np.full((1, 2), 90.0, np.float32))

    monkeypatch.setattr(engine, "run", lambda batch: list(map(said, batch, run(batch))))


def test_control_characters_of_a_cloud_do_not_reach_the_terminal(
    tiny: Path, terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = "ha\x1b[2J\x1b[31mha\rhu\x9b1Ahe\x07\x08\x7fhi\x00\x1b]0;ho\x07\n\tend"
    bundle = Bundle.open(tiny / "device")
    with run_cloud(tiny) as cloud:
        speaking(cloud.engine, bundle, attack, monkeypatch)
        chat = terminal("chat", tiny / "device", "--url", cloud.url, "-p", "the cat", "--draft-tokens", 0)
        assert chat.leave() == 0
    shown = chat.shown.replace("\r\n", "\n")  # the terminal's own line ends
    assert "ha[2J[31mhahu1Ahehi]0;ho\n\tend\n" in shown
    assert {character for character in shown if unicodedata.category(character) == "Cc"} == {"\n", "\t"}
