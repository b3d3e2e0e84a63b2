"""Calls of tools in what models write."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_app.gateway.errors import ApiError
from device_app.gateway.tools import ToolReader, Tools, tools_of

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "time"}}


def offered(several: bool = True) -> Tools:
    tools = tools_of([WEATHER, TIME], None, several)
    assert tools is not None
    return tools


def read(text: str, size: int = 1000, *, several: bool = True) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer that comes in pieces of some size."""
    reader, shown = ToolReader(offered(several)), ""
    for at in range(0, len(text), size):
        shown += reader.push(text[at : at + size])
    rest, calls = reader.finish()
    return shown + rest, [(call.name, json.loads(call.arguments)) for call in calls]


BERN = ("weather", {"city": "Bern"})
ARGUMENTS = '{"city": "Bern"}'
ONE = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (f"<tool_call>\n{ONE}\n</tool_call>", "", [BERN]),
        (f"Let me look.\n<tool_call>\n{ONE}\n</tool_call>", "Let me look.", [BERN]),
        (f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>", "", [BERN, BERN]),
        (f"<tool_call>{ONE}", "", [BERN]),  # its end did not come
        (f"[TOOL_CALLS][{ONE}, {ONE}]", "", [BERN, BERN]),
        (f"[TOOL_CALLS]weather{ARGUMENTS}", "", [BERN]),
        (f"[{ONE}]", "", [BERN]),  # the marker is a special token, which is not shown
        (f"weather{ARGUMENTS}", "", [BERN]),
        (ONE.replace("arguments", "parameters"), "", [BERN]),
        (f"<|python_tag|>{ONE}; {ONE}", "", [BERN, BERN]),
        (f"\n{ONE}\n", "", [BERN]),
    ],
)
def test_calls_are_found_however_they_are_cut(text: str, shown: str, calls: list[tuple[str, Any]], size: int) -> None:
    seen, found = read(text, size)
    assert (seen.strip(), found) == (shown, calls)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "The weather is fine.",
        '{"name": "format_disk", "arguments": {}}',  # not offered
        '{"name": "weather", "arguments": "Bern"}',
        '{"name": "weather", "arguments": {"city": ',
        '{"answer": 42}',
        "[1, 2, 3]",
        "weather is what you asked for",
        "<tool_call>soon</tool_call>",
        f"<tool_call>{ONE.replace('weather', 'nothing')}</tool_call>",
        f"{ONE} is how one would call it",
        "a < b, and [TOOL] is no marker",
        "[" * 5000,
        "",
    ],
)
def test_what_is_no_call_stays_text(text: str, size: int) -> None:
    assert read(text, size) == (text, [])


def test_text_is_not_held_back_longer_than_a_call_could_begin() -> None:
    reader = ToolReader(offered())
    assert reader.push("It is ") == "It is "
    assert reader.push("5 < 6 <tool") == "5 < 6 "
    assert reader.push("box>") == "<toolbox>"


@given(st.text(alphabet='<tool_call>[TOOL_CALLS]{}weather" :,', max_size=60), st.integers(1, 7))
def test_nothing_of_an_answer_without_a_call_is_lost(text: str, size: int) -> None:
    shown, calls = read(text, size)
    assert calls or shown == text


def test_one_call_alone_where_several_are_not_wanted() -> None:
    assert read(f"[{ONE}, {ONE}]", several=False) == ("", [BERN])


def test_a_call_has_an_id_that_every_template_takes() -> None:
    reader = ToolReader(offered())
    reader.push(ONE)
    [call] = reader.finish()[1]
    body = call.body()
    assert len(body["id"]) == 9 and body["id"].isalnum() and body["id"] != call.body()["id"]
    assert body["function"] == {"name": "weather", "arguments": ARGUMENTS}


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([{"type": "web_search"}], None, "tools[0].type"),
        ([{"type": "function"}], None, "tools[0].type"),
        ([{"type": "function", "function": {}}], None, "tools[0].function.name"),
        ([WEATHER], "sometimes", "tool_choice"),
        ([WEATHER], {"type": "function", "function": {"name": "time"}}, "tool_choice"),
        (None, "required", "tool_choice"),
    ],
)
def test_tools_that_cannot_be_offered_are_refused_by_name(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        tools_of(tools, choice, None)
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_choices_of_tools() -> None:
    assert tools_of([WEATHER], "none", None) is None
    assert tools_of([], "auto", None) is None
    required = tools_of([WEATHER, TIME], "required", None)
    assert required is not None and required.forced == {"weather", "time"} and len(required.schema()["anyOf"]) == 2
    named = tools_of([WEATHER, TIME], {"type": "function", "function": {"name": "time"}}, None)
    assert named is not None and named.forced == {"time"} and len(named.schema()["anyOf"]) == 1
