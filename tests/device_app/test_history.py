"""Chats that are kept: in a private file, whole after every failure, and gone when they are deleted."""

from __future__ import annotations

import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_app import history as history_module
from device_app.history import SCHEMA, History, StoredMessage, title_of
from shared.errors import HistoryError

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,c2VjcmV0"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stip" / "history.sqlite3"


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    with History.open(path) as opened:
        yield opened


def test_a_chat_is_there_when_the_file_is_opened_again(path: Path) -> None:
    parts = [{"type": "text", "text": "What is this?\0\n"}, IMAGE]
    with History.open(path) as history:
        chat = history.new(model="smollm2", title="Häuser", settings={"temperature": 0.5})
        asked = history.append(chat.id, "user", parts)
        answered = history.append(chat.id, "assistant", "A house 🏠", finish_reason="stop", tokens=3)
    with History.open(path) as history:
        assert history.messages(chat.id) == [asked, answered]
        (again,) = history.chats()
        assert (again.id, again.title, again.model, again.settings) == (chat.id, "Häuser", "smollm2", chat.settings)
        assert again.changed >= again.created == chat.created


def test_the_file_and_its_new_folder_are_the_owners_alone(path: Path, history: History) -> None:
    history.append(history.new(model="m").id, "user", "hello")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_journal_is_the_owners_alone_and_goes_with_the_change(path: Path, history: History) -> None:
    with history._writing() as connection:
        connection.execute("INSERT INTO chats VALUES ('a', '', '', '{}', 0, 0)")
        connection.execute("PRAGMA cache_spill = 1")
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {"history.sqlite3": 0o600, "history.sqlite3-journal": 0o600}
    assert [file.name for file in path.parent.iterdir()] == ["history.sqlite3"]


def test_a_file_that_others_could_read_is_closed_to_them(path: Path, history: History) -> None:
    path.chmod(0o644)
    History.open(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("way", ["delete", "delete_all", "cut"])
def test_nothing_of_what_is_deleted_can_be_read_in_the_file(path: Path, history: History, way: str) -> None:
    chat = history.new(model="m", title="the title marmalade")
    for _ in range(5):
        history.append(chat.id, "user", "marmalade " * 3000)
    assert b"marmalade" in path.read_bytes()
    if way == "delete":
        history.delete(chat.id)
    elif way == "delete_all":
        history.delete_all()
    else:
        history.cut(chat.id, 0)
        history.change(chat.id, title="")
    assert b"marmalade" not in path.read_bytes()
    assert path.stat().st_size < 100_000


def test_cutting_keeps_the_first_messages_and_new_ones_follow_them(history: History) -> None:
    chat = history.new(model="m")
    for text in ("a", "b", "c"):
        history.append(chat.id, "user", text)
    history.cut(chat.id, 1)
    history.append(chat.id, "user", "d")
    assert [message.content for message in history.messages(chat.id)] == ["a", "d"]


def test_a_replacement_that_the_disk_refuses_changes_nothing(history: History) -> None:
    chat = history.new(model="m")
    kept = [history.append(chat.id, "user", text) for text in ("a", "b")]
    replacement = [StoredMessage("user", "c", {}, 0.0), StoredMessage("assistant", "d", {"tokens": 1}, 1.0)]
    history._connection.execute(
        "CREATE TEMP TRIGGER full BEFORE INSERT ON messages WHEN NEW.role = 'assistant' "
        "BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
    )
    with pytest.raises(HistoryError, match="full"):
        history.replace(chat.id, 0, replacement, title="c")
    assert (history.messages(chat.id), history.chat(chat.id).title) == (kept, "")

    history._connection.execute("DROP TRIGGER full")
    history.replace(chat.id, 1, replacement, title="c")
    assert (history.messages(chat.id), history.chat(chat.id).title) == ([kept[0], *replacement], "c")


def test_a_title_that_a_chat_has_stays(history: History) -> None:
    chat = history.new(model="m", title="mine")
    history.replace(chat.id, 0, [], title="another")
    assert history.chat(chat.id).title == "mine"


def test_a_search_finds_titles_and_texts_in_any_case_and_no_image(history: History) -> None:
    by_title = history.new(model="m", title="Straße in Öl")
    by_text = history.new(model="m", title="other")
    history.append(by_text.id, "user", [{"type": "text", "text": "100% ÖLIG_"}, IMAGE])
    assert [chat.id for chat in history.chats("öl")] == [by_text.id, by_title.id]
    assert [chat.id for chat in history.chats("STRASSE")] == [by_title.id]
    assert [chat.id for chat in history.chats("0% ölig_")] == [by_text.id]
    assert history.chats("c2VjcmV0") == history.chats("image_url") == history.chats("%")[1:] == []


def test_the_chat_that_was_changed_last_comes_first(history: History) -> None:
    first, second = history.new(model="m"), history.new(model="m")
    assert [chat.id for chat in history.chats()] == [second.id, first.id]
    history.append(first.id, "user", "hello")
    assert [chat.id for chat in history.chats()] == [first.id, second.id]


def test_half_a_surrogate_pair_is_kept(history: History) -> None:
    chat = history.new(model="m", title="\ud83c")
    history.append(chat.id, "user", "\ud83c")
    assert history.messages(chat.id)[0].content == "\ud83c"
    assert history.chats("no \udfe0") == []


def test_a_chat_that_is_not_there_is_named_by_the_error(history: History) -> None:
    for missing in (history.chat, history.messages, history.delete):
        with pytest.raises(HistoryError, match="chat: it is not there"):
            missing("0" * 32)
    with pytest.raises(HistoryError, match="not there"):
        history.append("0" * 32, "user", "hello")


def test_a_history_in_memory_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with History.in_memory() as history:
        history.append(history.new(model="m").id, "user", "hello")
        assert not history.kept and len(history.chats()) == 1
    assert not list(tmp_path.iterdir())


def test_the_default_is_the_platforms_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    History.open().close()
    assert (tmp_path / "stip" / "history.sqlite3").exists() or sys.platform != "linux"


@pytest.mark.parametrize("damage", ["no database", "a page"])
def test_a_damaged_file_is_an_error_and_is_left_as_it_was(path: Path, damage: str) -> None:
    with History.open(path) as history:
        chat = history.new(model="m")
        for _ in range(20):
            history.append(chat.id, "user", "words " * 1000)
    if damage == "no database":
        path.write_bytes(b"A diary, not a database. " * 100)
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[:4096] + b"\x5a" * (len(whole) - 4096))
    before = path.read_bytes()
    with pytest.raises(HistoryError) as raised, History.open(path) as history:
        history.messages(chat.id)
    assert str(path) in str(raised.value) and "move it away" in str(raised.value.hint)
    assert path.read_bytes() == before


def test_a_newer_schema_is_an_error_and_is_left_alone(path: Path, history: History) -> None:
    history._connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    before = path.read_bytes()
    with pytest.raises(HistoryError, match=f"seen schema {SCHEMA + 1}, wanted {SCHEMA}"):
        History.open(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "other.sqlite3")
    other.execute("CREATE TABLE birds (name TEXT)")
    other.commit()
    other.close()
    before = (tmp_path / "other.sqlite3").read_bytes()
    with pytest.raises(HistoryError, match="another program's database"):
        History.open(tmp_path / "other.sqlite3")
    assert (tmp_path / "other.sqlite3").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError, match=r"Not a directory|File exists"):
        History.open(tmp_path / "file" / "history.sqlite3")


def test_a_full_disk_loses_nothing_and_the_rest_can_be_read(path: Path, history: History) -> None:
    chat = history.new(model="m")
    history.append(chat.id, "user", "kept")
    # A file that may not grow stands for the full disk: writing past the limit fails as it does there.
    script = f"""
import resource, sys
from pathlib import Path
from device_app.history import History
from shared.errors import HistoryError
history = History.open(Path({str(path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({2**16}, {2**16}))
try:
    history.append({chat.id!r}, "assistant", "words " * 50_000)
except HistoryError as error:
    print(error, "|", error.hint)
print([message.content for message in history.messages({chat.id!r})])
history.append({chat.id!r}, "assistant", "short")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    said, messages = done.stdout.splitlines()
    assert str(path) in said and "kept before is as it was" in said
    assert messages == "['kept']"
    assert [message.content for message in history.messages(chat.id)] == ["kept", "short"]


def test_a_history_that_is_full_says_so(history: History) -> None:
    chat = history.new(model="m")
    pages = history._connection.execute("PRAGMA page_count").fetchone()[0]
    history._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(HistoryError, match="full") as raised:
        history.append(chat.id, "user", "words " * 10_000)
    assert "free some space" in str(raised.value.hint)
    assert history.messages(chat.id) == []


def test_a_killed_writer_leaves_what_was_there_before(path: Path, history: History) -> None:
    chat = history.new(model="m")
    history.append(chat.id, "user", "kept")
    script = f"""
import os, signal
from pathlib import Path
from device_app.history import History
history = History.open(Path({str(path)!r}))
with history._writing() as connection:
    connection.execute("PRAGMA cache_size = 1")
    for number in range(10, 110):
        row = ({chat.id!r}, number, "x" * 9000)
        connection.execute("INSERT INTO messages VALUES (?, ?, 'user', ?, '{{}}', 0)", row)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (path.parent / "history.sqlite3-journal").exists()
    assert [message.content for message in history.messages(chat.id)] == ["kept"]


def test_two_processes_and_many_threads_write_at_once(path: Path, history: History) -> None:
    chat = history.new(model="m")
    script = f"""
from pathlib import Path
from device_app.history import History
history = History.open(Path({str(path)!r}))
for _ in range(20):
    history.append({chat.id!r}, "user", "other")
"""
    with subprocess.Popen([sys.executable, "-c", script]) as other:
        threads = [
            threading.Thread(target=lambda: [history.append(chat.id, "user", "ours") for _ in range(10)])
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert other.wait(60) == 0
    assert len(history.messages(chat.id)) == 50


def test_a_file_that_another_program_holds_is_an_error(
    path: Path, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "BUSY_SECONDS", 0.05)
    with history._writing(), History.open(path) as other, pytest.raises(HistoryError, match="locked"):
        other.new(model="m")


def test_a_title_is_the_first_line_shortened() -> None:
    assert title_of("\n  What is\ta  hash?\nTell me.") == "What is a hash?"
    assert title_of([IMAGE, {"type": "text", "text": "A dog?"}]) == "A dog?"
    assert title_of([IMAGE]) == ""
    assert len(title_of("word " * 100)) <= 60
