"""The page's own API, without a browser: what is kept, streamed, refused, and what becomes of failures."""

from __future__ import annotations

import base64
import gc
import http.client
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from device_app.prompt import Prompter
from tests.conftest import RunningCloud, run_cloud
from tests.device_app.gateway.gateways import KEY, RunningGateway, run_gateway
from tests.processes import eventually

QUESTION = "the cat sat on the mat"


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.fixture
def gateway(tiny: Path, cloud: RunningCloud) -> Iterator[RunningGateway]:
    with run_gateway(tiny, cloud=cloud.url) as running:
        yield running


def call(gateway: RunningGateway, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON."""
    content = None if body is None else json.dumps(body).encode()
    status, _, answer = gateway.ask(path, method=method, body=content)
    return status, json.loads(answer) if answer else None


def new_chat(gateway: RunningGateway, **settings: Any) -> str:
    """The id of a fresh chat. Greedy and short unless said otherwise."""
    status, chat = call(gateway, "POST", "/api/chats", {"settings": {"temperature": 0, "max_tokens": 8} | settings})
    assert status == 201, chat
    return str(chat["id"])


def answer(gateway: RunningGateway, chat: str, **question: Any) -> list[dict[str, Any]]:
    """The events of an answer."""
    status, headers, content = gateway.ask(
        f"/api/chats/{chat}/answer", method="POST", body=json.dumps(question).encode()
    )
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream"), content
    return [json.loads(line.removeprefix("data: ")) for line in content.decode().split("\n\n") if line]


def last(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The last event of a kind."""
    return [event for event in events if event["kind"] == kind][-1]


def text_of(events: list[dict[str, Any]]) -> str:
    """The answer's text."""
    return str(last(events, "done")["text"])


def messages(gateway: RunningGateway, chat: str) -> list[tuple[str, str]]:
    """What is kept of a chat."""
    _, shown = call(gateway, "GET", f"/api/chats/{chat}")
    return [(message["role"], message["text"]) for message in shown["messages"]]


def test_an_answer_is_streamed_as_html_and_kept_with_its_figures(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)

    events = answer(gateway, chat, text=QUESTION)

    assert messages(gateway, chat) == [("user", QUESTION), ("assistant", text_of(events))]
    blocks: list[str] = []
    for event in events:
        if event["kind"] == "html":
            blocks = blocks[: event["start"]] + event["blocks"]
    _, shown = call(gateway, "GET", f"/api/chats/{chat}")
    assert blocks == shown["messages"][1]["blocks"]
    assert shown["messages"][1]["details"]["figures"] == last(events, "done")["figures"]
    assert shown["title"] == QUESTION


def test_the_panel_is_told_of_every_vector(gateway: RunningGateway) -> None:
    events = answer(gateway, new_chat(gateway), text=QUESTION)

    sent = sum(len(event["vectors"]) for event in events if event["kind"] == "wire")
    assert sent == last(events, "done")["figures"]["vectors_up"]
    assert QUESTION in last(events, "wire")["text"]


def test_the_next_question_sends_what_is_new_alone(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)
    answer(gateway, chat, text=QUESTION)

    figures = last(answer(gateway, chat, text="rain"), "done")["figures"]

    assert figures["cached_tokens"] > 0
    assert last(answer(gateway, chat, text=QUESTION), "wire")["text"].count(QUESTION) == 2


def test_an_edited_question_takes_the_place_of_all_that_followed(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)
    answer(gateway, chat, text=QUESTION)
    answer(gateway, chat, text="rain")

    edited = answer(gateway, chat, text="sun", keep=0)

    assert messages(gateway, chat) == [("user", "sun"), ("assistant", text_of(edited))]


def test_regenerating_answers_the_last_question_again(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)
    first = answer(gateway, chat, text=QUESTION)

    again = answer(gateway, chat, keep=1)

    assert text_of(again) == text_of(first)
    assert messages(gateway, chat) == [("user", QUESTION), ("assistant", text_of(first))]


def test_a_system_prompt_is_sent_with_every_question(gateway: RunningGateway) -> None:
    events = answer(gateway, new_chat(gateway, system="all of them went home"), text=QUESTION)

    assert "all of them went home" in last(events, "wire")["text"]


def test_a_seed_gives_the_same_answer_again(gateway: RunningGateway) -> None:
    chat = new_chat(gateway, temperature=1.0, seed=7)
    first = answer(gateway, chat, text=QUESTION)

    assert text_of(answer(gateway, chat, keep=1)) == text_of(first)


def test_who_leaves_stops_the_answer_and_what_there_was_is_kept(gateway: RunningGateway) -> None:
    chat = new_chat(gateway, max_tokens=100_000)
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    headers = {"Authorization": f"Bearer {KEY}"}
    connection.request("POST", f"/api/chats/{chat}/answer", json.dumps({"text": QUESTION}), headers)
    response = connection.getresponse()
    while b'"html"' not in response.readline():
        pass
    response.close()
    connection.close()

    assert eventually(lambda: len(messages(gateway, chat)) == 2, 10)
    assert messages(gateway, chat)[1][1]


def test_stop_ends_the_answer_for_whoever_reads_it(gateway: RunningGateway) -> None:
    chat = new_chat(gateway, max_tokens=100_000)
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    connection.request(
        "POST", f"/api/chats/{chat}/answer", json.dumps({"text": QUESTION}), {"Authorization": f"Bearer {KEY}"}
    )
    response = connection.getresponse()
    while b'"html"' not in response.readline():
        pass
    busy, _ = call(gateway, "POST", f"/api/chats/{chat}/answer", {"text": "another"})
    stopped, _ = call(gateway, "POST", f"/api/chats/{chat}/stop")
    rest = response.read().decode()
    connection.close()

    assert (busy, stopped) == (409, 204)
    assert '"finish_reason":"cancelled"' in rest
    _, shown = call(gateway, "GET", f"/api/chats/{chat}")
    assert shown["messages"][1]["details"]["finish_reason"] == "cancelled"


def test_a_cloud_that_is_not_there_is_an_event_and_the_question_is_kept(tiny: Path) -> None:
    with run_gateway(tiny) as gateway:
        chat = new_chat(gateway)
        events = answer(gateway, chat, text=QUESTION)

        assert "cloud" in last(events, "error")["message"]
        assert last(events, "done")["finish_reason"] == "error"
        assert messages(gateway, chat) == [("user", QUESTION)]


@pytest.mark.parametrize("question", [{"keep": 1}, {"keep": 0, "text": "sun"}], ids=["answered again", "edited"])
def test_a_question_that_fails_leaves_the_chat_as_it_was(tiny: Path, question: dict[str, Any]) -> None:
    with run_gateway(tiny) as gateway:
        chat = new_chat(gateway)
        said = [("user", QUESTION), ("assistant", "It did."), ("user", "rain"), ("assistant", "No.")]
        for role, text in said:
            gateway.gateway.history.append(chat, role, text)

        assert last(answer(gateway, chat, **question), "done")["finish_reason"] == "error"
        assert messages(gateway, chat) == said


def test_an_edit_that_is_too_long_leaves_the_chat_as_it_was(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)
    first = answer(gateway, chat, text=QUESTION)

    assert "the last turn alone" in last(answer(gateway, chat, text=QUESTION * 1000, keep=0), "error")["message"]
    assert messages(gateway, chat) == [("user", QUESTION), ("assistant", text_of(first))]


@contextmanager
def full_disk(gateway: RunningGateway) -> Iterator[None]:
    """Nothing can be added to the history meanwhile; SQLite says what it says of a full disk."""
    connection = gateway.gateway.history._connection
    for table in ("chats", "messages"):
        connection.execute(
            f"CREATE TEMP TRIGGER full_{table} BEFORE INSERT ON {table} "
            "BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
        )
    yield
    for table in ("chats", "messages"):
        connection.execute(f"DROP TRIGGER full_{table}")


def test_a_disk_that_keeps_nothing_is_said_and_the_chat_goes_on(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)
    with full_disk(gateway):
        first = answer(gateway, chat, text=QUESTION)
        said = [("user", QUESTION), ("assistant", text_of(first))]

        assert "disk is full" in next(event for event in first if event["kind"] == "notice")["message"]
        assert messages(gateway, chat) == said
        exported = call(gateway, "GET", f"/api/chats/{chat}/export")[1]["messages"]
        assert [(message["role"], message["content"]) for message in exported] == said
        assert gateway.gateway.history.messages(chat) == []


def test_on_a_full_disk_a_new_chat_begins_in_memory(gateway: RunningGateway) -> None:
    kept = new_chat(gateway)
    with full_disk(gateway):
        chat = new_chat(gateway)
        first = answer(gateway, chat, text=QUESTION)
        answer(gateway, chat, text="rain")

    assert "disk is full" in next(event for event in first if event["kind"] == "notice")["message"]
    assert [role for role, _ in messages(gateway, chat)] == ["user", "assistant"] * 2
    assert {one["id"] for one in call(gateway, "GET", "/api/chats")[1]} == {kept, chat}
    assert call(gateway, "GET", "/api/chats?search=cat%20sat")[1][0]["id"] == chat
    assert call(gateway, "DELETE", f"/api/chats/{chat}")[0] == 204
    assert [one["id"] for one in call(gateway, "GET", "/api/chats")[1]] == [kept]


def test_what_a_full_disk_refused_is_kept_once_there_is_space(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)
    with full_disk(gateway):
        answer(gateway, chat, text=QUESTION)
    following = answer(gateway, chat, text="rain")

    assert [event for event in following if event["kind"] == "notice"] == []
    kept = gateway.gateway.history.messages(chat)
    assert [(message.role, message.content) for message in kept] == messages(gateway, chat)
    assert [message.role for message in kept] == ["user", "assistant"] * 2
    assert kept[1].details["figures"]["tokens"] > 0
    assert gateway.gateway.history.chat(chat).title == QUESTION


def test_an_edit_that_the_disk_refuses_leaves_what_is_kept_as_it_was(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)
    answer(gateway, chat, text=QUESTION)
    before = gateway.gateway.history.messages(chat)

    with full_disk(gateway):
        answer(gateway, chat, text="sun", keep=0)

    assert gateway.gateway.history.messages(chat) == before


def test_an_error_that_nobody_foresaw_is_logged_without_its_text(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(QUESTION)

    monkeypatch.setattr(Prompter, "turns", fail)
    events = answer(gateway, new_chat(gateway), text=QUESTION)
    gc.collect()  # asyncio tells of an error that nobody took, once its task is gone

    assert "log says where" in last(events, "error")["message"]
    assert re.fullmatch(r"an answer of the page failed: RuntimeError at test_page_api\.py:\d+", caplog.messages[-1])
    assert QUESTION not in caplog.text


def test_a_question_that_was_never_answered_goes_with_the_next(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)
    gateway.gateway.history.append(chat, "user", QUESTION)

    events = answer(gateway, chat, text="rain")

    assert last(events, "done")["finish_reason"] in ("stop", "length")


def test_chats_are_listed_searched_changed_exported_and_deleted(gateway: RunningGateway) -> None:
    chat = new_chat(gateway)
    answer(gateway, chat, text=QUESTION)

    assert [one["id"] for one in call(gateway, "GET", "/api/chats?search=CAT")[1]] == [chat]
    assert call(gateway, "GET", "/api/chats?search=elephant") == (200, [])
    assert call(gateway, "PATCH", f"/api/chats/{chat}", {"title": "Cats"})[1]["title"] == "Cats"
    assert call(gateway, "GET", f"/api/chats/{chat}/export")[1]["messages"][0]["content"] == QUESTION
    assert call(gateway, "DELETE", f"/api/chats/{chat}") == (204, None)
    assert call(gateway, "GET", f"/api/chats/{chat}")[0] == 404
    new_chat(gateway)
    assert call(gateway, "DELETE", "/api/chats") == (204, None)
    assert call(gateway, "GET", "/api/chats") == (200, [])


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        ({"text": " "}, 400),
        ({"text": QUESTION, "images": ["data:image/png;base64,AAAA"]}, 400),
        ({"text": QUESTION, "keep": -1}, 400),
        ({"text": 5}, 400),
    ],
)
def test_what_cannot_be_answered_is_refused_and_not_kept(
    gateway: RunningGateway, wanted: dict[str, Any], status: int
) -> None:
    chat = new_chat(gateway)

    assert call(gateway, "POST", f"/api/chats/{chat}/answer", wanted)[0] == status
    assert messages(gateway, chat) == []


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"seed": 1.5}])
def test_settings_that_make_no_sense_are_refused(gateway: RunningGateway, settings: dict[str, Any]) -> None:
    assert call(gateway, "POST", "/api/chats", {"settings": settings})[0] == 400


def test_images_come_from_data_urls_alone(tiny_exports: Callable[[str], Path]) -> None:
    export = tiny_exports("llava")
    with run_gateway(export) as gateway:
        chat = new_chat(gateway)
        for url in ("https://a.example/b.png", "file:///etc/passwd", "data:image/png;base64,!", "data:,x"):
            status, _ = call(gateway, "POST", f"/api/chats/{chat}/answer", {"text": "look", "images": [url]})
            assert status == 400, url
        damaged = "data:image/png;base64," + base64.b64encode(b"no image").decode()
        events = answer(gateway, chat, text="look", images=[damaged])

        assert "image" in last(events, "error")["message"]


def test_the_page_is_told_what_holds(gateway: RunningGateway) -> None:
    _, info = call(gateway, "GET", "/api/info")

    assert info["history_kept"] is False
    assert info["models"][0]["scheme"] == "permutation"
    assert "not encryption" in info["models"][0]["limit"]


def test_nothing_is_told_without_the_key(gateway: RunningGateway) -> None:
    for path in ("/api/info", "/api/chats"):
        assert gateway.ask(path, headers={"Authorization": ""})[0] == 401


def test_the_list_survives_a_history_that_is_closed(gateway: RunningGateway) -> None:
    gateway.gateway.history.close()

    status, said = call(gateway, "GET", "/api/chats")

    assert status == 500
    assert "history" in said["error"]["message"]
    assert sqlite3.ProgrammingError.__name__ not in said["error"]["message"]
