"""`POST /v1/completions`: plain text goes on, without a chat template; streamed and not."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from device_app.bundle import Bundle
from device_app.gateway.choices import Account, deltas
from device_app.gateway.errors import json_response, refused_value
from device_app.gateway.forms import constraint_of
from device_app.gateway.generation import MOST_CHOICES, Generation, completion_generation
from device_app.gateway.logprobs import completion_logprobs
from device_app.gateway.openai_types import CompletionRequest, read
from device_app.gateway.prompts import text_prompt
from device_app.gateway.serving import Gateway, ServedModel
from device_app.gateway.streams import EventStream, answered
from device_app.prompt import Prompt

TOKENS = 16  # OpenAI's default


def routes(gateway: Gateway) -> list[Route]:
    """The one route."""

    async def complete(request: Request) -> Response:
        asked = await read(request, CompletionRequest)
        if asked.stream:
            return EventStream(_stream(gateway, asked))
        return await answered(request, _whole(gateway, asked))

    return [Route("/v1/completions", complete, methods=["POST"])]


@dataclass(frozen=True)
class _Piece:
    choice: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None


@dataclass(frozen=True)
class _Completion:
    """A request that can be answered. echoes: what stands before each prompt's answers."""

    served: ServedModel
    prompts: list[Prompt]
    echoes: list[str]
    generation: Generation
    account: Account
    name: str  # of the answer
    created: int

    @property
    def choices(self) -> int:
        """Of all prompts."""
        return len(self.prompts) * self.generation.choices

    async def pieces(self) -> AsyncGenerator[_Piece, None]:
        """The choices as they are made, those of the first prompt first."""
        for at, (prompt, echo) in enumerate(zip(self.prompts, self.echoes, strict=True)):
            first, begun, offset = at * self.generation.choices, -1, 0
            async with aclosing(deltas(self.served, prompt, self.generation, self.account)) as parts:
                async for part in parts:
                    text = part.text
                    if part.choice != begun:
                        begun, text, offset = part.choice, echo + text, len(echo)
                    logprobs = None
                    if self.generation.top_logprobs is not None:
                        logprobs, offset = completion_logprobs(self.served.bundle, part.logprobs, offset)
                    yield _Piece(first + part.choice, text, logprobs, part.finish_reason)

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What every answer and every chunk of one has."""
        return {
            "id": self.name,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "choices": choices,
        }


async def _completion(gateway: Gateway, asked: CompletionRequest) -> _Completion:
    """Checks a request, and makes its prompts. Raises ApiError, StipError."""
    served = gateway.model(asked.model)
    bundle = served.bundle
    if bundle.manifest.kind not in ("decoder", "vision-decoder"):
        raise refused_value("model", f"one of the kind {bundle.manifest.kind!r}", "a decoder")
    if asked.suffix:
        raise refused_value("suffix", "one", "none: the model writes forward alone")
    if asked.echo and asked.logprobs is not None:
        raise refused_value("echo", "true with logprobs", "one of the two: a prompt has no logprobs here")
    generation = completion_generation(asked, bundle, TOKENS)
    if asked.best_of not in (None, generation.choices):
        raise refused_value("best_of", str(asked.best_of), "n, or nothing")
    given = _prompts(asked.prompt)
    if len(given) * generation.choices > MOST_CHOICES:
        raise refused_value("prompt", f"{len(given) * generation.choices} choices in all", f"at most {MOST_CHOICES}")
    prompts = await asyncio.to_thread(lambda: [text_prompt(bundle, one) for one in given])
    constraint = await asyncio.to_thread(constraint_of, served, asked.response_format, None)
    return _Completion(
        served,
        prompts,
        [_shown(bundle, one) if asked.echo else "" for one in given],
        replace(generation, constraint=constraint),
        Account(generation.sampling.seed),
        f"cmpl-{secrets.token_hex(12)}",
        int(time.time()),
    )


def _prompts(given: str | list[Any]) -> list[str | list[int]]:
    """A text, ids, or several of either."""
    if isinstance(given, str):
        return [given]
    if given and all(type(one) is int for one in given):
        return [given]
    for one in given:
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(token) is int for token in one)):
            raise refused_value("prompt", f"a {type(one).__name__} among prompts", "text, ids, or lists of either")
    if not given:
        raise refused_value("prompt", "none", "at least one")
    return given


def _shown(bundle: Bundle, given: str | list[int]) -> str:
    if isinstance(given, str):
        return given
    return b"".join(bundle.tokenizer.token_bytes(token) for token in given).decode("utf-8", "replace")


async def _whole(gateway: Gateway, asked: CompletionRequest) -> Response:
    completion = await _completion(gateway, asked)
    choices: list[dict[str, Any]] = [
        {"index": at, "text": "", "logprobs": None, "finish_reason": None} for at in range(completion.choices)
    ]
    async with aclosing(completion.pieces()) as pieces:
        async for piece in pieces:
            choice = choices[piece.choice]
            choice["text"] += piece.text
            choice["finish_reason"] = piece.finish_reason
            if piece.logprobs is not None:
                before = choice["logprobs"] or {}
                choice["logprobs"] = {name: before.get(name, []) + more for name, more in piece.logprobs.items()}
    account = completion.account
    return json_response(completion.body(choices) | {"usage": account.usage(), "stip": account.stip()})


async def _stream(gateway: Gateway, asked: CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
    completion = await _completion(gateway, asked)
    with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    async with aclosing(completion.pieces()) as pieces:
        async for piece in pieces:
            choice = {
                "index": piece.choice,
                "text": piece.text,
                "logprobs": piece.logprobs,
                "finish_reason": piece.finish_reason,
            }
            body = completion.body([choice])
            if with_usage:
                body["usage"] = None
            elif piece.finish_reason is not None and piece.choice == completion.choices - 1:
                body["stip"] = completion.account.stip()
            yield body
    if with_usage:
        account = completion.account
        yield completion.body([]) | {"usage": account.usage(), "stip": account.stip()}
