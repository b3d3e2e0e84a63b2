"""A process beside the server's that holds its part of every model; `ranks` starts it.

It does what the server says over a socket, and ends when that closes, or when it fails: from there the ranks could not
go on together.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cloud_backend.log import log_to_stderr
from cloud_backend.tensor_parallel.orders import Begin, Join, Line, Load, Meet, Order, Reply
from shared.errors import StipError

if TYPE_CHECKING:
    from cloud_backend.tensor_parallel.engine import Part

log = logging.getLogger("stip.cloud")


def main(descriptor: str, told: str) -> None:
    """Serves the socket of that number. told: a Join, in JSON."""
    line, join = Line(socket.socket(fileno=int(descriptor))), msgspec.json.decode(told, type=Join)
    watching = threading.Thread(target=_end_with_server, args=(line, join), daemon=True)
    watching.start()
    for number in (signal.SIGINT, signal.SIGTERM):  # the server drains first, and needs this process for it
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr(join.log)
    try:
        _follow(line, join)
    except EOFError:  # the server is gone
        watching.join()
    except Exception as error:  # its text could quote tensors
        time.sleep(0.5)  # where the server has ended, so does this process, without a word
        log.error("process %d of %d: %s", join.rank, join.processes, type(error).__name__)
        os._exit(1)


def _end_with_server(line: Line, join: Join) -> None:
    """Ends the process when the server has ended, whatever it waits for."""
    line.wait_for_end()
    shutil.rmtree(Path(join.meeting).parent, ignore_errors=True)  # what a server that was killed could not do
    os._exit(0)


def _follow(line: Line, join: Join) -> None:
    from transformers.utils import logging as transformers_logging

    from cloud_backend.memory import bound_preparations
    from cloud_backend.tensor_parallel.ranks import meet

    bound_preparations()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    line.send(Reply())
    parts: list[Part] = []
    while True:
        order: Order = line.receive(Order)
        if isinstance(order, Meet):
            meet(join)
        elif isinstance(order, Load):
            parts.append(_load(line, order))
        else:
            parts[order.model].follow(order)


def _load(line: Line, order: Load) -> Part:
    from cloud_backend.tensor_parallel.engine import Part, budget_of, load_part

    try:
        model = load_part(order)
    except Exception as error:
        line.send(Reply(str(error) if isinstance(error, StipError) else type(error).__name__))
        raise
    line.send(Reply())
    line.receive(Begin)
    return Part(model, order.dtype, order.context, budget_of(order))
