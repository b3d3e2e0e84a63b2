"""safetensors files, one tensor in memory at a time.

The library writes a file from tensors that are all in memory, and maps whole files for reading, which counts as memory
used. Here the header is written first, from shapes alone, and tensors follow one by one; each reading opens the file
afresh, so what was read is given back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import SourceError

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(plans: Iterable[TensorPlan], most_bytes: int) -> dict[str, list[TensorPlan]]:
    """Spreads tensors over files of at most `most_bytes` (a larger tensor gets a file of its own)."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.bytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{k:05d}-of-{len(shards):05d}.safetensors": shard for k, shard in enumerate(shards, 1)}


def write_shard(
    path: Path, plans: list[TensorPlan], tensors: Iterator[tuple[str, torch.Tensor]], metadata: dict[str, str]
) -> None:
    """Writes one safetensors file from `tensors`, which must come in the order of `plans`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for plan in plans:
        header[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": plan.shape,
            "data_offsets": [offset, offset + plan.bytes],
        }
        offset += plan.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for plan, (name, tensor) in zip(plans, tensors, strict=True):
            if (name, tuple(tensor.shape), tensor.dtype) != (plan.name, plan.shape, plan.dtype):
                raise AssertionError(f"tensor {name!r} is not the one planned")
            file.write(tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data)


def write_index(folder: Path, shards: dict[str, list[TensorPlan]]) -> None:
    """The index that Hugging Face loaders want where there is more than one shard."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(plan.bytes for plans in shards.values() for plan in plans)},
        "weight_map": {plan.name: file for file, plans in shards.items() for plan in plans},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


class Shards:
    """The tensors of a folder's safetensors files, by name. Raises SourceError for a file that cannot be read."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        index = folder / INDEX
        if index.exists():
            try:
                named = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, AttributeError):
                raise SourceError(f"{index}: not a safetensors index", hint="download the model again") from None
            missing = [name for name in sorted(named) if not (folder / name).is_file()]
            if missing:
                raise SourceError(
                    f"{folder / missing[0]}: missing, though the index names it", hint="download it again"
                )
            files = [folder / name for name in sorted(named)]
        if not files:
            raise SourceError(
                f"{folder}: no .safetensors file",
                hint="stip-export reads safetensors or GGUF; convert other formats with save_pretrained()",
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # safetensors' own names: F32, BF16, …
        self._file: dict[str, Path] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open handle is not a dict)
                    part = file.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = part.get_dtype()
                    self._file[name] = path

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored."""
        with _opened(self._file[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def _opened(path: Path):  # type: ignore[no-untyped-def]
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path}: {error}", hint="truncated or not safetensors? download it again") from None
