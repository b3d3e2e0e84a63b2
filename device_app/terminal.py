"""The terminal: what people see beside answers, and what it can show."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def note(text: str) -> None:
    """Whatever is not the answer goes to stderr, dim where the terminal can and NO_COLOR does not forbid it."""
    dim = sys.stderr.isatty() and _moves_the_cursor() and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)


def note_error(error: Exception) -> None:
    """Tells of an error that ends nothing, with its hint."""
    hint = getattr(error, "hint", None)
    note(f"error: {error}" + (f"\nhint: {hint}" if hint else ""))


def is_full_terminal() -> bool:
    """Whether there is a person at both ends, and the terminal can do more than print."""
    return sys.stdin.isatty() and sys.stdout.isatty() and _moves_the_cursor()


def _moves_the_cursor() -> bool:
    return os.name == "nt" or os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


@contextmanager
def unechoed() -> Iterator[None]:
    """Keys that are pressed meanwhile are kept for the next question, and do not show between what is printed."""
    try:
        import termios
    except ModuleNotFoundError:  # Windows echoes a key when it is read
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
