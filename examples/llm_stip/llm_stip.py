"""A plugin for `llm` (llm.datasette.io): the model `stip` is a device bundle and its cloud.

pip install examples/llm_stip
STIP_BUNDLE=OUT/device STIP_URL=ws://127.0.0.1:8765 llm -m stip "What is the capital of France?"
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import llm
from pydantic import Field

from device_app import Assistant, Sampling
from shared.errors import StipError


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Called by llm."""
    register(Stip())


class Stip(llm.Model):
    """Chats, with the whole conversation. The assistant stays open: the cloud holds what was said before."""

    model_id = "stip"
    can_stream = True

    class Options(llm.Options):
        """Given with -o."""

        temperature: float = Field(default=0.0, description="0 is greedy")
        top_p: float = Field(default=1.0, description="share of the probability that is drawn from")
        seed: int = Field(default=0, description="same seed, same answer")
        max_tokens: int = Field(default=512, description="of an answer")

    def __init__(self) -> None:
        self._assistant: Assistant | None = None

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        """Called by llm for every prompt."""
        options: Any = prompt.options
        sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
        try:
            answer = self._opened().chat(
                _messages(prompt, conversation), sampling=sampling, max_tokens=options.max_tokens
            )
            yield from answer
        except StipError as error:
            raise llm.ModelError(f"{error}" + (f" ({error.hint})" if error.hint else "")) from None
        response.set_usage(input=answer.stats.prompt_tokens, output=answer.stats.tokens)

    def _opened(self) -> Assistant:
        if self._assistant is None:
            try:
                folder, url = os.environ["STIP_BUNDLE"], os.environ["STIP_URL"]
            except KeyError as error:
                raise llm.ModelError(f"set {error.args[0]}: STIP_BUNDLE=OUT/device STIP_URL=ws://…") from None
            self._assistant = Assistant.open(folder, url, token=os.environ.get("STIP_TOKEN"))
        return self._assistant


def _messages(prompt: llm.Prompt, conversation: llm.Conversation | None) -> list[dict[str, str]]:
    """The conversation so far, and the prompt."""
    responses = conversation.responses if conversation is not None else []
    before = [turn for turn in responses if isinstance(turn, llm.Response)]
    system = next((one.system for one in (*(turn.prompt for turn in before), prompt) if one.system), None)
    messages = [{"role": "system", "content": system}] if system else []
    for turn in before:
        messages.append({"role": "user", "content": turn.prompt.prompt or ""})
        messages.append({"role": "assistant", "content": turn.text()})
    return [*messages, {"role": "user", "content": prompt.prompt or ""}]
