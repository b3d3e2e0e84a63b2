"""What a person types: several lines, edited, completed, with the questions of earlier chats at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

LONG_PASTE = 2000  # characters: more than these stand in the line as one short word
MANY_LINES = 20


class LineEditor:
    """Enter sends, Alt-Enter begins a line, Tab completes commands and files, Up and Ctrl-R find earlier questions."""

    def __init__(self, commands: Mapping[str, bool], questions: Sequence[str]) -> None:
        """commands: their names, with the slash, and whether a file follows. questions: of earlier, newest first."""
        self._pastes: dict[str, str] = {}
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=self._keys(),
            completer=_Completions(commands),
            complete_while_typing=False,
            history=InMemoryHistory([self._shortened(question) for question in reversed(questions)]),
            prompt_continuation="  ",
            reserve_space_for_menu=4,
            enable_suspend=True,
        )

    def read(self, default: str = "") -> str:
        """A question or a command. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C.

        default: what already stands in the line.
        """
        print()
        text = self._session.prompt(FormattedText([("bold", "> ")]), default=self._shortened(default))
        for short, pasted in self._pastes.items():
            text = text.replace(short, pasted)
        # A byte that is no part of a character comes as half a surrogate pair.
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def send(event: KeyPressEvent) -> None:
            if event.current_buffer.complete_state:  # it takes the completion that was chosen
                event.current_buffer.complete_state = None
            else:
                event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def begin_a_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("<bracketed-paste>")
        def paste(event: KeyPressEvent) -> None:
            pasted = event.data.replace("\r\n", "\n").replace("\r", "\n")
            event.current_buffer.insert_text(self._shortened(pasted))

        return keys

    def _shortened(self, pasted: str) -> str:
        """The editor lays all its text out anew at every key, which takes too long for a book."""
        if len(pasted) <= LONG_PASTE and pasted.count("\n") <= MANY_LINES:
            return pasted
        short = f"[paste {len(self._pastes) + 1}: {len(pasted):,} characters]"
        self._pastes[short] = pasted
        return short


class _Completions(Completer):
    """Commands at the start of the line; files after those that take one."""

    def __init__(self, commands: Mapping[str, bool]) -> None:
        self._commands = commands
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        command, blank, rest = document.text_before_cursor.partition(" ")
        if not blank:
            yield from self._names(command)
        elif self._commands.get(command):
            yield from self._files.get_completions(Document(rest, len(rest)), complete_event)

    def _names(self, begun: str) -> Iterator[Completion]:
        for name in self._commands:
            if begun.startswith("/") and name.startswith(begun):
                yield Completion(name, start_position=-len(begun))
