"""The options of `stip-cloud serve` for a server that is started by other means than its command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from cloud_backend.cli import add_serve
from shared.errors import UsageError

Options = Sequence[str] | Mapping[str, object]
Add = Callable[[argparse.ArgumentParser], None]  # gives a parser options
LISTENER = ("host", "port", "tls_cert", "tls_key", "metrics_host", "metrics_port")


def parse(options: Options, more: Add = lambda parser: None) -> argparse.Namespace:
    """What `stip-cloud serve` would make of these words, or of a mapping from long options to values.

    In a mapping `folders` is one exported folder or several, an option that takes no value is true or false, as a word
    too, and a list is an option that is given several times. more: gives the parser further options.

    Raises UsageError for what the command line would refuse, for an option without a value, and for an option of the
    listener: there is another.
    """
    parser = _Parser(prog="stip-cloud serve", add_help=False)
    add_serve(parser)
    more(parser)
    words = list(_words(parser, options)) if isinstance(options, Mapping) else [str(word) for word in options]
    parsed = parser.parse_args(words)
    for name in LISTENER:
        if getattr(parsed, name) != parser.get_default(name):
            raise UsageError(
                f"--{name.replace('_', '-')}: this server does not listen by itself",
                hint="say it to the server that carries it: uvicorn, or http_options of Ray Serve",
            )
    return parsed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see `{self.prog} --help`")


def _words(parser: argparse.ArgumentParser, options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if name == "folders":
            continue
        option = "--" + name.replace("_", "-")
        action = parser._option_string_actions.get(option)
        if action is not None and action.nargs == 0:
            yield from [option] if _truth(option, value) else []
        else:
            yield from (f"{option}={each}" for each in _values(option, value))
    yield "--"
    yield from _values("folders", options.get("folders", ()))


def _truth(option: str, value: object) -> bool:
    """Whether an option without a value is meant. `serve run` gives every value as text."""
    if (text := str(value).lower()) not in ("true", "false"):
        raise UsageError(f"{option}: seen {value}, wanted true or false", hint="it takes no other value")
    return text == "true"


def _values(option: str, value: object) -> Iterator[str]:
    for each in value if isinstance(value, list | tuple) else (value,):
        if each is None or isinstance(each, bool):
            raise UsageError(f"{option}: seen {each}, wanted a value", hint="give one, or leave the option out")
        yield str(each)
