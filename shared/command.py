"""How the three commands end: one line of error, one of hint, and an exit status that scripts can use."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from shared.errors import StipError, UsageError


def debug_option() -> argparse.ArgumentParser:
    """The parent of every subcommand's parser: `--debug`."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--debug", action="store_true", help="show a traceback where something fails")
    return parent


def run(parser: argparse.ArgumentParser) -> NoReturn:
    """Parses the command line and calls its `command`. Exit status: 0 done, 1 failed, 2 usage, 130 interrupted.

    With `--debug` a failure shows its traceback instead.
    """
    arguments = parser.parse_args()
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except StipError as error:
        if arguments.debug:
            raise
        _say(parser.prog, str(error), error.hint)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except ModuleNotFoundError as error:
        if arguments.debug or not error.name:
            raise
        extra = parser.prog.removeprefix("stip-")
        _say(parser.prog, f"the package {error.name!r} is not installed", f"pip install 'stip[{extra}]'")
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output has left (`| head`); Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _say(program: str, message: str, hint: str | None) -> None:
    print(f"{program}: error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
