"""Prompts of requests. What does not fit is refused: a program is not told of turns that were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from device_app.bundle import Bundle
from device_app.gateway.errors import ApiError, refused_value
from device_app.gateway.tools import Tools
from device_app.prompt import Prompt, Prompter
from shared.errors import BundleError, UsageError


def chat_prompt(bundle: Bundle, messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> Prompt:
    """The prompt of a conversation. Raises ApiError (400)."""
    prompter = Prompter(bundle)
    try:
        turns = prompter.turns(messages)
        ids = prompter.ids(turns, None if tools is None else tools.offered)
    except (UsageError, BundleError) as error:
        # The bundle was checked when it was opened: what its template refuses are these roles in this order.
        message = str(error) + (f" ({error.hint})" if error.hint else "")
        raise ApiError(400, message, param="messages", code="invalid_value") from None
    return fitting(Prompt(ids, [image for turn in turns for image in turn.images]), bundle, "messages")


def check_images(messages: Sequence[Mapping[str, Any]], bundle: Bundle) -> None:
    """Refuses more images than the context takes, before any is decoded. Raises ApiError (400)."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    count = sum(part["type"] == "image" for content in contents for part in content)
    image, context = bundle.manifest.image, bundle.manifest.context
    if image is not None and count * image.tokens > context:
        raise ApiError(
            400,
            f"messages: {count} images take {count * image.tokens} tokens, wanted at most {context}, the model's "
            "context",
            param="messages",
            code="context_length_exceeded",
        )


def text_prompt(bundle: Bundle, given: str | Sequence[int]) -> Prompt:
    """The prompt of a completion: text, or ids of this model. Raises ApiError (400)."""
    if isinstance(given, str):
        try:
            ids = Prompter(bundle).text_ids(given)
        except UsageError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from None
    else:
        ids = list(given)
        if not all(0 <= token < bundle.manifest.vocab_size for token in ids):
            raise refused_value("prompt", "a number that is no token id", f"ids below {bundle.manifest.vocab_size}")
    if not ids:
        raise refused_value("prompt", "nothing", "at least one token")
    return fitting(Prompt(ids), bundle, "prompt")


def fitting(prompt: Prompt, bundle: Bundle, param: str) -> Prompt:
    """The prompt, where the model can take it. The cloud may take less, and says so itself."""
    seen, most = len(prompt.ids), bundle.manifest.context
    if seen > most:
        raise ApiError(
            400,
            f"{param}: they take {seen} tokens, wanted at most {most}, the model's context",
            param=param,
            code="context_length_exceeded",
        )
    return prompt
