"""`stip-device chat`: one answer for a script, or a talk in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from device_app.assistant import Assistant
from device_app.drafting import Drafting
from device_app.options import opened
from device_app.printing import figures, stream
from device_app.sampler import Sampling
from device_app.terminal import note
from shared.errors import UsageError
from shared.levels import limit


def command(arguments: argparse.Namespace) -> None:
    """Answers the prompt that was given, or talks."""
    if arguments.json and arguments.prompt is None:
        raise UsageError("--json: it goes with -p")
    _tolerate_any_text()
    seed = int.from_bytes(os.urandom(8), "little") if arguments.seed is None else arguments.seed
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=seed,
    )
    options: dict[str, Any] = {"sampling": sampling, "max_tokens": arguments.max_tokens, "stop": arguments.stop}
    drafting = Drafting(arguments.draft_tokens, arguments.bytes_a_token)
    assistant_of = opened(arguments)
    bundle = assistant_of["bundle"]
    bundle.want_kind("chat", "decoder", "vision-decoder")
    if arguments.image:
        bundle.want_kind("--image", "vision-decoder")
    with Assistant(**assistant_of, drafting=drafting) as assistant:
        if arguments.prompt is None:
            from device_app.talk import talk  # the packages for people at a terminal take longer to load than ours

            talk(assistant, system=arguments.system, images=arguments.image, keep=not arguments.no_history, **options)
        else:
            _answer_once(assistant, arguments, options)


def _answer_once(assistant: Assistant, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    images = _images(arguments.image)
    if assistant.bundle.template is None and not images:
        note("stip-device: this bundle has no chat template, so its model continues the prompt")
        answer = assistant.complete(arguments.prompt, **options)
    else:
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        answer = assistant.chat([*system, _question(arguments.prompt, images)], **options)
    worth = f"stip-device: {limit(assistant.bundle.manifest.scheme)}"
    if arguments.json:
        answer.finish()
        note(worth)
        print(json.dumps(figures(answer), ensure_ascii=False))
    else:
        stream(assistant, answer)
        note(worth)


def _images(files: Sequence[str]) -> list[Any]:
    """The images, read before anything is asked. Raises UsageError for one that cannot be read or shown."""
    if not files:
        return []
    from device_app.images import open_image

    return [open_image(file) for file in files]


def _question(text: str, images: Sequence[Any]) -> dict[str, Any]:
    """A user's message, the images before the text."""
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _tolerate_any_text() -> None:
    """A character that the terminal cannot take shows as ?, half a one that comes in as U+FFFD; neither is fatal."""
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            with contextlib.suppress(ValueError):  # it is closed
                file.reconfigure(errors="replace")
