"""What people see beside answers."""

from __future__ import annotations

import os
import sys


def note(text: str) -> None:
    """Whatever is not the answer goes to stderr, dim where the terminal can and NO_COLOR does not forbid it."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=sys.stderr, flush=True)
