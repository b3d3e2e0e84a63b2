"""A drive: the cabin example in a process of its own, a camera, and a line to the cloud that goes through tunnels."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.camera import Camera
from benchmarks.tunnel import Dark, Tunnel
from benchmarks.watch import Sample, Watch

PATIENCE = 60.0  # seconds for what still waits when the drive is over


@dataclass(frozen=True)
class Said:
    """A line of the program's."""

    moment: float  # when it was read, by the monotonic clock
    fields: dict[str, Any]


@dataclass(frozen=True)
class Drive:
    """What happened."""

    written: dict[str, float]  # each frame, and when it was whole
    broken: set[str]  # those that are no images
    said: list[Said]
    cuts: int  # connections that a tunnel ended
    samples: list[Sample]
    peak_resident: int  # bytes, files that it maps included
    seconds: float
    cpu_seconds: float
    queue: int

    def frames(self, key: str) -> list[str]:
        """The frames of the lines with this key (text, dropped or error), in the order in which they were said."""
        return [said.fields["frame"] for said in self.said if key in said.fields and "frame" in said.fields]

    def states(self, state: str) -> list[dict[str, Any]]:
        """The lines of the line to the cloud, and the last one."""
        return [said.fields for said in self.said if said.fields.get("state") == state]

    def broken_claims(self) -> list[str]:
        """What does not hold, in words."""
        told = Counter(frame for key in ("text", "dropped", "error") for frame in self.frames(key))
        twice = [frame for frame, times in told.items() if times > 1]
        lost = sorted(set(self.written) - set(told))
        unknown = sorted(set(told) - set(self.written))
        claims = {
            f"frames told of twice: {twice}": not twice,
            f"frames never told of: {lost}": not lost,
            f"frames nobody wrote: {unknown}": not unknown,
            f"dropped though the queue had room: {self.dropped_early()}": not self.dropped_early(),
            f"errors: seen {self.frames('error')}, wanted some of {sorted(self.broken)}": (
                set(self.frames("error")) <= self.broken
            ),
            f"described though they are no images: {self.broken & set(self.frames('text'))}": (
                not self.broken & set(self.frames("text"))
            ),
        }
        return [claim for claim, holds in claims.items() if not holds]

    def dropped_early(self) -> list[str]:
        """Frames that were dropped before there were as many newer ones as the queue holds."""
        early = []
        for said in self.said:
            if "dropped" in said.fields and "frame" in said.fields:
                name = said.fields["frame"]
                newer = [one for one, whole in self.written.items() if one > name and whole < said.moment]
                if len(newer) < self.queue:
                    early.append(name)
        return early


def drive(
    bundle: Path, cloud: str, darks: Sequence[Dark], *, every: float, queue: int = 4, options: Sequence[str] = ()
) -> Drive:
    """Drives through all of `darks`, a frame `every` seconds, and on until all frames are told of.

    cloud: its URL on loopback. options: further ones of the example's.
    """
    with tempfile.TemporaryDirectory() as folder, Tunnel(int(cloud.rpartition(":")[2])) as tunnel:
        camera = Camera(Path(folder), every)
        command: list[str | Path] = [sys.executable, "-m", "examples.cabin", bundle, "--url", tunnel.url, folder]
        process = subprocess.Popen(
            [*command, "--queue", str(queue), *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        said: list[Said] = []
        reader = threading.Thread(target=_read, args=(process, said), daemon=True)
        reader.start()
        try:
            camera.start()
            _wait(lambda: any("text" in one.fields for one in said), "the first description")
            with Watch(process.pid, every=0.5) as watch:
                began, used = time.monotonic(), watch.cpu_seconds
                tunnel.pass_through(darks)
                seconds, used = time.monotonic() - began, watch.cpu_seconds - used
                camera.stop()
                _wait(lambda: _told(said) >= set(camera.written), "a line about each frame")
                resident = _peak_resident(process.pid)
            process.terminate()
            process.wait(10)
            reader.join(10)
        finally:
            process.kill()
            process.wait()
    samples = watch.between(began, began + seconds)
    return Drive(camera.written, camera.broken, said, tunnel.broken, samples, resident, seconds, used, queue)


def _peak_resident(pid: int) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def _told(said: Sequence[Said]) -> set[str]:
    return {one.fields["frame"] for one in said if "frame" in one.fields}


def _read(process: subprocess.Popen[str], said: list[Said]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.append(Said(time.monotonic(), json.loads(line)))


def _wait(holds: Any, what: str) -> None:
    """Goes on without it where it does not come: what is missing is then among the claims that do not hold."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            print(f"drive: {what} did not come within {PATIENCE} s", file=sys.stderr)
            return
        time.sleep(0.05)
