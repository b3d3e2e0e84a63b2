"""`python -m examples.cabin`: describes the frames that a camera leaves in a folder, one JSON line each, for months.

One thread looks at the folder and keeps a short queue; the main one asks the cloud. When the network is gone the
question waits, the queue goes on dropping what is too old, and memory stays as it is.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from device_app.answer import Answer
from device_app.assistant import Assistant
from device_app.batch import OF_THE_INPUT
from device_app.options import bundle_and_cloud, opened
from device_app.terminal import note
from device_app.text import one_line, printable
from examples.cabin.frames import Folder, Frame, ReplacedError
from examples.cabin.lines import Lines, Link, moment
from examples.cabin.record import Record
from examples.cabin.waiting import Waiting
from shared.command import debug_option, run
from shared.errors import RefusedError, UnreachableError, UsageError
from shared.levels import limit

PROMPT = "Describe the scene in one short sentence."
STATE = ".cabin-state.jsonl"
RETRY_SECONDS = 2.0  # between attempts at the first connection; the Assistant sees to all others
COMPLAIN_SECONDS = 60.0  # between two lines about a folder that cannot be read


def main() -> None:
    """Runs until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="cabin",
        description="Describes frames as they appear in a folder, as JSON lines on stdout.",
        parents=[debug_option(), bundle_and_cloud()],
    )
    parser.add_argument("frames", type=Path, metavar="FRAMES", help="the folder that a camera fills")
    parser.add_argument("-p", "--prompt", default=PROMPT, help="what to ask of each frame (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--queue", type=int, default=4, metavar="N", help="frames that may wait (default: %(default)s)")
    parser.add_argument(
        "--full",
        choices=("newest-win", "oldest-wait"),
        default="newest-win",
        help="when more come: drop the oldest that wait, or leave the new ones in the folder (default: %(default)s)",
    )
    parser.add_argument("--state", type=Path, metavar="F", help=f"what was described (default: FRAMES/{STATE})")
    parser.add_argument("--remove", action="store_true", help="delete frames once they are described or dropped")
    parser.add_argument(
        "--every", type=float, default=0.25, metavar="S", help="seconds between looks (default: %(default)s)"
    )
    parser.add_argument(
        "--settle",
        type=float,
        default=0.5,
        metavar="S",
        help="seconds that a file must stay as it is to be whole (default: %(default)s)",
    )
    parser.set_defaults(command=_command)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    run(parser)


def _command(arguments: argparse.Namespace) -> None:
    for option, least in (("queue", 1), ("max_tokens", 1), ("every", 0.01), ("settle", 0)):
        if (seen := getattr(arguments, option)) < least:
            raise UsageError(f"--{option.replace('_', '-')}: seen {seen}, wanted at least {least}")
    ending = Ending()
    options = opened(arguments)
    options["bundle"].want_kind("cabin", "vision-decoder")
    record = Record(arguments.state or arguments.frames / STATE)
    lines = Lines()
    link = Link(lines)
    note(f"cabin: {limit(options['bundle'].manifest.scheme)}")
    options |= {"retry_seconds": math.inf, "on_lost": link.lost, "on_frame": link.heard}
    folder = Folder(arguments.frames, arguments.settle)
    waiting = Waiting(
        record,
        arguments.queue,
        oldest_wait=arguments.full == "oldest-wait",
        on_drop=lambda frame: _drop(lines, frame, "newer frames came"),
    )
    with Assistant(**options) as assistant:
        cabin = Cabin(assistant, folder, waiting, lines, link, arguments)
        with cabin.watching():
            cabin.describe_until(ending)
    record.close()


class Cabin:
    """Takes frames from the folder to lines."""

    def __init__(
        self,
        assistant: Assistant,
        folder: Folder,
        waiting: Waiting,
        lines: Lines,
        link: Link,
        arguments: argparse.Namespace,
    ) -> None:
        self._assistant = assistant
        self._folder = folder
        self._waiting = waiting
        self._lines = lines
        self._link = link
        self._prompt: str = arguments.prompt
        self._max_tokens: int = arguments.max_tokens
        self._remove: bool = arguments.remove
        self._every: float = arguments.every
        self._over = threading.Event()

    # --- the thread that looks at the folder ---

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Frames come in while the block runs."""
        thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        complained = -math.inf
        try:
            while not self._over.wait(self._every):
                try:
                    for frame in self._waiting.offer(*self._folder.look()):
                        self._clear(frame)
                except UsageError as error:  # a disk that is not mounted yet, or is full: it may pass
                    if time.monotonic() - complained >= COMPLAIN_SECONDS:
                        complained = time.monotonic()
                        self._lines.say("complaint", error=str(error), hint=error.hint)
        except BaseException as error:  # whoever read our lines has left, say
            self._waiting.fail(error)

    def _clear(self, frame: Frame) -> None:
        if self._remove:
            self._folder.remove(frame)

    # --- the main thread, which asks ---

    def describe_until(self, ending: Ending) -> None:
        """One frame after the other. Raises CloudError for a cloud that will never answer, BundleError."""
        with suppress(KeyboardInterrupt):
            while True:
                with ending.allowed():
                    frame = self._waiting.take()
                self._describe(frame, ending)
        counts = self._lines.counts
        self._lines.say(
            "ended",
            state="ended",
            described=counts["described"],
            dropped=counts["dropped"],
            failed=counts["failed"],
            waiting=len(self._waiting),
        )

    def _describe(self, frame: Frame, ending: Ending) -> None:
        """Says what came of a frame, and then records it: killed in between, it is described again, never lost."""
        try:
            data = self._folder.read(frame)
            with ending.allowed():
                answer = self._answer(data)
            self._say(frame, answer)
        except ReplacedError:
            _drop(self._lines, frame, "it was deleted or written over")
        except (UsageError, RefusedError) as error:
            if isinstance(error, RefusedError) and error.code not in OF_THE_INPUT:
                raise
            if self._folder.unchanged(frame):
                self._lines.say("failed", **_named(frame), error=str(error), hint=error.hint)
            else:  # it was not whole after all, and will be another frame when it is
                _drop(self._lines, frame, "it was deleted or written over")
        self._waiting.done()
        try:
            self._clear(frame)
        except UsageError as error:
            self._lines.say("complaint", **_named(frame), error=str(error), hint=error.hint)

    def _answer(self, data: bytes) -> Answer:
        """Of one image. The Assistant tries for ever to get a connection back, but gives a first one up at once.

        It gives up too where something else than the cloud answers. That is an error, unless the cloud itself was
        there before: then it is the network of a car park, say, which wants somebody to log in.
        """
        parts: list[dict[str, Any]] = [{"type": "image", "image": data}, {"type": "text", "text": self._prompt}]
        while True:
            try:
                return self._assistant.chat([{"role": "user", "content": parts}], max_tokens=self._max_tokens).finish()
            except (UnreachableError, RefusedError) as error:
                if isinstance(error, RefusedError) and not (error.code == "handshake" and self._link.was_there):
                    raise
                self._link.lost(str(error))
            time.sleep(RETRY_SECONDS)

    def _say(self, frame: Frame, answer: Answer) -> None:
        counters = answer.stats.counters
        self._lines.say(
            "described",
            **_named(frame),
            text=one_line(answer.text),
            seconds=round(answer.stats.seconds, 3),
            tokens=answer.stats.tokens,
            bytes_up=counters.bytes_up,
            bytes_down=counters.bytes_down,
        )


class Ending:
    """SIGTERM and SIGINT end the program where nothing is half done: between frames, or while it waits."""

    def __init__(self) -> None:
        self._asked = False
        self._allowed = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True
        if self._allowed:
            self._allowed = False
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Inside the block a signal raises KeyboardInterrupt, and so does one that came before it."""
        self._allowed = True
        try:
            if self._asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._allowed = False


def _named(frame: Frame) -> dict[str, Any]:
    return {"frame": printable(frame.name), "time": moment(frame.modified_ns / 1e9)}


def _drop(lines: Lines, frame: Frame, why: str) -> None:
    lines.say("dropped", **_named(frame), dropped=why)
