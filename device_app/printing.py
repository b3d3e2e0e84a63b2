"""An answer on the terminal as it comes, and what it took."""

from __future__ import annotations

import signal
from typing import Any, Protocol

from device_app.answer import Answer, Stats
from device_app.assistant import Assistant
from device_app.terminal import note


class Screen(Protocol):
    """Where an answer goes."""

    def push(self, piece: str) -> None:
        """More of its text."""

    def finish(self) -> None:
        """All was said: what follows begins on a line of its own."""


class PlainScreen:
    """Prints what the model said, as it said it."""

    def push(self, piece: str) -> None:
        print(piece, end="", flush=True)

    def finish(self) -> None:
        print(flush=True)


def stream(assistant: Assistant, answer: Answer, screen: Screen | None = None) -> None:
    """Shows an answer as it comes and what it took; Ctrl-C stops it."""
    screen = screen or PlainScreen()
    stopped = ""

    # The first Ctrl-C stops the answer where no reply is lost, a second one wherever it strikes.
    def interrupt(*_: object) -> None:
        assistant.interrupt()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for piece in answer:
            screen.push(piece)
    except KeyboardInterrupt:
        answer.stop()
        stopped = "[stopped] "
    except BaseException:
        if answer.text:
            screen.finish()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    screen.finish()
    if answer.stats.dropped_turns:
        note(f"(the context is full: the oldest {answer.stats.dropped_turns} turns were left out)")
    note(stopped + summary(answer.stats))


def summary(stats: Stats) -> str:
    """One line: speed, and what left the device."""
    counters = stats.counters
    answers = "hidden states" if "classify" in counters.work_ns else "permuted logits"
    drafts = f" | drafts accepted: {counters.accepted} of {counters.drafted}" if counters.drafted else ""
    return (
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, first after {stats.first_token_seconds:.2f} s"
        f" | left the device: {counters.vectors_up} permuted vectors ({counters.bytes_up / 1024:.0f} KiB), no text"
        f" | came back: {counters.bytes_down / 1024:.0f} KiB of {answers}{drafts}"
    )


def figures(answer: Answer) -> dict[str, Any]:
    """What --json prints."""
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
        "drafted": stats.counters.drafted,
        "accepted": stats.counters.accepted,
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
