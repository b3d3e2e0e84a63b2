"""`POST /v1/chat/completions`, streamed and not."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from device_app.bundle import Bundle
from device_app.gateway.choices import Account, deltas
from device_app.gateway.errors import json_response, refused_value
from device_app.gateway.forms import constraint_of
from device_app.gateway.generation import Generation, chat_generation
from device_app.gateway.logprobs import chat_logprobs
from device_app.gateway.messages import assistant_messages
from device_app.gateway.openai_types import ChatRequest, read
from device_app.gateway.prompts import chat_prompt, check_images
from device_app.gateway.serving import Gateway, ServedModel
from device_app.gateway.streams import EventStream, answered
from device_app.gateway.tools import ToolCall, ToolReader, Tools, tools_of
from device_app.prompt import Prompt


def routes(gateway: Gateway) -> list[Route]:
    """The one route."""

    async def chat(request: Request) -> Response:
        asked = await read(request, ChatRequest)
        if asked.stream:
            return EventStream(_stream(gateway, asked))
        return await answered(request, _whole(gateway, asked))

    return [Route("/v1/chat/completions", chat, methods=["POST"])]


@dataclass(frozen=True)
class _Piece:
    """What came of a choice: `content` of its message, calls, and at its end why it ended."""

    choice: int
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class _Chat:
    """A request that can be answered."""

    served: ServedModel
    prompt: Prompt
    generation: Generation
    tools: Tools | None
    account: Account
    name: str  # of the answer
    created: int

    async def pieces(self) -> AsyncGenerator[_Piece, None]:
        """The choices as they are made, with calls told from text."""
        reader: ToolReader | None = None
        async with aclosing(deltas(self.served, self.prompt, self.generation, self.account)) as parts:
            async for part in parts:
                if self.tools is not None and reader is None:
                    reader = ToolReader(self.tools)
                text, calls, reason = part.text, list[ToolCall](), part.finish_reason
                if reader is not None:
                    text = reader.push(text)
                    if reason is not None:
                        rest, calls = reader.finish()
                        text, reader = text + rest, None
                        reason = "tool_calls" if calls else reason
                logprobs = None
                if self.generation.top_logprobs is not None:
                    logprobs = chat_logprobs(self.served.bundle, part.logprobs)
                yield _Piece(part.choice, text, calls, logprobs, reason)

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What every answer and every chunk of one has."""
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "choices": choices,
        }


async def _chat(gateway: Gateway, asked: ChatRequest) -> _Chat:
    """Checks a request, and makes its prompt. Raises ApiError, StipError."""
    served = gateway.model(asked.model)
    bundle = served.bundle
    if bundle.manifest.kind not in ("decoder", "vision-decoder"):
        raise refused_value("model", f"one of the kind {bundle.manifest.kind!r}", "a decoder")
    _refuse_unknown(asked)
    tools = tools_of(asked.tools, asked.tool_choice, asked.parallel_tool_calls)
    if tools is not None and not (bundle.template is not None and bundle.template.takes_tools):
        raise refused_value("tools", "some", "none: this model's chat template has no place for them")
    generation = chat_generation(asked, bundle)
    prompt = await asyncio.to_thread(_prompt, bundle, asked, tools)
    constraint = await asyncio.to_thread(constraint_of, served, asked.response_format, tools)
    generation = replace(generation, constraint=constraint)
    account = Account(generation.sampling.seed)
    return _Chat(served, prompt, generation, tools, account, f"chatcmpl-{secrets.token_hex(12)}", int(time.time()))


def _prompt(bundle: Bundle, asked: ChatRequest, tools: Tools | None) -> Prompt:
    """In a thread of its own: images are decoded, and long texts cut into tokens."""
    messages = assistant_messages(asked.messages, images=bundle.manifest.kind == "vision-decoder")
    check_images(messages, bundle)
    return chat_prompt(bundle, messages, tools)


def _refuse_unknown(asked: ChatRequest) -> None:
    """What would change the answer, and cannot be had."""
    if asked.functions is not None or asked.function_call is not None:
        name = "functions" if asked.functions is not None else "function_call"
        raise refused_value(name, "the form before tools", "tools and tool_choice")
    if asked.audio is not None or (asked.modalities is not None and asked.modalities != ["text"]):
        raise refused_value("modalities", "more than text", "text alone")


async def _whole(gateway: Gateway, asked: ChatRequest) -> Response:
    chat = await _chat(gateway, asked)
    choices: list[dict[str, Any]] = [
        {
            "index": at,
            "message": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None if chat.generation.top_logprobs is None else {"content": [], "refusal": None},
            "finish_reason": None,
        }
        for at in range(chat.generation.choices)
    ]
    async with aclosing(chat.pieces()) as pieces:
        async for piece in pieces:
            _add(choices[piece.choice], piece)
    body = chat.body("chat.completion", choices)
    return json_response(body | {"usage": chat.account.usage(), "stip": chat.account.stip()})


def _add(choice: dict[str, Any], piece: _Piece) -> None:
    message = choice["message"]
    message["content"] += piece.content
    if piece.logprobs:
        choice["logprobs"]["content"] += piece.logprobs
    if piece.finish_reason is not None:
        choice["finish_reason"] = piece.finish_reason
    if piece.calls:
        message["tool_calls"] = [call.body() for call in piece.calls]
        message["content"] = message["content"] or None


async def _stream(gateway: Gateway, asked: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    chat = await _chat(gateway, asked)
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)

    def chunk(piece: _Piece, delta: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.choice, "delta": delta, "finish_reason": piece.finish_reason}
        choice["logprobs"] = {"content": piece.logprobs, "refusal": None} if piece.logprobs else None
        body = chat.body("chat.completion.chunk", [choice])
        if with_usage:
            body["usage"] = None
        elif piece.finish_reason is not None and piece.choice == chat.generation.choices - 1:
            body["stip"] = chat.account.stip()
        return body

    begun = -1
    async with aclosing(chat.pieces()) as pieces:
        async for piece in pieces:
            if piece.choice != begun:
                begun = piece.choice
                yield chunk(_Piece(piece.choice), {"role": "assistant", "content": ""})
            delta: dict[str, Any] = {"content": piece.content} if piece.content else {}
            if piece.calls:
                delta["tool_calls"] = [{"index": at, **call.body()} for at, call in enumerate(piece.calls)]
            if delta or piece.logprobs or piece.finish_reason is not None:
                yield chunk(piece, delta)
    if with_usage:
        body = chat.body("chat.completion.chunk", [])
        yield body | {"usage": chat.account.usage(), "stip": chat.account.stip()}
