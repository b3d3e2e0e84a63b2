"""`stip-device`: chat with a private assistant."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from shared.command import debug_option, run
from shared.errors import UsageError
from shared.levels import limit


def main() -> None:
    """Entry point of the `stip-device` command."""
    parser = argparse.ArgumentParser(prog="stip-device", description="The device: a private assistant.")
    common = [debug_option()]
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    chat = commands.add_parser("chat", help="talk in the terminal, or answer once with -p", parents=common)
    chat.add_argument("folder", type=Path, metavar="OUT/device")
    chat.add_argument("--url", required=True, help="of the cloud, for example ws://127.0.0.1:8765")
    chat.add_argument("-p", "--prompt", help="answer this once on stdout and leave")
    chat.add_argument("--system", metavar="S", help="system prompt")
    chat.add_argument("--max-tokens", type=int, default=512, metavar="N")
    chat.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    chat.add_argument("--top-k", type=int, default=0, metavar="K")
    chat.add_argument("--top-p", type=float, default=1.0, metavar="P")
    chat.add_argument("--min-p", type=float, default=0.0, metavar="P")
    chat.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    chat.add_argument("--seed", type=int, metavar="N", help="same seed, same answer (default: random)")
    chat.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    chat.add_argument("--json", action="store_true", help="with -p: print one object with text, ids and figures")
    chat.add_argument("--token-file", type=Path, metavar="F", help="file with the bearer token (or set STIP_TOKEN)")
    chat.add_argument(
        "--ca", type=Path, metavar="F", help="PEM file of the authority that signed the cloud's certificate"
    )
    chat.add_argument("--insecure", action="store_true", help="allow ws:// beyond this machine")
    chat.set_defaults(command=_chat)
    run(parser)


def _chat(arguments: argparse.Namespace) -> None:
    from device_app.assistant import Assistant
    from device_app.bundle import Bundle
    from device_app.chat import chat, note, stream
    from device_app.connection import Address
    from device_app.sampler import Sampling

    if arguments.json and arguments.prompt is None:
        raise UsageError("--json: it goes with -p")
    seed = int.from_bytes(os.urandom(8), "little") if arguments.seed is None else arguments.seed
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=seed,
    )
    address = Address(arguments.url, arguments.ca, arguments.insecure)
    bundle = Bundle.open(arguments.folder)
    if bundle.manifest.warning:
        note(f"stip-device: warning: {bundle.manifest.warning}")
    assistant = Assistant(
        bundle,
        address,
        token=_token(arguments.token_file),
        on_lost=lambda: note("\nstip-device: connection lost; trying again, the answer will go on"),
    )
    with assistant:
        worth = f"stip-device: {limit(bundle.manifest.scheme)}"
        if arguments.prompt is None:
            note(worth)
            chat(
                assistant,
                system=arguments.system,
                sampling=sampling,
                max_tokens=arguments.max_tokens,
                stop=arguments.stop,
            )
            return
        options = {"sampling": sampling, "max_tokens": arguments.max_tokens, "stop": arguments.stop}
        if bundle.template is None:
            note("stip-device: this bundle has no chat template, so its model continues the prompt")
            answer = assistant.complete(arguments.prompt, **options)
        else:
            system = [{"role": "system", "content": arguments.system}] if arguments.system else []
            answer = assistant.chat([*system, {"role": "user", "content": arguments.prompt}], **options)
        if not arguments.json:
            stream(assistant, answer)
            note(worth)
            return
        answer.finish()
        note(worth)
        stats = answer.stats
        result = {
            "text": answer.text,
            "ids": answer.ids,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": stats.prompt_tokens,
            "dropped_turns": stats.dropped_turns,
            "bytes_up": stats.counters.bytes_up,
            "bytes_down": stats.counters.bytes_down,
            "round_trips": stats.counters.round_trips,
            "full_rows": stats.counters.full_rows,
            "replays": stats.counters.replays,
            "timings": {
                "seconds": stats.seconds,
                "first_token_seconds": stats.first_token_seconds,
                "tokens_per_second": stats.tokens_per_second,
                "cloud_queue_seconds": stats.counters.queue_us / 1e6,
                "cloud_compute_seconds": stats.counters.compute_us / 1e6,
                "device_seconds": {step: spent / 1e9 for step, spent in stats.counters.work_ns.items()},
            },
        }
        print(json.dumps(result, ensure_ascii=False))


def _token(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get("STIP_TOKEN")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise UsageError(f"--token-file {path}: {error.strerror}") from None
