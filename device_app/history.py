"""Chats, kept on the device alone: one SQLite file in the platform's folder for a user's data, readable by its owner.

What is deleted is overwritten with zeros (SQLite's secure_delete). A rollback journal, not a write-ahead log, is used:
the log would keep what was deleted until it is written over some day, and the journal is gone when a change is done.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from shared.errors import HistoryError

Content: TypeAlias = str | list[dict[str, Any]]  # text, or parts as in OpenAI's API

SCHEMA = 1  # of the file; SQLite keeps it as user_version
APPLICATION = 0x53544950  # "STIP": the file says whose it is (application_id)
BUSY_SECONDS = 5.0  # to wait for another process that writes
TITLE = 60  # characters of a title that is made from a question

_TABLES = (
    """CREATE TABLE chats (
        id TEXT PRIMARY KEY, title TEXT NOT NULL, model TEXT NOT NULL, settings TEXT NOT NULL,
        created REAL NOT NULL, changed REAL NOT NULL)""",
    """CREATE TABLE messages (
        chat TEXT NOT NULL REFERENCES chats (id) ON DELETE CASCADE, number INTEGER NOT NULL,
        role TEXT NOT NULL, content TEXT NOT NULL, details TEXT NOT NULL, at REAL NOT NULL,
        PRIMARY KEY (chat, number))""",
)
_HINTS = (  # by what SQLite says, whose error codes Python 3.10 does not give
    ("full", "free some space; what was kept before is as it was"),
    ("I/O", "is the disk full or failing? what was kept before is as it was"),
    ("locked", "another program holds the file; try again"),
    ("readonly", "the file or its folder cannot be written; --no-history goes on without"),
    ("unable to open", "may this user read and write there? --no-history goes on without"),
    ("malformed", "the file is damaged and was left as it is: move it away to begin a new one, or use --no-history"),
    ("not a database", "it is no history, or damaged, and was left as it is: move it away, or use --no-history"),
)


@dataclass(frozen=True)
class Chat:
    """A conversation. `created` and `changed` in seconds since 1970; `settings` are its faces' own."""

    id: str
    title: str
    model: str
    settings: dict[str, Any]
    created: float
    changed: float


@dataclass(frozen=True)
class StoredMessage:
    """A message as it was said: text, or parts as in OpenAI's API, images as data URLs. `details`: figures, in JSON."""

    role: str
    content: Content
    details: dict[str, Any]
    at: float


def text_of(content: Content) -> str:
    """The text of a message, without its images."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))


def title_of(content: Content) -> str:
    """A title for a chat that begins with this question: its first line, shortened."""
    line = next((" ".join(line.split()) for line in text_of(content).splitlines() if line.strip()), "")
    return line if len(line) <= TITLE else line[: TITLE - 1].rstrip() + "…"


class History:
    """The chats kept on this device. Threads and processes may share one file.

    Every method raises HistoryError for what the disk refuses, and leaves what was kept as it was.
    """

    def __init__(self, connection: sqlite3.Connection, name: str, *, kept: bool) -> None:
        self.kept = kept  # False: gone when the program ends
        self._connection = connection
        self._name = name
        self._lock = threading.RLock()
        connection.create_function("text_of", 1, lambda said: _sound(text_of(json.loads(said))), deterministic=True)
        connection.create_function("casefold", 1, str.casefold, deterministic=True)
        with self._named():
            self._prepare()

    @classmethod
    def open(cls, path: Path | None = None) -> History:
        """The history in a file, made with mode 0600 if it is not there. Raises HistoryError."""
        if path is None:
            from platformdirs import user_data_path

            path = user_data_path("stip", appauthor=False) / "history.sqlite3"
        try:
            _private(path)
            connection = _connected(str(path))
        except (OSError, sqlite3.Error) as error:
            raise _error(f"history {path}", error) from None
        try:
            return cls(connection, f"history {path}", kept=True)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def in_memory(cls) -> History:
        """A history that no file keeps."""
        return cls(_connected(":memory:"), "history", kept=False)

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()

    def chats(self, search: str = "") -> list[Chat]:
        """Chats, the last changed first; with `search` those whose title or messages hold it, in any case."""
        which = """WHERE instr(casefold(title), :search) OR EXISTS (
            SELECT 1 FROM messages WHERE chat = chats.id AND instr(casefold(text_of(content)), :search))"""
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT * FROM chats {which if search else ''} ORDER BY changed DESC, rowid DESC",
                {"search": _sound(search).casefold()},
            ).fetchall()
        return [_chat(row) for row in rows]

    def new(self, *, model: str, title: str = "", settings: Mapping[str, Any] | None = None) -> Chat:
        """Begins a chat."""
        now = time.time()
        chat = Chat(uuid.uuid4().hex, _sound(title), _sound(model), dict(settings or {}), now, now)
        row = (chat.id, chat.title, chat.model, json.dumps(chat.settings), now, now)
        with self._writing() as connection:
            connection.execute("INSERT INTO chats VALUES (?, ?, ?, ?, ?, ?)", row)
        return chat

    def chat(self, chat_id: str) -> Chat:
        """One chat. Raises HistoryError where it is not there."""
        with self._reading():
            return self._chat(chat_id)

    def messages(self, chat_id: str) -> list[StoredMessage]:
        """What was said in a chat, in order."""
        with self._reading() as connection:
            self._chat(chat_id)
            rows = connection.execute(
                "SELECT role, content, details, at FROM messages WHERE chat = ? ORDER BY number", (chat_id,)
            ).fetchall()
        return [
            StoredMessage(role, json.loads(content), json.loads(details), at) for role, content, details, at in rows
        ]

    def questions(self, most: int = 500) -> list[str]:
        """Texts of the last questions of all chats, the newest first, for an input line to offer again."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT text_of(content) FROM messages WHERE role = 'user' ORDER BY rowid DESC LIMIT ?", (most,)
            ).fetchall()
        return [text for (text,) in rows]

    def append(self, chat_id: str, role: str, content: Content, **details: Any) -> StoredMessage:
        """Adds a message to the end of a chat. details: what JSON can hold."""
        message = StoredMessage(role, content, details, time.time())
        with self._writing() as connection:
            self._touch(chat_id)
            _append(connection, chat_id, message)
        return message

    def cut(self, chat_id: str, keep: int) -> None:
        """Keeps the first `keep` messages of a chat, and forgets the others."""
        self.replace(chat_id, keep, [])

    def replace(self, chat_id: str, keep: int, messages: Sequence[StoredMessage], *, title: str = "") -> None:
        """Puts `messages` in the place of all after the first `keep`: all of it happens, or nothing.

        title: for a chat that has none yet.
        """
        with self._writing() as connection:
            self._touch(chat_id)
            # A number is a message's place: messages are added and cut at the end alone.
            connection.execute("DELETE FROM messages WHERE chat = ? AND number >= ?", (chat_id, keep))
            for message in messages:
                _append(connection, chat_id, message)
            connection.execute("UPDATE chats SET title = ? WHERE id = ? AND title = ''", (_sound(title), chat_id))

    def change(self, chat_id: str, *, title: str | None = None, settings: Mapping[str, Any] | None = None) -> Chat:
        """Changes a chat's title or settings, or both."""
        with self._writing() as connection:
            self._touch(chat_id)
            if title is not None:
                connection.execute("UPDATE chats SET title = ? WHERE id = ?", (_sound(title), chat_id))
            if settings is not None:
                connection.execute("UPDATE chats SET settings = ? WHERE id = ?", (json.dumps(dict(settings)), chat_id))
            return self._chat(chat_id)

    def delete(self, chat_id: str) -> None:
        """Forgets a chat and all that was said in it."""
        with self._writing() as connection:
            self._chat(chat_id)
            connection.execute("DELETE FROM chats WHERE id = ?", (chat_id,))

    def delete_all(self) -> None:
        """Forgets all chats."""
        with self._writing() as connection:
            connection.execute("DELETE FROM messages")
            connection.execute("DELETE FROM chats")

    def _chat(self, chat_id: str) -> Chat:
        row = self._connection.execute("SELECT * FROM chats WHERE id = ?", (_sound(chat_id),)).fetchone()
        if row is None:
            raise HistoryError("chat: it is not there", hint="it was deleted, perhaps in another window")
        return _chat(row)

    def _touch(self, chat_id: str) -> None:
        self._chat(chat_id)
        self._connection.execute("UPDATE chats SET changed = ? WHERE id = ?", (time.time(), chat_id))

    def _prepare(self) -> None:
        connection = self._connection
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA temp_store = MEMORY")  # nothing said goes to a temporary file
        if self._schema() == SCHEMA:
            return
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA auto_vacuum = FULL")  # the file shrinks with what it holds; before any table alone
        with self._writing():
            if self._schema() == 0:  # still: another process may have been faster
                for table in _TABLES:
                    connection.execute(table)
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {SCHEMA}")

    def _schema(self) -> int:
        """The schema of the file, 0 for an empty one. Raises HistoryError for one that is not ours to change."""
        schema, application, tables = (
            int(self._connection.execute(query).fetchone()[0])
            for query in ("PRAGMA user_version", "PRAGMA application_id", "SELECT count(*) FROM sqlite_master")
        )
        if tables and application != APPLICATION:
            raise HistoryError(
                f"{self._name}: seen another program's database (application {application:#x}), "
                f"wanted a history ({APPLICATION:#x})",
                hint="it was left as it is: move it away",
            )
        if schema > SCHEMA:
            raise HistoryError(
                f"{self._name}: seen schema {schema}, wanted {SCHEMA}",
                hint="a newer version of stip wrote it: use that one, or --no-history",
            )
        return schema

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _error(self._name, error) from None
        except json.JSONDecodeError:
            raise _error(self._name, ValueError("a malformed message")) from None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._named():
            yield self._connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A change that happens wholly or not at all."""
        with self._reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite rolls some failures back by itself
                    connection.execute("ROLLBACK")
                raise


def _connected(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def _private(path: Path) -> None:
    """Makes the file if it is not there. Its owner alone can read it, and the journal, which SQLite makes alike."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def _error(name: str, error: Exception) -> HistoryError:
    detail = getattr(error, "strerror", None) or str(error)
    hint = next((hint for part, hint in _HINTS if part in detail), "--no-history goes on without")
    return HistoryError(f"{name}: {detail}", hint=hint)


def _append(connection: sqlite3.Connection, chat_id: str, message: StoredMessage) -> None:
    row = (chat_id, chat_id, message.role, json.dumps(message.content), json.dumps(message.details), message.at)
    connection.execute(
        """INSERT INTO messages VALUES (
            ?, (SELECT coalesce(max(number) + 1, 0) FROM messages WHERE chat = ?), ?, ?, ?, ?)""",
        row,
    )


def _chat(row: Sequence[Any]) -> Chat:
    chat_id, title, model, settings, created, changed = row
    return Chat(chat_id, title, model, json.loads(settings), created, changed)


def _sound(text: str) -> str:
    """`text` as a column takes it: half a surrogate pair cannot be written. (JSON writes it as an escape.)"""
    return text.encode("utf-8", "replace").decode()
