"""`stip-device`: chat with a private assistant, serve it to programs and browsers, or ask a private encoder, captioner
or translator."""

from __future__ import annotations

import argparse
from pathlib import Path

from device_app.options import bundle_and_cloud, cloud, drafts
from shared.command import debug_option, run

IMAGES = "(JPEG, PNG, WebP, GIF, BMP, TIFF, …)"


def main() -> None:
    """Entry point of the `stip-device` command."""
    parser = argparse.ArgumentParser(prog="stip-device", description="The device: a private assistant.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = [debug_option(), bundle_and_cloud()]

    chat = commands.add_parser("chat", help="talk in the terminal, or answer once with -p", parents=[*common, drafts()])
    chat.add_argument("-p", "--prompt", help="answer this once on stdout and leave")
    chat.add_argument("--system", metavar="S", help="system prompt")
    chat.add_argument(
        "--image", action="append", default=[], metavar="FILE", help=f"show this {IMAGES}, with the first question"
    )
    chat.add_argument("--max-tokens", type=int, default=512, metavar="N")
    chat.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    chat.add_argument("--top-k", type=int, default=0, metavar="K")
    chat.add_argument("--top-p", type=float, default=1.0, metavar="P")
    chat.add_argument("--min-p", type=float, default=0.0, metavar="P")
    chat.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    chat.add_argument("--seed", type=int, metavar="N", help="same seed, same answer (default: random)")
    chat.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    chat.add_argument("--json", action="store_true", help="with -p: print one object with text, ids and figures")
    chat.add_argument("--no-history", action="store_true", help="keep nothing of the talk on this device")
    chat.set_defaults(command=_chat)

    serve = commands.add_parser(
        "serve",
        help="an OpenAI-compatible API and a web page, on this machine",
        parents=[debug_option(), cloud(), drafts()],
    )
    serve.add_argument("folders", type=Path, nargs="+", metavar="OUT/device", help="one or more bundles")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8080, metavar="N", help="0 takes a free one (default: %(default)s)")
    serve.add_argument(
        "--sessions", type=int, default=4, metavar="N", help="of each model, open in the cloud (default: %(default)s)"
    )
    serve.add_argument(
        "--api-key-file", type=Path, metavar="F", help="file with the API's key (or set STIP_API_KEY; else one is made)"
    )
    serve.add_argument("--no-history", action="store_true", help="keep no conversation of the page on this device")
    serve.set_defaults(command=_serve)

    embed = commands.add_parser("embed", help="texts to vectors, a JSON array a line", parents=common)
    embed.add_argument("inputs", nargs="+", metavar="TEXT", help="a text, or - for the lines of stdin")
    embed.add_argument("--truncate", action="store_true", help="cut texts that are too long, instead of refusing them")
    embed.set_defaults(command=_embed, name="embed")

    classify = commands.add_parser("classify", help="texts or images to labels and probabilities", parents=common)
    classify.add_argument(
        "inputs", nargs="+", metavar="TEXT|IMAGE", help=f"a text (- for the lines of stdin) or a file {IMAGES}"
    )
    classify.add_argument("--top", type=int, default=1, metavar="N", help="labels of each (default: %(default)s)")
    classify.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    classify.set_defaults(command=_classify, name="classify")

    describe = commands.add_parser("describe", help="images to a line of text each", parents=common)
    describe.add_argument("inputs", nargs="+", metavar="FILE", help=f"an image {IMAGES}")
    describe.add_argument("-p", "--prompt", help="what to ask of each image")
    describe.add_argument("--max-tokens", type=int, default=128, metavar="N")
    describe.set_defaults(command=_describe, name="describe")

    translate = commands.add_parser("translate", help="texts to what the model makes of them", parents=common)
    translate.add_argument("inputs", nargs="+", metavar="TEXT", help="a text, or - for the lines of stdin")
    translate.add_argument("--max-tokens", type=int, default=512, metavar="N")
    translate.set_defaults(command=_translate, name="translate")

    for command in (embed, classify, describe, translate):
        command.add_argument("--json", action="store_true", help="print one object with all results and figures")
    run(parser)


# What a command needs is imported when it runs, so that --help is quick and a missing package is named.


def _chat(arguments: argparse.Namespace) -> None:
    from device_app.chat import command

    command(arguments)


def _serve(arguments: argparse.Namespace) -> None:
    from device_app.gateway.server import command

    command(arguments)


def _embed(arguments: argparse.Namespace) -> None:
    from device_app.batch import embed

    embed(arguments)


def _classify(arguments: argparse.Namespace) -> None:
    from device_app.batch import classify

    classify(arguments)


def _describe(arguments: argparse.Namespace) -> None:
    from device_app.batch import describe

    describe(arguments)


def _translate(arguments: argparse.Namespace) -> None:
    from device_app.batch import translate

    translate(arguments)
