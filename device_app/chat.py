"""The terminal chat: streams answers, Ctrl-C stops one, Ctrl-D leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from device_app.assistant import Answer, Assistant, Stats
from device_app.sampler import Sampling
from shared.errors import BundleError, CloudError


def chat(
    assistant: Assistant, *, system: str | None, sampling: Sampling, max_tokens: int, stop: Sequence[str] = ()
) -> None:
    """Talks until Ctrl-D. An answer that fails is reported and taken back; the conversation goes on."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history
    messages = [{"role": "system", "content": system}] if system else []
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
        messages.append({"role": "user", "content": question})
        answer = assistant.chat(messages, sampling=sampling, max_tokens=max_tokens, stop=stop)
        try:
            stream(assistant, answer)
        except (CloudError, BundleError) as error:
            messages.pop()
            note(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
            continue
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


def note(text: str) -> None:
    """Whatever is not the answer goes to stderr, dim where the terminal can and NO_COLOR does not forbid it."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)
