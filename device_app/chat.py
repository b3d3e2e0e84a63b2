"""`stip-device chat`: one answer, or a talk in the terminal: streams answers, Ctrl-C stops one, Ctrl-D leaves."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from device_app.answer import Answer, Stats
from device_app.assistant import Assistant
from device_app.options import opened
from device_app.sampler import Sampling
from device_app.terminal import note
from shared.errors import BundleError, CloudError, UsageError
from shared.levels import limit


def command(arguments: argparse.Namespace) -> None:
    """Answers the prompt that was given, or talks."""
    if arguments.json and arguments.prompt is None:
        raise UsageError("--json: it goes with -p")
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
    assistant_of = opened(arguments)
    bundle = assistant_of["bundle"]
    bundle.want_kind("chat", "decoder", "vision-decoder")
    with Assistant(**assistant_of) as assistant:
        worth = f"stip-device: {limit(bundle.manifest.scheme)}"
        images = _images(assistant, arguments.image)
        if arguments.prompt is None:
            note(worth)
            chat(assistant, system=arguments.system, images=images, **options)
            return
        if bundle.template is None and not images:
            note("stip-device: this bundle has no chat template, so its model continues the prompt")
            answer = assistant.complete(arguments.prompt, **options)
        else:
            system = [{"role": "system", "content": arguments.system}] if arguments.system else []
            answer = assistant.chat([*system, _question(arguments.prompt, images)], **options)
        if not arguments.json:
            stream(assistant, answer)
            note(worth)
            return
        answer.finish()
        note(worth)
        print(json.dumps(_figures(answer), ensure_ascii=False))


def _images(assistant: Assistant, files: Sequence[str]) -> list[Any]:
    """The images, read before anything is asked. Raises UsageError for one that cannot be read or shown."""
    if not files:
        return []
    assistant.bundle.want_kind("--image", "vision-decoder")
    from device_app.images import open_image

    return [open_image(file) for file in files]


def _question(text: str, images: Sequence[Any]) -> dict[str, Any]:
    """A user's message, the images before the text."""
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _figures(answer: Answer) -> dict[str, Any]:
    stats = answer.stats
    return {
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "dropped_turns": stats.dropped_turns,
        "bytes_up": stats.counters.bytes_up,
        "bytes_down": stats.counters.bytes_down,
        "round_trips": stats.counters.round_trips,
        "full_rows": stats.counters.full_rows,
        "replays": stats.counters.replays,
        "resumes": stats.counters.resumes,
        "timings": {
            "seconds": stats.seconds,
            "first_token_seconds": stats.first_token_seconds,
            "tokens_per_second": stats.tokens_per_second,
            "cloud_queue_seconds": stats.counters.queue_us / 1e6,
            "cloud_compute_seconds": stats.counters.compute_us / 1e6,
            "device_seconds": {step: spent / 1e9 for step, spent in stats.counters.work_ns.items()},
        },
    }


def chat(
    assistant: Assistant,
    *,
    system: str | None,
    sampling: Sampling,
    max_tokens: int,
    stop: Sequence[str] = (),
    images: Sequence[Any] = (),
) -> None:
    """Talks until Ctrl-D. An answer that fails is reported and taken back; the conversation goes on.

    images: shown with the first question that is answered.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    note("Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            question = input("\n> " if sys.stdin.isatty() else "")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\nCtrl-D leaves.")
            continue
        if not question.strip():
            continue
        messages.append(_question(question, images))
        answer = assistant.chat(messages, sampling=sampling, max_tokens=max_tokens, stop=stop)
        try:
            stream(assistant, answer)
        except (CloudError, BundleError, UsageError) as error:
            messages.pop()
            note(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
            continue
        images = ()
        messages.append({"role": "assistant", "content": answer.text})


def stream(assistant: Assistant, answer: Answer) -> None:
    """Prints an answer as it comes and what it took; Ctrl-C stops it."""

    # The first Ctrl-C stops the answer where no reply is lost, a second one wherever it strikes.
    def interrupt(*_: object) -> None:
        assistant.interrupt()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        answer.stop()
        note(" [stopped]")
    finally:
        signal.signal(signal.SIGINT, before)
    print(flush=True)
    if answer.stats.dropped_turns:
        note(f"(the context is full: the oldest {answer.stats.dropped_turns} turns were left out)")
    note(summary(answer.stats))


def summary(stats: Stats) -> str:
    """One line: speed, and what left the device."""
    counters = stats.counters
    answers = "hidden states" if "classify" in counters.work_ns else "permuted logits"
    return (
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, first after {stats.first_token_seconds:.2f} s"
        f" | left the device: {counters.vectors_up} permuted vectors ({counters.bytes_up / 1024:.0f} KiB), no text"
        f" | came back: {counters.bytes_down / 1024:.0f} KiB of {answers}"
    )
