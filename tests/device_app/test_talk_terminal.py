"""The talk as a person at a real terminal has it: keys, pastes, signals, and what stays on the disk."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_app.history import History
from tests.conftest import RunningCloud, run_cloud
from tests.terminals import Terminal

PROMPT = r"\n> |\x1b\[\?2004h[^>]*>"  # 2004: pastes are bracketed from here on
SUMMARY = r"(\d+) tokens, [\d.]+ tokens/s, .* left the device: \d+ permuted vectors \(\d+ KiB\), no text .* came back"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


Talk = Callable[..., Terminal]
Kept = Callable[[], list[list[tuple[str, object]]]]


@pytest.fixture
def talk(tiny: Path, cloud: RunningCloud, tmp_path: Path) -> Iterator[Talk]:
    """Starts a talk: in a full terminal unless `term` says dumb, its data in tmp_path."""
    opened: list[Terminal] = []

    def start(*arguments: object, term: str = "xterm-256color", export: Path = tiny, url: str = cloud.url) -> Terminal:
        environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "STIP_TOKEN")}
        # Nothing answers where a real terminal would tell of its cursor.
        environment |= {"TERM": term, "XDG_DATA_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"}
        options = ["--max-tokens", 8, *arguments]
        opened.append(Terminal("chat", export / "device", "--url", url, *options, environment=environment))
        opened[-1].expect("Ctrl-D leaves")
        opened[-1].expect(PROMPT)
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    """Gives what the history keeps: the messages of each chat, newest chat first."""

    def read() -> list[list[tuple[str, object]]]:
        with History.open(tmp_path / "stip" / "history.sqlite3") as history:
            return [
                [(message.role, message.content) for message in history.messages(chat.id)] for chat in history.chats()
            ]

    yield read


def leave(terminal: Terminal) -> None:
    """Ctrl-D, once it is asked for a question: between two the system itself takes the key, and nobody sees it."""
    terminal.expect(PROMPT)
    terminal.write("\x04")
    assert terminal.leave() == 0
    assert "Traceback" not in terminal.shown


def test_enter_sends_alt_enter_and_pastes_bring_lines_ctrl_c_clears_and_the_chat_is_kept(
    talk: Talk, kept: Kept
) -> None:
    terminal = talk()
    terminal.write(f"the wrong qu\x03the cat\x1b\r{PASTE}and\r\nthe\rdog{PASTED} sang\r")
    terminal.expect("Ctrl-D leaves")
    terminal.expect(SUMMARY)
    leave(terminal)
    [[question, (role, answer)]] = kept()
    assert question == ("user", "the cat\nand\nthe\ndog sang")
    assert role == "assistant" and answer
    assert "\x1b]" not in terminal.shown  # the window's title is left alone


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_a_paste_of_100000_characters_is_told_to_be_too_long_and_the_talk_goes_on(talk: Talk, term: str) -> None:
    terminal = talk(term=term)
    text = "the cat sat " * 8334
    terminal.write(f"{PASTE}{text}{PASTED}" if term != "dumb" else text)
    terminal.write("\r")
    terminal.expect("error: prompt: the last turn alone takes 2")
    terminal.expect("hint: shorten it")
    terminal.expect(PROMPT)
    terminal.write("the cat\r")
    terminal.expect(SUMMARY)
    leave(terminal)
    if term != "dumb":
        assert "[paste 1: 100,008 characters]" in terminal.shown
        assert len(terminal.shown) < 20_000


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_half_a_character_harms_nothing(talk: Talk, kept: Kept, term: str) -> None:
    terminal = talk(term=term)
    terminal.write(b"the caf\xc3 cat\r")
    terminal.expect(SUMMARY)
    leave(terminal)
    [[(_, question), _]] = kept()
    if term == "dumb":
        assert question in ("the caf cat", "the caf\ufffd cat")  # by what readline makes of it, which knows the locale
        assert "\x1b" not in terminal.shown
    else:
        assert question == "the caf\ufffd cat"


def test_a_stopped_answer_stays_as_far_as_it_came(
    talk: Talk, kept: Kept, cloud: RunningCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cloud.engine.run
    monkeypatch.setattr(cloud.engine, "run", lambda batch: (time.sleep(0.1), run(batch))[1])
    terminal = talk("--max-tokens", 100, "--draft-tokens", 0)
    terminal.write("the cat\r")
    terminal.expect(r"\x1b\[\?2004l\S")  # the answer has begun
    terminal.write("\x03")
    assert int(re.findall(r"\[stopped\] (\d+) tokens", terminal.expect(SUMMARY, seconds=5))[0]) < 100
    leave(terminal)
    [[_, (role, answer)]] = kept()
    assert role == "assistant" and answer


def test_tab_completes_commands_and_files(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a-long-name.txt").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    terminal = talk()
    terminal.write("the cat\r")
    terminal.expect(SUMMARY)
    terminal.expect(PROMPT)
    terminal.write("/sa\t")
    terminal.expect("ve")
    terminal.write(" ~/a-lo\t")
    terminal.expect(r"ng-name\.txt")
    terminal.write("\r")
    terminal.expect("File exists")
    leave(terminal)
    assert (tmp_path / "a-long-name.txt").read_text() == "mine"


def test_edit_offers_the_last_question_for_changing(talk: Talk, kept: Kept) -> None:
    terminal = talk()
    terminal.write("the dog\r")
    terminal.expect(SUMMARY)
    terminal.expect(PROMPT)
    terminal.write("/edit\r")
    terminal.expect(PROMPT)
    terminal.write("s sing\r")
    terminal.expect(SUMMARY)
    leave(terminal)
    [[question, _]] = kept()
    assert question == ("user", "the dogs sing")


def test_earlier_questions_come_back_with_the_up_key(talk: Talk, kept: Kept) -> None:
    terminal = talk()
    terminal.write("the cat\r")
    terminal.expect(SUMMARY)
    leave(terminal)
    terminal = talk()
    terminal.write("\x1b[A\r")
    terminal.expect(SUMMARY)
    leave(terminal)
    assert [messages[0] for messages in kept()] == [("user", "the cat")] * 2


def test_without_history_nothing_is_written(talk: Talk, tmp_path: Path) -> None:
    terminal = talk("--no-history")
    terminal.write("the cat\r")
    terminal.expect(SUMMARY)
    leave(terminal)
    assert not list(tmp_path.iterdir())


def test_a_history_whose_disk_is_full_is_told_once_and_the_talk_goes_on(talk: Talk, kept: Kept) -> None:
    terminal = talk()
    terminal.write("the cat\r")
    terminal.expect(SUMMARY)
    terminal.expect(PROMPT)
    # No file of that process may grow any more, as on a disk without space.
    resource.prlimit(terminal.process.pid, resource.RLIMIT_FSIZE, (1, 1))
    terminal.write("the dog\r")
    shown = terminal.expect("not kept")
    shown += terminal.expect(SUMMARY)
    assert re.search(r"error: history .*(I/O|full)", shown) and "kept before is as it was" in shown
    terminal.expect(PROMPT)
    terminal.write("the mat\r")
    assert "error" not in terminal.expect(SUMMARY)
    leave(terminal)
    assert [[role for role, _ in messages] for messages in kept()] == [["user", "assistant"]]


def test_keys_pressed_during_an_answer_do_not_show_in_it_and_are_the_next_question(talk: Talk, kept: Kept) -> None:
    terminal = talk()
    terminal.write("the cat\r")
    terminal.write("the mat\r")
    terminal.expect(SUMMARY)
    terminal.expect(SUMMARY)
    leave(terminal)
    assert [message[1] for message in kept()[0][::2]] == ["the cat", "the mat"]


def test_a_closed_window_ends_the_talk_and_loses_nothing(talk: Talk, kept: Kept) -> None:
    terminal = talk()
    terminal.write("the cat\r")
    terminal.expect(SUMMARY)
    terminal.expect(PROMPT)
    terminal.process.send_signal(signal.SIGHUP)
    terminal.process.wait(10)
    assert len(kept()[0]) == 2
