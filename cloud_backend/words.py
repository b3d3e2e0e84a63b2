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


def parse(
    options: Options, more: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """What `stip-cloud serve` would make of these words, or of a mapping from long options to values.

    In a mapping `folders` is one exported folder or several, true is an option that takes no value, and a list is an
    option that is given several times. more: gives the parser further options.

    Raises UsageError for what the command line would refuse, and for an option of the listener: there is another.
    """
    parser = _Parser(prog="stip-cloud serve", add_help=False)
    add_serve(parser)
    more(parser)
    words = list(_words(options)) if isinstance(options, Mapping) else [str(word) for word in options]
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


def _words(options: Mapping[str, object]) -> Iterator[str]:
    folders: object = ()
    for name, value in options.items():
        if name == "folders":
            folders = value
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield from [option] if value else []
        else:
            for each in _several(value):
                yield from (option, str(each))
    yield "--"
    yield from map(str, _several(folders))


def _several(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else (value,)
