"""A cloud that lies, on a real socket, where drafts are on: no lie is believed, and each face says so."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from device_app.answer import Answer
from device_app.assistant import Assistant
from shared.errors import Cancelled, CloudError, DishonestError, RefusedError
from shared.wire import Array, Error, Logits, Message, Opened
from tests.conftest import RunningCloud, open_assistant, run_cloud
from tests.device_app.gateway.asking import client_of
from tests.device_app.gateway.gateways import run_gateway
from tests.system.lying_relay import Lie, changed, lying_relay, with_tensors

COPIES = "the cat sat on the mat and the dog sat on the mat and the cat sat on the mat and the dog"
TOKENS = 60
AT_ONCE = 0.5  # seconds


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


def answered(assistant: Assistant, most: int = TOKENS) -> Answer:
    """A greedy answer to a prompt that repeats itself, so that much is drafted."""
    return assistant.complete(COPIES, max_tokens=most).finish()


def in_drafts(lie: Callable[[Logits], Message]) -> Lie:
    """Lies where rows of a draft are asked for alone; `lies` counts."""

    def said(message: Message) -> Iterable[Message]:
        drafted = isinstance(message, Logits) and message.values.shape[0] > 1
        return [lie(message) if drafted and isinstance(message, Logits) else message]

    return said


def with_item(array: Array, at: tuple[int, int], value: float) -> Array:
    other = array.copy()
    other[at] = value
    return other


LIES: dict[str, Callable[[Logits], Message]] = {
    "an id beyond the vocabulary": lambda rows: with_tensors(rows, ids=with_item(rows.ids, (1, 0), 2**32 - 1)),
    "an id twice": lambda rows: with_tensors(rows, ids=with_item(rows.ids, (1, 0), int(rows.ids[1, 1]))),
    "NaN at the top of a later row": lambda rows: with_tensors(rows, values=with_item(rows.values, (1, 0), np.nan)),
    "NaN at the end of the last row": lambda rows: with_tensors(rows, values=with_item(rows.values, (-1, -1), np.nan)),
    "infinity in a later row": lambda rows: with_tensors(rows, values=with_item(rows.values, (1, 0), np.inf)),
    "a later row not in order": lambda rows: with_tensors(rows, values=with_item(rows.values, (1, -1), 1e4)),
    "a log-sum-exp too small": lambda rows: with_tensors(rows, log_sum_exp=with_item(rows.log_sum_exp, (1, 0), -5)),
    "a log-sum-exp too large": lambda rows: with_tensors(rows, log_sum_exp=with_item(rows.log_sum_exp, (1, 0), 500)),
    "a log-sum-exp that is none": lambda rows: with_tensors(
        rows, log_sum_exp=with_item(rows.log_sum_exp, (1, 0), np.nan)
    ),
    "a row too few": lambda rows: changed(rows, tensors=tuple(tensor[:-1] for tensor in rows.tensors)),
    "a row too many": lambda rows: changed(
        rows, tensors=tuple(tensor[[0, *range(len(tensor))]] for tensor in rows.tensors)
    ),
    "a KV length without the draft": lambda rows: changed(rows, kv_length=rows.kv_length - 1),
    "a KV length beyond it": lambda rows: changed(rows, kv_length=rows.kv_length + 1),
    "the answer to another request": lambda rows: changed(rows, seq=rows.seq + 1),
    "an error to another request": lambda rows: Error(code="out_of_step", message="", seq=rows.seq - 1, kv_length=0),
}


@pytest.mark.parametrize("lie", LIES)
def test_no_lie_about_a_draft_is_believed(lie: str, tiny: Path, cloud: RunningCloud) -> None:
    with lying_relay(cloud.url, in_drafts(LIES[lie])) as url, open_assistant(tiny, url, retry_seconds=1) as assistant:
        with pytest.raises(DishonestError) as caught:
            answered(assistant)
        assert assistant.counters.round_trips
    assert "cat" not in str(caught.value)


def test_a_reply_that_comes_twice_ends_the_answer(tiny: Path, cloud: RunningCloud) -> None:
    with (
        lying_relay(cloud.url, lambda said: [said] * (1 + isinstance(said, Logits))) as url,
        open_assistant(tiny, url, retry_seconds=1) as assistant,
        pytest.raises(DishonestError),
    ):
        answered(assistant)


def test_after_a_lie_the_next_question_is_answered(tiny: Path, cloud: RunningCloud) -> None:
    lies = iter([LIES["an id twice"]])
    once = in_drafts(lambda rows: next(lies, lambda honest: honest)(rows))
    with open_assistant(tiny, cloud.url) as assistant:
        ids = answered(assistant).ids
    with lying_relay(cloud.url, once) as url, open_assistant(tiny, url, retry_seconds=1) as assistant:
        with pytest.raises(DishonestError):
            answered(assistant)
        assert answered(assistant).ids == ids


def test_a_lie_is_a_bad_gateway_to_any_client_and_an_error_on_the_page(tiny: Path, cloud: RunningCloud) -> None:
    lie = in_drafts(LIES["NaN at the end of the last row"])
    with lying_relay(cloud.url, lie) as url, run_gateway(tiny, cloud=url) as gateway, client_of(gateway) as client:
        with pytest.raises(openai.InternalServerError) as failure:
            client.completions.create(model="llama", prompt=COPIES, max_tokens=TOKENS, temperature=0)
        assert failure.value.status_code == 502 and failure.value.code == "cloud_dishonest"
        chat = json.loads(gateway.ask("/api/chats", method="POST", body=b"{}")[2])["id"]
        body = json.dumps({"text": COPIES * 2}).encode()
        _, _, events = gateway.ask(f"/api/chats/{chat}/answer", method="POST", body=body)
    said = [json.loads(line.removeprefix("data: ")) for line in events.decode().split("\n\n") if line]
    [error] = [event for event in said if event["kind"] == "error"]
    assert error["message"].startswith("logits: ")
    assert [event["finish_reason"] for event in said if event["kind"] == "done"] == ["error"]


# --- limits that make no sense ---


def with_limits(**limits: int) -> Lie:
    return lambda said: [changed(said, **limits) if isinstance(said, Opened) else said]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_top_k": 0},
        {"max_rows": 0},
        {"max_rows": 1},
        {"max_rows": 2**32 - 1},
        {"max_full_rows": 0},
        {"window": 0},
        {"max_frame": 1024 + 4 * 64},
        {"context": 2**32 - 1},
    ],
    ids=str,
)
def test_limits_that_make_no_sense_change_no_token(limits: dict[str, int], tiny: Path, cloud: RunningCloud) -> None:
    longest: list[int] = []
    with open_assistant(tiny, cloud.url) as assistant:
        ids = answered(assistant).ids
    with (
        lying_relay(cloud.url, with_limits(**limits)) as url,
        open_assistant(
            tiny, url, retry_seconds=1, on_frame=lambda way, frame: longest.append(len(frame) if way == "up" else 0)
        ) as assistant,
    ):
        assert answered(assistant).ids == ids
    assert max(longest) <= limits.get("max_frame", 2**32)


@pytest.mark.parametrize("context", [0, 1])
def test_a_context_that_holds_no_question_is_refused(context: int, tiny: Path, cloud: RunningCloud) -> None:
    with (
        lying_relay(cloud.url, with_limits(context=context)) as url,
        open_assistant(tiny, url, retry_seconds=1) as assistant,
    ):
        for ask in (lambda: answered(assistant), lambda: assistant.chat([{"role": "user", "content": "hi"}]).finish()):
            with pytest.raises(RefusedError) as caught:
                ask()
            assert caught.value.code == "context_full"


# --- clouds that do not come to an end ---


def silent(said: Message) -> Iterable[Message]:
    """Says nothing but what a session begins with."""
    return [said] if isinstance(said, Opened) else []


def farewells(said: Message) -> Iterable[Message]:
    """Says farewell for ever, and stays."""
    if isinstance(said, Opened):
        yield said
    while not isinstance(said, Opened):
        yield Error(code="idle", message="soon", seq=None)


@pytest.mark.parametrize("lie", [silent, farewells])
def test_who_waits_for_a_cloud_that_never_answers_stops_at_once(lie: Lie, tiny: Path, cloud: RunningCloud) -> None:
    with lying_relay(cloud.url, lie) as url:
        assistant = open_assistant(tiny, url)
        answer = assistant.complete(COPIES)
        stopped: list[float] = []

        def stop() -> None:
            stopped.append(time.monotonic())
            answer.cancel()

        threading.Timer(1, stop).start()
        with pytest.raises(Cancelled):
            answer.finish()
        assert time.monotonic() - stopped[0] < AT_ONCE
        assistant.close()


def test_a_cloud_that_says_farewell_and_stays_is_left(tiny: Path, cloud: RunningCloud) -> None:
    with lying_relay(cloud.url, farewells) as url:
        assistant = open_assistant(tiny, url, retry_seconds=0)
        began = time.monotonic()
        with pytest.raises(CloudError):
            assistant.complete(COPIES).finish()
        assert time.monotonic() - began < 10
