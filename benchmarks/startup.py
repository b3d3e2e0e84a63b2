"""How soon `stip-device chat -p` sends its first frame, and what memory it holds. `make bench` prints it as (h).

A relay stands between the device and the cloud: the first bytes that come up after the cloud has answered the
WebSocket handshake are the `Open` frame. By then the bundle is open, its digests are checked and the prompt is tokens.
Beside it, in turns, how long a process takes that only imports the libraries under the device app: what is above it
is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.process import listening

STARTS = 7
PROMPT = "Hi"
LIBRARIES = "import jinja2, msgspec, numpy, onnxruntime, tokenizers, websockets.sync.client; print(flush=True)"


def main() -> None:
    """Serves the cloud half of an export and starts the device app on the other half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, metavar="OUT", help="for example build/demo, which `make demo` makes")
    options = parser.parse_args()
    serve: list[str | Path] = [sys.executable, "-m", "cloud_backend", "serve", options.export / "cloud", "--port", "0"]
    with listening(serve, log="stderr") as url:
        figures = measure(options.export / "device", url)
    show(figures)
    print(json.dumps(figures))


def measure(folder: Path, url: str, starts: int = STARTS) -> dict[str, Any]:
    """Medians over the starts, after one that warms the caches. Seconds and bytes.

    folder: the device half of what is served at `url`.
    """
    first_start(folder, url)
    pairs = [(first_start(folder, url), libraries_alone()) for _ in range(starts)]
    return {
        "starts": starts,
        "first_frame_seconds": statistics.median(start.first_frame_seconds for start, _ in pairs),
        "processor_seconds": statistics.median(start.processor_seconds for start, _ in pairs),
        "libraries_seconds": statistics.median(alone for _, alone in pairs),
        "to_libraries": statistics.median(start.first_frame_seconds / alone for start, alone in pairs),
        "peak_bytes": statistics.median(start.peak_bytes for start, _ in pairs),
        "resident_bytes": statistics.median(start.resident_bytes for start, _ in pairs),
    }


def show(figures: dict[str, Any]) -> None:
    """One line."""
    print(
        f"(h) stip-device chat -p  first frame after {figures['first_frame_seconds']:.2f} s "
        f"({figures['processor_seconds']:.2f} s of a processor), {figures['to_libraries']:.2f} × the "
        f"{figures['libraries_seconds']:.2f} s that importing the libraries takes"
    )
    print(
        f"    memory {figures['resident_bytes'] / 2**20:.0f} MiB, at most {figures['peak_bytes'] / 2**20:.0f} MiB, "
        "mapped files included"
    )


@dataclass(frozen=True)
class Start:
    """One run of `stip-device chat -p`."""

    first_frame_seconds: float  # from the start of the process
    processor_seconds: float  # that it had worked by then
    peak_bytes: int  # largest resident set, pages of mapped files included
    resident_bytes: int  # the resident set when the last bytes came from the cloud


def first_start(folder: Path, url: str) -> Start:
    """Starts the device app and lets it answer. Raises CalledProcessError if it fails."""
    with relaying(url) as relay:
        options = ["--url", relay.url, "-p", PROMPT, "--max-tokens", "8"]
        command: list[str | Path] = [sys.executable, "-m", "device_app", "chat", folder, *options]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        relay.process = process.pid
        _, errors = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
    return Start(relay.first_frame - started, relay.processor, relay.memory["VmHWM"], relay.memory["VmRSS"])


def libraries_alone() -> float:
    """Seconds until a process that does nothing else has imported what the device app stands on."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", LIBRARIES], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - started


@dataclass
class Relay:
    """What passes between one device and the cloud."""

    url: str
    process: int = 0  # the device's
    first_frame: float = 0.0  # when the first bytes came up after the handshake, by time.perf_counter
    processor: float = 0.0  # seconds that the device had worked by then
    memory: dict[str, int] = field(default_factory=dict)  # of the device, when the cloud last sent something

    def up(self, device: socket.socket, cloud: socket.socket, shaken: threading.Event) -> None:
        """From the device to the cloud."""
        while data := device.recv(1 << 16):
            if shaken.is_set() and not self.first_frame:
                self.first_frame = time.perf_counter()
                self.processor = processor_seconds_of(self.process)
            cloud.sendall(data)
        cloud.shutdown(socket.SHUT_WR)

    def down(self, device: socket.socket, cloud: socket.socket, shaken: threading.Event) -> None:
        """From the cloud to the device, which waits for it and so is there to be looked at."""
        while data := cloud.recv(1 << 16):
            self.memory = memory_of(self.process)
            shaken.set()
            device.sendall(data)


@contextmanager
def relaying(url: str) -> Iterator[Relay]:
    """Takes one connection for the cloud at `url`."""
    cloud_at = urlsplit(url)
    with ExitStack() as open_until_the_end:
        listener = open_until_the_end.enter_context(socket.create_server(("127.0.0.1", 0)))
        relay = Relay(f"ws://127.0.0.1:{listener.getsockname()[1]}")

        def run() -> None:
            device = open_until_the_end.enter_context(listener.accept()[0])
            cloud = open_until_the_end.enter_context(socket.create_connection((cloud_at.hostname, cloud_at.port)))
            for end in (device, cloud):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            shaken = threading.Event()
            threading.Thread(target=relay.down, args=(device, cloud, shaken), daemon=True).start()
            relay.up(device, cloud, shaken)

        threading.Thread(target=run, daemon=True).start()
        yield relay


def processor_seconds_of(process: int) -> float:
    """Seconds of processor time that a process took so far, all its threads together."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # from the third one on
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(process: int) -> dict[str, int]:
    """Bytes that the kernel counts for a process, by its names for them (VmRSS, VmHWM, …)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {
        name: int(value.split()[0]) * 1024 for name, value in (line.split(":", 1) for line in lines) if "kB" in value
    }


if __name__ == "__main__":
    main()
