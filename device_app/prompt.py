"""From a conversation to the ids of a prompt: messages, the images in them, the chat template, the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from device_app.bundle import Bundle
from device_app.session import image_number
from shared.errors import BundleError, UsageError
from shared.wire import Array

Message = Mapping[str, Any]  # role, and content: text, or a list of parts of the type text or image


@dataclass(frozen=True)
class Turn:
    """One message as the chat template takes it, and the embeddings of its images."""

    role: str
    shown: Mapping[str, Any]
    images: list[Array]


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from. Among its ids an image stands as a number below 0, once a position."""

    ids: list[int]
    images: list[Array] = field(default_factory=list)  # embeddings [patches, encoder_size] of those in the ids
    dropped_turns: int = 0  # oldest turns that did not fit


class Prompter:
    """Makes prompts for a bundle's model."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """The messages with their images looked at. Raises UsageError for one that is not as it must be."""
        return [self._turn(message) for message in messages]

    def ids(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The ids of a conversation, ending where the assistant's answer begins.

        tools: functions that the model may call, as JSON schemas, where its template takes them. Raises BundleError
        without a chat template, UsageError where placeholders and images do not match.
        """
        if self._bundle.template is None:
            raise BundleError(
                "this bundle has no chat template",
                hint="its model continues text: use complete(), or -p at the terminal",
            )
        text = self._bundle.template.render([turn.shown for turn in turns], tools)
        ids, prefix = self._bundle.tokenizer.encode(text), self._bundle.manifest.prefix_ids
        if self._bundle.manifest.kind == "vision-decoder" and ids[: len(prefix)] != prefix:
            ids = prefix + ids  # templates of processors leave it to the tokenizer, those of tokenizers have it
        return self._with_images(ids, [image_number(one) for turn in turns for one in turn.images])

    def text_ids(self, text: str) -> list[int]:
        """The ids of plain text, with what the tokenizer puts before it."""
        return self._bundle.manifest.prefix_ids + self._with_images(self._bundle.tokenizer.encode(text), [])

    def _turn(self, message: Message) -> Turn:
        content = message["content"]
        takes_images = self._bundle.manifest.kind == "vision-decoder"
        if isinstance(content, str):
            parts: Any = [{"type": "text", "text": content}] if takes_images else content
            return Turn(message["role"], {**message, "content": parts}, [])
        if not takes_images:
            kind = self._bundle.manifest.kind
            raise UsageError(
                f"message: seen content in parts, wanted text, as a model of the kind {kind!r} takes no images"
            )
        if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
            raise UsageError(
                f"message: seen content of the type {type(content).__name__}, wanted text or a list of parts"
            )
        shown, images = [], []
        for part in content:
            match part:
                case {"type": "text", "text": str(text)}:
                    shown.append({"type": "text", "text": text})
                case {"type": "image", "image": source}:
                    shown.append({"type": "image"})
                    images.append(np.ascontiguousarray(self._bundle.look(source), np.float32))
                case _:
                    raise UsageError(
                        f"message: seen a part of the type {part.get('type')!r} with {sorted(part)}, "
                        "wanted text with text, or image with image"
                    )
        return Turn(message["role"], {**message, "content": shown}, images)

    def _with_images(self, ids: list[int], images: Sequence[int]) -> list[int]:
        """`ids` with each placeholder replaced by the next image, once for each position that it takes."""
        image = self._bundle.manifest.image
        if image is None:
            return ids
        if (seen := ids.count(image.token_id) if image.token_id is not None else 0) != len(images):
            raise UsageError(
                f"prompt: seen {seen} places for images, wanted {len(images)}, as many as there are images",
                hint="does a text hold the model's own placeholder for an image?",
            )
        following = iter(images)
        spliced: list[int] = []
        for token in ids:
            spliced += [next(following)] * image.tokens if token == image.token_id else [token]
        return spliced
