"""Devices that decode when they are told, in processes of their own: what drives a measurement is not to slow it.

    python -m benchmarks.random_devices OUT/device URL

reads commands, one JSON object a line, and answers each with one:

    {"prompts": [[id, …], …]}   that many fresh devices connect, and each asks for its first token
    {"tokens": n}               each decodes so many more, greedily, all at once

There is no torch in these processes, as there is none on devices. Ids are embedded from `benchmarks.random_export`'s
table; text is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from device_app.connection import Address, Connection
from device_app.sampler import Sampler, Sampling
from device_app.session import Session
from shared.key import UserKey
from shared.manifest import DeviceManifest, read_manifest

TOP_K = 256


class Device:
    """One device: its session, its socket, and the ids so far."""

    def __init__(self, folder: Path, url: str, prompt: Sequence[int]) -> None:
        manifest, key = read_manifest(folder, DeviceManifest), UserKey.load(folder / "key.safetensors")
        table = np.load(folder / "embedding.npy", mmap_mode="r")  # its pages are shared by all processes
        session = Session(
            key,
            lambda ids, first: table[np.asarray(ids)],
            served_name=manifest.served_name,
            context=manifest.context,
        )
        self.counters = session.counters
        self.ids = list(prompt)
        self.moments: list[float] = []  # time.monotonic() of each token, which all processes of a machine share
        self._prompt = len(prompt)
        self._connection = Connection(session, Address(url))
        self._sampler = Sampler(Sampling(), manifest.vocab_size)

    @property
    def answer(self) -> list[int]:
        """The ids behind the prompt."""
        return self.ids[self._prompt :]

    def decode(self, tokens: int) -> None:
        """Takes so many more tokens."""
        for _ in range(tokens):
            self.ids.append(self._next())
            self.moments.append(time.monotonic())

    def _next(self) -> int:
        for top_k in (TOP_K, 0):  # the full row settles what the top of it does not
            (row,) = self._connection.rows(self.ids, top_k=top_k)
            token = self._sampler.choose(row, len(self.ids))
            if token is not None:
                break
        assert token is not None
        return token

    def close(self) -> None:
        """Ends the session."""
        self._connection.close()


@dataclass(frozen=True)
class Decoded:
    """What devices decoded together. Times are time.monotonic()'s."""

    ids: list[list[int]]  # behind each prompt, in the order of the prompts; those of `prefill` too
    moments: list[list[float]]  # of the tokens of each, without those of `prefill`
    started: float
    cpu_seconds: list[float]  # of each process
    compute_us: int  # of all devices' requests, as the cloud says
    queue_us: int
    bytes_up: int
    bytes_down: int

    @property
    def seconds(self) -> float:
        """From the start to the last token of all."""
        return max(moments[-1] for moments in self.moments) - self.started

    @property
    def tokens(self) -> int:
        return sum(map(len, self.moments))

    @property
    def busiest(self) -> float:
        """The share of its time that the busiest process computed, 1 being a whole core."""
        return max(self.cpu_seconds) / self.seconds


class Devices:
    """The processes, as who measures sees them."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """A fresh device for each prompt asks for its first token."""
        of_each = [list(prompts[at :: len(self._processes)]) for at in range(len(self._processes))]
        self._told([{"prompts": [list(map(int, one)) for one in some]} for some in of_each])

    def decode(self, tokens: int) -> Decoded:
        """Every device takes so many more tokens."""
        started = time.monotonic()
        answers = self._told([{"tokens": tokens}] * len(self._processes))
        return Decoded(
            ids=_in_order([answer["ids"] for answer in answers]),
            moments=_in_order([answer["moments"] for answer in answers]),
            started=started,
            cpu_seconds=[answer["cpu_seconds"] for answer in answers],
            **{name: sum(answer[name] for answer in answers) for name in COUNTED},
        )

    def _told(self, commands: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        for process, command in zip(self._processes, commands, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        return [json.loads(_line(process)) for process in self._processes]


COUNTED = ("compute_us", "queue_us", "bytes_up", "bytes_down")  # of device_app.counters


def _in_order(of_each: list[list[Any]]) -> list[Any]:
    """What was dealt to the processes in turn."""
    return [one for row in zip_longest(*of_each) for one in row if one is not None]


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        sys.exit(f"bench: error: a process of devices ended with status {process.wait()}; what it says is above")
    return line


@contextmanager
def devices(folder: Path, url: str, processes: int) -> Iterator[Devices]:
    """Starts so many processes, which end with the block."""
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.random_devices", folder, url]
    # One thread each: numpy's own would fight over the cores that the cloud needs.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        for _ in range(processes)
    ]
    try:
        yield Devices(running)
    finally:
        for process in running:
            process.kill()
            process.communicate()


def main(folder: Path, url: str) -> None:
    """Obeys commands until there are no more."""
    here: list[Device] = []
    for line in sys.stdin:
        command = json.loads(line)
        if "prompts" in command:
            for device in here:
                device.close()
            here = [Device(folder, url, prompt) for prompt in command["prompts"]]
            _together(here, 1)
            answer: dict[str, Any] = {}
        else:
            before = {name: sum(getattr(one.counters, name) for one in here) for name in COUNTED}
            busy = time.process_time()
            _together(here, command["tokens"])
            answer = {
                "cpu_seconds": time.process_time() - busy,
                "ids": [device.answer for device in here],
                "moments": [device.moments[-command["tokens"] :] for device in here],
            }
            answer |= {name: sum(getattr(one.counters, name) for one in here) - before[name] for name in COUNTED}
        print(json.dumps(answer), flush=True)


def _together(here: list[Device], tokens: int) -> None:
    """Every device decodes in a thread of its own."""
    with ThreadPoolExecutor(len(here)) as threads:
        for done in [threads.submit(device.decode, tokens) for device in here]:
            done.result()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
