"""Devices in a process of their own: `python -m benchmarks.device_process OUT/device URL NUMBER…`.

They share the process's bundle, and each that is active has a thread. Orders come on stdin, one JSON object a line. On
stdout come `ready` once every device is connected and warm; of a Run `running` once each of its devices has a token;
and of a Run or a Wander its Report, one line of JSON. `fleet` is the other end.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.devices import Device, Recoveries
from benchmarks.timelines import Timeline
from device_app.bundle import Bundle
from device_app.connection import Address
from shared.errors import StipError


class Run(msgspec.Struct, frozen=True, tag=True):
    """Answers one after the other, on some devices at once."""

    devices: tuple[int, ...]
    tokens: int  # of each answer
    prompts: tuple[str, ...]  # a device takes one after the other, and devices begin with different ones
    answers: int = 1  # of each device
    stagger: float = 0.0  # seconds from one device's start to the next one's
    fresh: bool = False  # every answer in a session of its own


class Wander(msgspec.Struct, frozen=True, tag=True):
    """Conversations of which some are active at any time: after each answer, another device's goes on, at random."""

    active: int
    seconds: float
    tokens: int  # of each answer
    turns: int  # of a conversation
    seed: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Ends the answers of the Run."""


Order = Run | Wander | Stop


class Report(msgspec.Struct):
    """What came of a Run or a Wander."""

    timelines: list[Timeline] = []
    errors: list[str] = []
    recoveries: Recoveries = msgspec.field(default_factory=Recoveries)
    cpu_seconds: float = 0.0  # processor time of the device processes

    def add(self, other: Report) -> None:
        """Takes in what another process reports."""
        self.timelines += other.timelines
        self.errors += other.errors
        self.recoveries.add(other.recoveries)
        self.cpu_seconds += other.cpu_seconds


class Crew:
    """The devices of this process."""

    def __init__(self, bundle: Bundle, address: Address, numbers: Iterable[int]) -> None:
        self.devices = {number: Device(bundle, address, number) for number in numbers}
        self.stopped = threading.Event()

    def obey(self, order: Run | Wander) -> None:
        """Carries an order out and says what came of it."""
        for device in self.devices.values():
            device.recoveries = Recoveries()
        before, report = time.process_time(), Report()
        if isinstance(order, Run):
            self._run(order, report)
        else:
            self._wander(order, report)
        report.cpu_seconds = time.process_time() - before
        for device in self.devices.values():
            report.recoveries.add(device.recoveries)
        say(msgspec.json.encode(report).decode())

    def _run(self, order: Run, report: Report) -> None:
        self.stopped.clear()
        begin = time.monotonic()
        started = {number: threading.Event() for number in order.devices if number in self.devices}

        def answers(number: int) -> None:
            device = self.devices[number]
            time.sleep(max(0.0, begin + order.devices.index(number) * order.stagger - time.monotonic()))
            for turn in range(order.answers):
                if self.stopped.is_set():
                    return
                if order.fresh:
                    device.forget()
                prompt = order.prompts[(number + turn) % len(order.prompts)]
                report.timelines.append(device.answer(prompt, order.tokens, started[number], self.stopped))

        threads = [_thread(report, partial(answers, number), done) for number, done in started.items()]
        for event in started.values():
            event.wait()
        say("running")
        for thread in threads:
            thread.join()

    def _wander(self, order: Wander, report: Report) -> None:
        until = time.monotonic() + order.seconds
        idle, lock, draw = list(self.devices.values()), threading.Lock(), random.Random(order.seed)

        def wanderer() -> None:
            while time.monotonic() < until:
                with lock:
                    device = idle.pop(draw.randrange(len(idle)))
                try:
                    report.timelines.append(device.turn(order.tokens, order.turns))
                except StipError as error:
                    report.errors.append(_named(error))
                with lock:
                    idle.append(device)

        for thread in [_thread(report, wanderer, threading.Event()) for _ in range(order.active)]:
            thread.join()


def _thread(report: Report, work: Callable[[], None], done: threading.Event) -> threading.Thread:
    """Runs `work` in a thread; what it raises is an error of the report. `done` is set in the end."""

    def body() -> None:
        try:
            work()
        except Exception as error:  # any at all: a device that failed must not look like one that is slow
            report.errors.append(_named(error))
        finally:
            done.set()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def say(line: str) -> None:
    """To whoever gives the orders."""
    print(line, flush=True)


def main(folder: str, url: str, numbers: Sequence[str]) -> None:
    """Obeys orders until stdin ends."""
    crew = Crew(Bundle.open(Path(folder)), Address(url), map(int, numbers))
    for device in crew.devices.values():
        device.warm_up()
    say("ready")
    for line in sys.stdin:
        order = msgspec.json.decode(line, type=Order)
        if isinstance(order, Stop):
            crew.stopped.set()
        else:
            threading.Thread(target=crew.obey, args=(order,), daemon=True).start()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except StipError as error:
        sys.exit(f"device process: error: {error}")
