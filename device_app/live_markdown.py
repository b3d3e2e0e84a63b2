"""Markdown in the terminal while it streams.

The last block of the text is painted again as it grows; those before it are done and are left alone. Only lines that
changed are written, in one go, so that nothing flickers, and what has scrolled away is never reached for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import IO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.syntax import Syntax

from device_app.text import without_control

PAUSE = 0.05  # seconds between two paintings, at least
SHARE = 5  # a painting is followed by so many times its own time of rest: a slow machine has other work
CODE_THEME = "ansi_dark"  # the terminal's own colours, which can be read on any background

# Raw HTML and images are text like any other: a machine that we do not trust wrote the answer.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("image")


class _Heading(Heading):
    """On the left, without a frame."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Code(CodeBlock):
    """On the terminal's own background, without a margin, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default")


class SafeMarkdown(Markdown):
    """Markdown as rich shows it, but links show where they lead, and single line ends are kept."""

    elements = Markdown.elements | {"heading_open": _Heading, "fence": _Code, "code_block": _Code}

    def __init__(self, markup: str) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        self.parsed = _PARSER.parse(markup)
        _make_safe(self.parsed)


class LiveMarkdown:
    """One answer on a terminal, as it comes: `push` pieces of it, then `finish`."""

    def __init__(
        self, file: IO[str], *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """console: whose width, height and colours to use (default: the terminal's, without colours by NO_COLOR)."""
        self._file = file
        self._console = console or Console(file=file, highlight=False)
        self._clock = clock
        self._open = ""  # the last block's text; what came before it is done
        self._painted: list[str] = []  # its lines as they stand there; the cursor is in the last of them
        self._above = False  # whether a block is done
        self._width = 0
        self._next = 0.0  # when to paint again

    def push(self, piece: str) -> None:
        """More of the text. It is shown now, or with a later piece."""
        self._open += piece
        if (now := self._clock()) >= self._next:
            self._paint()
            took = self._clock() - now
            self._next = now + took + max(PAUSE, SHARE * took)

    def finish(self) -> None:
        """Shows all that there is. The cursor is below it."""
        self._paint()
        if self._painted:
            self._write("\n")
            self._painted = []

    def _paint(self) -> None:
        width, height = self._console.size
        output = ""
        if width != self._width:  # lines were laid out anew by the terminal: nobody knows where they stand
            output += "\n" if self._painted else ""
            self._painted, self._width = [], width
        done, self._open = _split(self._open)
        if done:
            output += self._block(done, height) + "\n"
            self._painted, self._above = [], True
        self._write(output + self._block(self._open, height))

    def _block(self, markup: str, height: int) -> str:
        """What to write to have the last block say `markup`."""
        lines = self._rendered(markup)
        if lines and self._above:
            lines = ["", *lines]
        changes = _changes(self._painted, lines, height)
        self._painted = lines
        return changes

    def _rendered(self, markup: str) -> list[str]:
        if not markup.strip():
            return []
        with self._console.capture() as captured:
            # One column stays free: a full line would leave the cursor in a place on which terminals do not agree.
            self._console.print(SafeMarkdown(markup), width=max(1, self._width - 1))
        return [line.rstrip(" ") for line in captured.get().rstrip("\n").split("\n")]

    def _write(self, output: str) -> None:
        if output:
            self._file.write(output)
            self._file.flush()


def _split(markup: str) -> tuple[str, str]:
    """What is done of `markup`, and its last block, which may still become something else."""
    starts = [token.map[0] for token in _PARSER.parse(markup) if token.level == 0 and token.map and token.nesting >= 0]
    if len(starts) < 2:
        return "", markup
    lines = markup.split("\n")  # not splitlines(), which knows more line ends than Markdown does
    last = "\n".join(lines[starts[-1] :])
    # "2" may become "2. And" of the list before it, "-" an item.
    return ("\n".join(lines[: starts[-1]]), last) if len(last.strip()) > 3 else ("", markup)


def _changes(old: Sequence[str], new: Sequence[str], height: int) -> str:
    """What turns the lines `old`, with the cursor in the last one, into `new`."""
    if list(old) == list(new):
        return ""
    if not old:
        return "\n".join(new)
    same = next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    if same == len(old):
        return "\n" + "\n".join(new[same:])
    # From the first line that differs, as far as it can be reached; one that only went is erased from the line above.
    first = max(min(same, len(new) - 1), len(old) - height, 0)
    up = len(old) - 1 - first
    moved = "\r" + (f"\x1b[{up}A" if up else "")
    return moved + "\n".join(f"{line}\x1b[K" for line in new[first:]) + ("\x1b[J" if len(new) < len(old) else "")


def _make_safe(tokens: Sequence[Token]) -> None:
    """Entities (&#13;) can hold control characters that the text did not."""
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        token.content = without_control(token.content)
        token.attrs = {name: without_control(str(value)) for name, value in token.attrs.items()}
        _make_safe(token.children or [])
