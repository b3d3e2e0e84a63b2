"""`make test-arm64`: the device app on an emulated arm64 answers what it answers on this machine.

The clouds run on this machine's own processor: SmolLM2-135M in float32 answers a prompt, and a tiny LLaVA of random
weights describes an image. Needs Debian's qemu-user-static and mmdebstrap, a network for packages and wheels, and a few
minutes, most of them once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.camera import picture
from benchmarks.load import smollm2
from benchmarks.process import listening, run
from tests.arm64.emulated import ROOT, Emulated, EmulationError
from tests.checkpoints import make_checkpoint

PROMPT = "What is the capital of France?"
WHICH = "import platform; print(platform.machine(), platform.python_version())"


def main() -> None:
    """Prints all answers, and fails where the machines differ."""
    try:
        machine = Emulated.made(ROOT / "build" / "arm64")
    except EmulationError as error:
        sys.exit(f"test-arm64: error: {error}")
    name = machine.python("-c", WHICH).stdout.strip()
    if not name.startswith("aarch64"):
        sys.exit(f"test-arm64: error: seen a machine {name!r}, wanted aarch64")
    print(f"emulated: {name}")
    with smollm2("float32") as (bundle, server):
        answer = compared(machine, "chat", str(bundle), "--url", server.address, "-p", PROMPT, "--json")
        print(f"{len(answer['ids'])} tokens, the same on both: {answer['text']!r}")
    with llava() as (folder, url):
        compared(machine, "describe", str(folder / "export" / "device"), "--url", url, str(folder / "a.jpg"), "--json")
        print("an image, described alike on both")


def compared(machine: Emulated, *arguments: str) -> dict[str, Any]:
    """What `stip-device` prints, here and there. Exits where it is not the same."""
    command = ["-m", "device_app", *arguments]
    here = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    began = time.monotonic()
    there = machine.python(*command)
    print(f"{arguments[0]}: {time.monotonic() - began:.1f} s from start to end, emulated")
    answers: list[dict[str, Any]] = [json.loads(done.stdout) for done in (here, there)]
    for key in ("text", "ids", "results"):
        if answers[0].get(key) != answers[1].get(key):
            sys.exit(f"test-arm64: error: {arguments[0]}: {key} differs")
    return answers[1]


@contextmanager
def llava() -> Iterator[tuple[Path, str]]:
    """A folder with an export and a picture, and the URL of a cloud that serves the export."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_checkpoint(folder / "checkpoint", "llava")
        (folder / "a.jpg").write_bytes(picture(1))
        run([sys.executable, "-m", "export", "model", folder / "checkpoint", "--out", folder / "export"])
        serve: list[str | Path] = [
            sys.executable,
            "-m",
            "cloud_backend",
            "serve",
            folder / "export" / "cloud",
            "--port",
            "0",
        ]
        with listening(serve, log="stderr") as url:
            yield folder, url


if __name__ == "__main__":
    main()
