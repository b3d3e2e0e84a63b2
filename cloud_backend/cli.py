"""`stip-cloud`: serve exported contexts, make bearer tokens."""

from __future__ import annotations

import argparse
import asyncio
import logging
import ssl
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from shared.command import debug_option, run
from shared.errors import UsageError
from shared.levels import limit


def main() -> None:
    """Entry point of the `stip-cloud` command."""
    parser = argparse.ArgumentParser(prog="stip-cloud", description="The cloud: stock models on transformed weights.")
    common = [debug_option()]
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve one or more exported cloud folders", parents=common)
    serve.add_argument("folders", nargs="+", type=Path, metavar="OUT/cloud")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_whole(0, 65535), default=8765, help="0 takes a free one (default: %(default)s)")
    serve.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    serve.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="to compute in"
    )
    serve.add_argument("--verify", action="store_true", help="hash every file before serving")
    serve.add_argument("--token-file", type=Path, metavar="F", help="hashes of the bearer tokens to accept")
    serve.add_argument("--tls-cert", type=Path, metavar="F")
    serve.add_argument("--tls-key", type=Path, metavar="F")
    serve.add_argument(
        "--origin", action="append", default=[], metavar="URL", help="allow browser pages of this origin"
    )
    serve.add_argument(
        "--context", type=_whole(1), metavar="N", help="most positions of a session (default: the model's)"
    )
    serve.add_argument("--max-sessions", type=_whole(1), default=64, metavar="N")
    serve.add_argument(
        "--idle-seconds", type=_seconds, default=600.0, metavar="S", help="silence after which a session ends"
    )
    serve.add_argument("--max-frame", type=_whole(1024), default=4 * 2**20, metavar="BYTES")
    serve.add_argument(
        "--window", type=_whole(1024), default=16 * 2**20, metavar="BYTES", help="bytes in flight of a session"
    )
    serve.set_defaults(command=_serve)

    token = commands.add_parser("token", help="make a bearer token: printed once, stored as a hash", parents=common)
    token.add_argument("--token-file", type=Path, default=Path("tokens.txt"), metavar="F")
    token.add_argument("--name", default="device", help="whose token it is (default: %(default)s)")
    token.set_defaults(command=_token)
    run(parser)


def _whole(least: int, most: int = 2**32 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"seen {text}, wanted {least} to {most}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"seen {text}, wanted more than 0")
    return float(text)


def _serve(arguments: argparse.Namespace) -> None:
    from transformers.utils import logging as transformers_logging

    from cloud_backend.limits import Limits
    from cloud_backend.opening import open_context
    from cloud_backend.scheduler import Scheduler
    from cloud_backend.server import CloudServer, serve_until_stopped
    from cloud_backend.session import Context
    from cloud_backend.tokens import Tokens

    logging.basicConfig(level=logging.INFO, format="stip-cloud: %(message)s", stream=sys.stderr)
    logging.getLogger("websockets").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()  # it would report the embedding as missing: it is, on purpose
    transformers_logging.disable_progress_bar()
    log = logging.getLogger("stip.cloud")
    if arguments.window < arguments.max_frame:
        raise UsageError(
            f"window: seen {arguments.window}, wanted at least --max-frame, {arguments.max_frame}",
            hint="a larger --window, or a smaller --max-frame",
        )
    limits = Limits(
        max_frame=arguments.max_frame,
        window=arguments.window,
        max_sessions=arguments.max_sessions,
        idle_seconds=arguments.idle_seconds,
    )
    tokens = Tokens(arguments.token_file) if arguments.token_file else None
    tls = _tls(arguments.tls_cert, arguments.tls_key)
    scheduler = Scheduler()
    contexts: dict[tuple[str, str], Context] = {}
    for folder in arguments.folders:
        load = partial(
            open_context,
            folder,
            dtype=arguments.dtype,
            device=arguments.device,
            context=arguments.context,
            verify=arguments.verify,
        )
        manifest, engine = scheduler.call(load)
        name = (manifest.served_name, manifest.key_id)
        if name in contexts:
            raise UsageError(f"{folder}: the same export was given twice", hint="give each folder once")
        contexts[name] = Context(*name, engine)
        log.info("serving %s: %s, context %d", manifest.served_name, engine.dtype, engine.context)
        log.info("%s: %s", manifest.served_name, limit(manifest.scheme))
        if manifest.warning:
            log.warning("%s: %s", manifest.served_name, manifest.warning)
    server = CloudServer(contexts.values(), limits, tokens, scheduler)
    asyncio.run(serve_until_stopped(server, arguments.host, arguments.port, tls=tls, origins=arguments.origin))


def _tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError("TLS wants both --tls-cert and --tls-key", hint="give the other one as well")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"TLS certificate {certificate} or key {key}: {error}", hint="give PEM files") from None
    return context


def _token(arguments: argparse.Namespace) -> None:
    from cloud_backend.tokens import add_token

    print(add_token(arguments.token_file, arguments.name))
    print(f"stip-cloud: its hash is in {arguments.token_file}; the token is shown only now", file=sys.stderr)
