"""The processes beside the server's that share its models: started, told what to do, and watched.

They end with the server, however it ends, and the server cannot go on without one of them.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import msgspec
import torch
import torch.distributed as group

from cloud_backend.log import LogFormat
from cloud_backend.tensor_parallel.orders import Begin, Join, Line, Load, Meet, Order, Reply
from shared.errors import EngineError, UsageError

log = logging.getLogger("stip.cloud")

STEP_SECONDS = 60.0  # that a rank waits for another in the middle of a step
MOMENT = 2.0  # seconds in which the end of a process is known after its sockets closed
END_SECONDS = 5.0
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# A rank imports what the server would, from the same places: `python -m` would look in the current folder first.
START = """
import sys
descriptor, told, *sys.path = sys.argv[1:]
from cloud_backend.tensor_parallel.rank import main
main(descriptor, told)
"""
# What the ranks say to each other stays on this machine, whatever the environment says.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True)
class _Other:
    """A rank beside this process."""

    rank: int
    process: subprocess.Popen[bytes]
    line: Line


class Ranks:
    """This process, as rank 0, and as many others as make `processes`.

    Once something has gone wrong among them, none is of use any more.
    """

    def __init__(
        self,
        processes: int,
        device: Literal["cpu", "cuda"],
        threads: int | None = None,
        style: LogFormat = "text",
        on_lost: Callable[[EngineError], None] = lambda error: None,
    ) -> None:
        """Starts the others.

        threads: of each process; None: an even share of what torch would take. style: of their log. on_lost: called
        from any thread, once, with what went wrong, such as that one of them has ended by itself.

        Raises UsageError for more processes than cards.
        """
        if device == "cuda" and torch.cuda.device_count() < processes:
            raise UsageError(
                f"--tensor-parallel: seen {processes} processes and {torch.cuda.device_count()} CUDA devices, "
                "wanted a card for each",
                hint="fewer processes, or --device cpu",
            )
        self.processes = processes
        self.device = device
        self.threads = threads or max(1, torch.get_num_threads() // processes)
        self._style = style
        self._on_lost = on_lost
        self._folder = Path(tempfile.mkdtemp(prefix="stip-"))  # mode 0700
        self._models = 0
        self._lock = threading.Lock()
        self._ending = False
        self._lost: EngineError | None = None
        self._known = threading.Event()  # that one was lost
        self._others = [self._start(rank) for rank in range(1, processes)]
        for other in self._others:
            threading.Thread(target=self._watch, args=(other,), name=f"rank {other.rank}", daemon=True).start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell(self, order: Order | Begin) -> None:
        """Raises OSError where one of them is gone."""
        for other in self._others:
            other.line.send(order)

    def start_loading(self, order: Load) -> int:
        """Has the others load their parts of a model. Gives its number, once all ranks have met."""
        try:
            if not self._models:
                os.environ.update(environment(self.device, 0))
                self._all("start")
                self.tell(Meet())
                meet(self._join(0))
            self.tell(order)
        except Exception as error:
            raise self.loss(f"the processes did not meet: {type(error).__name__}") from error
        self._models += 1
        return self._models - 1

    def all_loaded(self) -> None:
        """Waits until the others have loaded what they were told to, and lets them begin with it.

        Raises EngineError where one could not, OSError where one is gone since.
        """
        self._all("load its part")
        self.tell(Begin())

    def loss(self, seen: str) -> EngineError:
        """The error to raise where something went wrong among the ranks: what is known of it, else `seen`."""
        self._known.wait(MOMENT)
        return self._lose(seen)

    def close(self) -> None:
        """Ends the others."""
        self._ending = True
        for other in self._others:
            other.line.close()  # which each of them watches
        for other in self._others:
            try:
                other.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                other.process.kill()
        if group.is_initialized():
            group.destroy_process_group()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _join(self, rank: int) -> Join:
        return Join(rank, self.processes, str(self._folder / "meeting"), self.device, self.threads, self._style)

    def _start(self, rank: int) -> _Other:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), msgspec.json.encode(self._join(rank)).decode()]
            process = subprocess.Popen(
                [sys.executable, "-c", START, *arguments, *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | environment(self.device, rank),
                start_new_session=True,  # Ctrl-C is for the server, which answers what it has received first
            )
        return _Other(rank, process, Line(ours))

    def _all(self, what: str) -> None:
        """Hears from each of the others that it could do what it was to do."""
        for other in self._others:
            try:
                reply: Reply = other.line.receive(Reply)
            except (OSError, EOFError):
                raise self.loss(f"process {other.rank} of {self.processes} could not {what}") from None
            if reply.wrong is not None:
                raise self._lose(f"process {other.rank} of {self.processes} could not {what}: {reply.wrong}")

    def _watch(self, other: _Other) -> None:
        status = other.process.wait()
        if not self._ending:
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            self._lose(f"process {other.rank} of {self.processes}: {how}")

    def _lose(self, seen: str) -> EngineError:
        with self._lock:
            if self._lost is None:
                self._lost = EngineError(
                    f"tensor parallel: {seen}", hint="the log says more; did the machine run out of memory?"
                )
                self._known.set()
                for other in self._others:  # whoever waits for one of them is told so by their sockets
                    other.process.kill()
                self._on_lost(self._lost)
        return self._lost


def environment(device: str, rank: int) -> dict[str, str]:
    """Variables that a rank wants."""
    only_cpu = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}  # transformers takes what it finds
    return LOOPBACK | {"LOCAL_RANK": str(rank)} | only_cpu


def meet(join: Join) -> None:
    """Waits for all ranks to be there."""
    torch.set_num_threads(join.threads)
    card = None if join.device == "cpu" else torch.device("cuda", join.rank)
    if card is not None:
        torch.cuda.set_device(card)
    group.init_process_group(
        BACKENDS[join.device],
        init_method=f"file://{join.meeting}",
        rank=join.rank,
        world_size=join.processes,
        timeout=timedelta(seconds=STEP_SECONDS),
        device_id=card,
    )
