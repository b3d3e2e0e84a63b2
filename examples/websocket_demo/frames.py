"""Frames of stip.v1 (PROTOCOL.md, section 2), written and read with nothing of this project.

frame   = u32 little-endian header length ‖ MessagePack map ‖ tensors, each at a multiple of 16 bytes
"""

from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import numpy as np

DTYPES = {"float32": "<f4", "uint32": "<u4"}  # all that a session in float32 has


def write(header: dict[str, Any], *tensors: Any) -> bytes:
    """The frame of a message. tensors: float32 arrays."""
    header |= {"tensors": [["float32", list(tensor.shape)] for tensor in tensors]}
    packed = msgspec.msgpack.encode(header)
    frame = bytearray(struct.pack("<I", len(packed)) + packed)
    for tensor in tensors:
        frame += bytes(-len(frame) % 16)  # padding
        frame += tensor.astype("<f4").tobytes()
    return bytes(frame)


def read(frame: bytes) -> tuple[dict[str, Any], list[Any]]:
    """Header and tensors of a frame. The tensors are views: nothing is copied."""
    [length] = struct.unpack_from("<I", frame)
    header = msgspec.msgpack.decode(frame[4 : 4 + length], type=dict[str, Any])
    at, tensors = 4 + length, []
    for dtype, shape in header.get("tensors", []):
        at += -at % 16
        count = int(np.prod(shape, dtype=object))
        tensors.append(np.frombuffer(frame, DTYPES[dtype], count, at).reshape(shape))
        at += tensors[-1].nbytes
    return header, tensors


def shown(way: str, frame: bytes) -> str:
    """A frame for people: the way it goes, its length, its header, and where its tensors' bytes begin."""
    header, tensors = read(frame)
    hidden = {name: "…" for name in ("resume", "token") if header.get(name)}  # secrets of the session
    lines = [f"{way} {len(frame):>7,} bytes  {json.dumps(header | hidden, ensure_ascii=False)}"]
    lines += [f"            {tensor.reshape(-1)[:4].tobytes().hex(' ', 4)} …" for tensor in tensors]
    return "\n".join(lines)
