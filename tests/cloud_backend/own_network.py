"""A network of this process's own, so that what listens on all addresses listens to nobody."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEW_NETWORK = 0x40000000  # CLONE_NEWNET, sched.h
SET_FLAGS = 0x8914  # SIOCSIFFLAGS, sockios.h
UP = 1  # IFF_UP, if.h


@contextmanager
def own_network() -> Iterator[None]:
    """This thread, and the threads and processes that it starts, see a loopback interface of their own and no other.

    Where the system does not allow that (it takes root, or CAP_SYS_ADMIN), they stay where they are, with a warning.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(NEW_NETWORK) != 0:
            reason = os.strerror(ctypes.get_errno())
            warnings.warn(f"no network of its own: {reason}; Ray listens on this machine's addresses", stacklevel=2)
            yield
            return
        with socket.socket() as control:
            fcntl.ioctl(control, SET_FLAGS, struct.pack("16sh", b"lo", UP) + bytes(22))
        assert "lo" in Path("/proc/thread-self/net/dev").read_text()
        yield
        libc.setns(before, NEW_NETWORK)
    finally:
        os.close(before)
