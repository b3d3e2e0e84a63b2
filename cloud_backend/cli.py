"""`stip-cloud`: serve exported contexts, make bearer tokens, say what this machine can run."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from cloud_backend.log import LOG_FORMATS
from cloud_backend.tensor_parallel.split import MOST
from shared.command import debug_option, run
from shared.errors import UsageError


def main() -> None:
    """Entry point of the `stip-cloud` command."""
    run(command_line())


def command_line() -> argparse.ArgumentParser:
    """What `stip-cloud` takes."""
    parser = argparse.ArgumentParser(prog="stip-cloud", description="The cloud: stock models on transformed weights.")
    common = [debug_option()]
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_serve(commands.add_parser("serve", help="serve one or more exported cloud folders", parents=common))
    token = commands.add_parser("token", help="make a bearer token: printed once, stored as a hash", parents=common)
    token.add_argument("--token-file", type=Path, default=Path("tokens.txt"), metavar="F")
    token.add_argument("--name", default="device", help="whose token it is (default: %(default)s)")
    token.set_defaults(command=_token)
    engines = commands.add_parser("engines", help="what this machine can run, and why not the others", parents=common)
    engines.add_argument("--json", action="store_true", help="one list of objects")
    engines.set_defaults(command=_engines)
    return parser


def add_serve(serve: argparse.ArgumentParser) -> None:
    """Gives a parser the options of `stip-cloud serve`."""
    serve.add_argument("folders", nargs="+", type=Path, metavar="OUT/cloud")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_whole(0, 65535), default=8765, help="0 takes a free one (default: %(default)s)")
    serve.add_argument("--verify", action="store_true", help="hash every file before serving")
    serve.add_argument(
        "--drain-seconds",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="from SIGTERM to the end, at most, while requests are answered (default: %(default)g)",
    )
    serve.set_defaults(command=_serve)

    models = serve.add_argument_group("models")
    models.add_argument(
        "--engine",
        choices=("auto", "torch", "llama.cpp"),
        default="auto",
        help="what runs them (default: llama.cpp where the weights are GGUF, else torch)",
    )
    models.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    models.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="to compute in"
    )
    models.add_argument(
        "--context", type=_whole(1), metavar="N", help="most positions of a session (default: the model's)"
    )
    models.add_argument(
        "--kv-bytes",
        type=_bytes,
        metavar="BYTES",
        help="memory for the KV caches of each model, as 8G or 512M (default: a quarter of what is free, and on "
        "llama.cpp at most that of four full sessions)",
    )
    models.add_argument("--threads", type=_whole(1), metavar="N", help="of each process (default: torch's choice)")
    models.add_argument(
        "--tensor-parallel",
        type=_whole(1, MOST),
        default=1,
        metavar="N",
        help="processes that share each model, on CUDA a card each (default: %(default)s)",
    )

    clients = serve.add_argument_group("who may connect")
    clients.add_argument("--token-file", type=Path, metavar="F", help="hashes of the bearer tokens to accept")
    clients.add_argument(
        "--tls-cert", type=Path, metavar="F", help="PEM; read again when it changes, as the tokens are"
    )
    clients.add_argument("--tls-key", type=Path, metavar="F")
    clients.add_argument(
        "--origin", action="append", default=[], metavar="URL", help="allow browser pages of this origin"
    )

    limits = serve.add_argument_group("limits")
    limits.add_argument("--max-sessions", type=_whole(1), default=1024, metavar="N", help="(default: %(default)s)")
    limits.add_argument(
        "--token-sessions",
        type=_whole(1),
        default=256,
        metavar="N",
        help="sessions of one token (default: %(default)s)",
    )
    limits.add_argument(
        "--token-rate",
        type=_whole(0),
        default=0,
        metavar="N",
        help="positions a second that the sessions of one token share (default: 0, no limit)",
    )
    limits.add_argument(
        "--idle-seconds", type=_seconds, default=600.0, metavar="S", help="silence after which a session ends"
    )
    limits.add_argument(
        "--grace-seconds",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="for a device to come back after a lost connection (default: %(default)g)",
    )
    limits.add_argument("--max-frame", type=_whole(1024), default=4 * 2**20, metavar="BYTES")
    limits.add_argument(
        "--window", type=_whole(1024), default=16 * 2**20, metavar="BYTES", help="bytes in flight of a session"
    )

    watching = serve.add_argument_group("watching it")
    watching.add_argument("--log", choices=LOG_FORMATS, default="text", help="lines for people, or JSON objects")
    watching.add_argument(
        "--metrics-port", type=_whole(0, 65535), metavar="P", help="serve health and metrics here, by plain HTTP"
    )
    watching.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="(default: %(default)s)")


def _whole(least: int, most: int = 2**32 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if least <= (number := int(text)) <= most:
                return number
        raise argparse.ArgumentTypeError(f"seen {text}, wanted {least} to {most}")

    return parse


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"seen {text}, wanted a number of seconds, more than 0")


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _bytes(text: str) -> int:
    """A size such as 8G: K, M and G are powers of 1024."""
    if not (match := re.fullmatch("([1-9][0-9]{0,17})([KMG]?)", text)):
        raise argparse.ArgumentTypeError(f"seen {text}, wanted a number of bytes, or one with K, M or G")
    return int(match[1]) * UNITS[match[2]]


def _serve(arguments: argparse.Namespace) -> None:
    from cloud_backend.process import Listening, serve_until_stopped
    from cloud_backend.serving import prepare
    from cloud_backend.tls import Certificate

    chain, key = arguments.tls_cert, arguments.tls_key
    if (chain is None) != (key is None):
        raise UsageError("TLS wants both --tls-cert and --tls-key", hint="give the other one as well")
    at = Listening(
        arguments.host,
        arguments.port,
        Certificate(chain, key) if chain else None,
        arguments.origin,
        None if arguments.metrics_port is None else (arguments.metrics_host, arguments.metrics_port),
    )
    serving = prepare(arguments)
    with serving.ranks or nullcontext():
        asyncio.run(serve_until_stopped(serving, at))


def _token(arguments: argparse.Namespace) -> None:
    from cloud_backend.tokens import add_token

    print(add_token(arguments.token_file, arguments.name))
    print(f"stip-cloud: its hash is in {arguments.token_file}; the token is shown only now", file=sys.stderr)


def _engines(arguments: argparse.Namespace) -> None:
    from cloud_backend.engines import engines, lines

    found = list(engines())
    print(json.dumps([asdict(one) for one in found], indent=2) if arguments.json else "\n".join(lines(found)))
