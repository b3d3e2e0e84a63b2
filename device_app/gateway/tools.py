"""Calls of tools, as chat templates teach models to write them, found in an answer's text.

    <tool_call>{"name": …, "arguments": {…}}</tool_call>       Hermes, Qwen
    [TOOL_CALLS][{"name": …, "arguments": {…}}]                Mistral; newer ones: [TOOL_CALLS]name{…}
    <|python_tag|>{"name": …, "parameters": {…}}               Llama 3

Some markers are special tokens, which are not shown, so an answer that is a call from its first character on counts
too. What is no call of a tool that was offered is text.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from device_app.gateway.errors import refused_value
from device_app.gateway.openai_types import OfferedTool, parsed

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MARKERS = (OPENING, "[TOOL_CALLS]", "<|python_tag|>")
BETWEEN = " \t\r\n,;"  # what stands between calls
ID_LENGTH = 9  # letters and digits: Mistral's templates refuse any other id


@dataclass(frozen=True)
class ToolCall:
    """arguments: JSON text, as OpenAI's API has it."""

    name: str
    arguments: str

    def body(self) -> dict[str, Any]:
        """As it stands in an answer, with a fresh id."""
        letters = string.ascii_letters + string.digits
        name = "".join(secrets.choice(letters) for _ in range(ID_LENGTH))
        return {"id": name, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Tools:
    """What a request offers. forced: names of which one must be called; none where the model may choose to talk."""

    offered: Sequence[dict[str, Any]]
    names: frozenset[str]
    forced: frozenset[str]
    several: bool

    def schema(self) -> dict[str, Any]:
        """What a forced call looks like."""
        return {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": tool["function"]["name"]},
                        "arguments": tool["function"].get("parameters") or {"type": "object"},
                    },
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for tool in self.offered
                if tool["function"]["name"] in self.forced
            ]
        }


def tools_of(offered: Sequence[dict[str, Any]] | None, choice: Any, several: bool | None) -> Tools | None:
    """The tools of a request; None where the model is to call none. Raises ApiError (400)."""
    names = []
    for at, tool in enumerate(offered or ()):
        read = parsed(tool, OfferedTool, f"tools[{at}]")
        if read.type != "function" or read.function is None:
            raise refused_value(f"tools[{at}].type", repr(read.type[:40]), "'function' with function")
        names.append(read.function.name)
    known = frozenset(names)
    match choice:
        case None | "auto":
            forced: frozenset[str] = frozenset()
        case "none":
            return None
        case "required" if known:
            forced = known
        case {"type": "function", "function": {"name": str(name)}} if name in known:
            forced = frozenset([name])
        case _:
            raise refused_value("tool_choice", "something else", "auto, none, required, or a function that is offered")
    return Tools(list(offered or ()), known, forced, several is not False) if known else None


class ToolReader:
    """Splits an answer, as it comes, into text and calls."""

    def __init__(self, tools: Tools) -> None:
        self._names = tools.names
        self._several = tools.several
        self._held = ""
        self._begun = False  # text was released: only a marker begins a call now
        self._calling = False

    def push(self, text: str) -> str:
        """Text that is surely none of a call."""
        self._held += text
        if self._calling or self._may_begin():
            return ""
        found = [at for marker in MARKERS if (at := self._held.find(marker)) >= 0]
        if found:
            self._calling = True
            return self._release(min(found))
        keep = max(_overlap(self._held, marker) for marker in MARKERS)
        return self._release(len(self._held) - keep)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The text that was held back, and the calls. Where what looked like a call is none, all of it is text."""
        text, calls = _parsed(self._held, self._names)
        if not calls:
            return self._held, []
        return text, calls if self._several else calls[:1]

    def _release(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        self._begun = self._begun or bool(text)
        return text

    def _may_begin(self) -> bool:
        """Whether the answer so far could be a call whose marker is not shown."""
        if self._begun:
            return False
        start = self._held.lstrip()
        if not start or start[0] == "{" or start.startswith("[{"[: len(start)]):
            return True
        return any(f"{name}{{".startswith(start) or start.startswith(f"{name}{{") for name in self._names)


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that could be the beginning of `marker`."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)


def _parsed(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """The text outside of calls, and the calls."""
    if OPENING in text:
        before, *rest = text.split(OPENING)
        outside, calls = [before], []
        for piece in rest:
            inside, _, behind = piece.partition(CLOSING)
            found = _calls(inside, names)
            calls += found
            outside.append(behind if found else OPENING + piece)
        return "".join(outside).rstrip(), calls
    for marker in MARKERS:
        before, found_marker, behind = text.partition(marker)
        if found_marker:
            return before.rstrip(), _calls(behind, names)
    return "", _calls(text, names)


def _calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """All calls in JSON one behind the other; none where anything else stands there."""
    decoder, at, calls = json.JSONDecoder(), 0, []
    text = text.strip(BETWEEN)
    while at < len(text):
        name = next((name for name in names if text.startswith(f"{name}{{", at)), None)
        try:
            value, end = decoder.raw_decode(text, at + len(name or ""))
        except (ValueError, RecursionError):
            return []
        for one in value if isinstance(value, list) else [value]:
            call = _call({"name": name, "arguments": one} if name else one, names)
            if call is None:
                return []
            calls.append(call)
        at = end + len(text[end:]) - len(text[end:].lstrip(BETWEEN))
    return calls


def _call(value: Any, names: Collection[str]) -> ToolCall | None:
    match value:
        case {"name": str(name), "arguments": dict(arguments)} | {"name": str(name), "parameters": dict(arguments)}:
            return ToolCall(name, json.dumps(arguments, ensure_ascii=False)) if name in names else None
    return None
