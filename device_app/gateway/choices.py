"""The answers to one request as they are made, one choice after the other on one session: the prompt is sent once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from device_app.answer import Answer
from device_app.assistant import Assistant
from device_app.gateway.generation import Generation
from device_app.gateway.serving import ServedModel
from device_app.logprobs import TokenLogprobs
from device_app.prompt import Prompt

FIGURES = ("bytes_up", "bytes_down", "vectors_up", "round_trips", "full_rows", "replays", "resumes")
DRAFTS = ("drafted", "accepted")


@dataclass(frozen=True)
class Delta:
    """What came of a choice. finish_reason: at its end alone."""

    choice: int
    text: str
    logprobs: list[TokenLogprobs]
    finish_reason: str | None = None


@dataclass
class Account:
    """What a request took, complete once its last choice is."""

    seed: int
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, held by the session already
    completion_tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    figures: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*FIGURES, *DRAFTS), 0))

    def add(self, answer: Answer, *, first: bool) -> None:
        """Counts one choice; its prompt too, where it is the first."""
        stats = answer.stats
        if first:
            self.prompt_tokens += stats.prompt_tokens
            self.cached_tokens += stats.cached_tokens
        self.first_token_seconds = self.first_token_seconds or stats.first_token_seconds
        self.completion_tokens += stats.tokens
        self.seconds += stats.seconds
        for name in self.figures:
            self.figures[name] += getattr(stats.counters, name)

    def usage(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def stip(self) -> dict[str, Any]:
        """What went over the wire: bytes of WebSocket payload, and how it was spent."""
        return {
            **self.figures,
            "seed": self.seed,
            "seconds": round(self.seconds, 6),
            "first_token_seconds": round(self.first_token_seconds, 6),
        }


async def deltas(
    served: ServedModel, prompt: Prompt, generation: Generation, account: Account
) -> AsyncGenerator[Delta, None]:
    """The choices, piece by piece. Closing it early cancels what is being made. Raises ApiError and StipErrors."""
    async with served.pool.lease(prompt.ids) as lease:
        assistant: Assistant = lease.client
        for choice in range(generation.choices):
            answer = await lease.call(_begin(assistant, prompt, generation, choice))
            seen = 0
            async with aclosing(lease.steps(answer)) as steps:
                async for step in steps:
                    upto = min(step.tokens, len(answer.logprobs))
                    logprobs, seen = answer.logprobs[seen:upto], upto
                    if not step.text and answer.stop_text is not None:
                        logprobs = []  # of the stop string, which is no part of the answer
                    if step.text or logprobs:
                        yield Delta(choice, step.text, logprobs)
            account.add(answer, first=choice == 0)
            yield Delta(choice, "", [], answer.finish_reason or "stop")


def _begin(assistant: Assistant, prompt: Prompt, generation: Generation, choice: int) -> Callable[[], Answer]:
    return lambda: assistant.answer(
        prompt,
        sampling=generation.sampling_of(choice),
        max_tokens=generation.max_tokens or assistant.bundle.manifest.context,  # it ends with the context
        stop=generation.stop,
        constraint=None if generation.constraint is None else generation.constraint(),
        top_logprobs=generation.top_logprobs,
    )
