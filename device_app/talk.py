"""A talk in the terminal: questions and commands in, answers out, until Ctrl-D."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from device_app.answer import Answer, Stats
from device_app.assistant import Assistant
from device_app.conversation import Conversation, Turn, image_part
from device_app.history import Chat, History
from device_app.printing import PlainScreen, Screen, stream
from device_app.sampler import Sampling
from device_app.talk_commands import COMMANDS, FILES, carry_out
from device_app.terminal import is_full_terminal, note, note_error, unechoed
from shared.errors import BundleError, CloudError, HistoryError, UsageError
from shared.levels import limit


class Keyboard(Protocol):
    """Where questions come from."""

    def read(self, default: str = "") -> str:
        """A question or a command. Raises EOFError at the end, KeyboardInterrupt at Ctrl-C."""


class PlainKeyboard:
    """One line is one question: for terminals that can do no more, and for pipes."""

    def __init__(self) -> None:
        self._prompt = "\n> " if sys.stdin.isatty() else ""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() editing, and lines longer than the system's 4,096 bytes

    def read(self, default: str = "") -> str:
        return input(self._prompt)


@dataclass
class Talk:
    """What a talk is made of. Commands (talk_commands.py) work on it."""

    assistant: Assistant
    conversation: Conversation
    keyboard: Keyboard
    screen: Callable[[], Screen]
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str] = ()
    edits: bool = False  # whether the keyboard offers a text for changing
    answered: list[Stats] = field(default_factory=list)
    tries: int = 0  # other answers to the same question
    listed: list[Chat] = field(default_factory=list)  # by /chats, whose numbers are those of /open

    def run(self) -> None:
        """Asks until Ctrl-D."""
        while True:
            try:
                text = self.keyboard.read()
                if carry_out(self, text):
                    continue
                if text.strip():
                    self.ask(self.conversation.next(text))
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                note("\nCtrl-D leaves.")
            except (CloudError, BundleError, HistoryError, UsageError) as error:
                note_error(error)

    def ask(self, turn: Turn, tries: int = 0) -> None:
        """Answers a question. One that fails before there is something of an answer leaves nothing behind.

        tries: how many other answers it had.
        """
        self.tries = tries
        answer = self.assistant.chat(
            self.conversation.prompt(turn),
            sampling=replace(self.sampling, seed=self.sampling.seed + tries),
            max_tokens=self.max_tokens,
            stop=self.stop,
        )
        screen = _Noticing(self.screen(), lambda: self.conversation.asked(turn))
        try:
            with unechoed():
                stream(self.assistant, answer, screen)
        finally:
            if answer.finish_reason in ("stop", "length"):
                screen.notice()  # an answer may be empty
            if screen.noticed:
                self._keep(answer)

    def _keep(self, answer: Answer) -> None:
        self.answered.append(answer.stats)
        stats = answer.stats
        self.conversation.answered(
            answer.text,
            finish_reason=answer.finish_reason,
            tokens=stats.tokens,
            seconds=round(stats.seconds, 3),
            bytes_up=stats.counters.bytes_up,
            bytes_down=stats.counters.bytes_down,
            round_trips=stats.counters.round_trips,
        )


class _Noticing:
    """A screen that tells when the first word of an answer is there."""

    def __init__(self, screen: Screen, first: Callable[[], None]) -> None:
        self._screen = screen
        self._first = first
        self.noticed = False

    def notice(self) -> None:
        if not self.noticed:
            self.noticed = True
            self._first()

    def push(self, piece: str) -> None:
        self.notice()
        self._screen.push(piece)

    def finish(self) -> None:
        self._screen.finish()


def talk(
    assistant: Assistant,
    *,
    system: str | None,
    images: Sequence[str],
    keep: bool,
    sampling: Sampling,
    max_tokens: int,
    stop: Sequence[str],
) -> None:
    """Talks until Ctrl-D.

    images: files shown with the first question. keep: whether chats are kept on this device; those of a pipe never are.
    """
    note(f"stip-device: {limit(assistant.bundle.manifest.scheme)}")
    with _history(keep and sys.stdin.isatty()) as history:
        conversation = Conversation(
            history, model=assistant.bundle.manifest.served_name, system=system, on_lost=_tell_of_lost
        )
        conversation.images = [image_part(file) for file in images]
        keyboard, screen = _faces(history)
        full = not isinstance(keyboard, PlainKeyboard)
        note("Ctrl-C stops an answer, Ctrl-D leaves. /help lists what else there is.")
        Talk(assistant, conversation, keyboard, screen, sampling, max_tokens, stop, edits=full).run()


def _history(keep: bool) -> History:
    if keep:
        try:
            return History.open()
        except HistoryError as error:
            note_error(error)
            note("(this talk is not kept)")
    return History.in_memory()


def _tell_of_lost(error: HistoryError) -> None:
    note_error(error)
    note("(what follows of this chat is not kept)")


def _faces(history: History) -> tuple[Keyboard, Callable[[], Screen]]:
    """What to read from and write to: as much as the terminal can do."""
    if not is_full_terminal():
        return PlainKeyboard(), PlainScreen
    from device_app.line_editor import LineEditor
    from device_app.live_markdown import LiveMarkdown

    questions = []
    with contextlib.suppress(HistoryError):  # the first question tells of it
        questions = history.questions()
    return LineEditor({f"/{name}": name in FILES for name in COMMANDS}, questions), lambda: LiveMarkdown(sys.stdout)
