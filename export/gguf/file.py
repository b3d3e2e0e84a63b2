"""GGUF files, one tensor in memory at a time, and the values that their types hold.

The library maps a whole file, which counts as memory used; here each reading opens the file afresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind

from shared.errors import SourceError

Bytes = npt.NDArray[np.uint8]

FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
SLICE = 2**20  # values that are encoded or decoded at a time
_TOKENS, _EOT = "tokenizer.ggml.tokens", "tokenizer.ggml.eot_token_id"
_ENDS = ("tokenizer.ggml.eos_token_id", _EOT, "tokenizer.ggml.eom_token_id")
# What ends a turn in the chat formats of the architectures here.
_TURN_ENDS = (b"<|eot_id|>", b"<|eom_id|>", b"<|im_end|>", b"<|end|>", b"<end_of_turn>")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its shape with the longest stride first, as in torch, and what its values are stored as."""

    shape: tuple[int, ...]
    kind: Kind

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.shape[-1], self.kind)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape[:-1]).numel() * self.row_bytes


def block(kind: Kind) -> int:
    """Values that share a scale; 1 for floats."""
    return int(gguf.GGML_QUANT_SIZES[kind][0])


def row_bytes(columns: int, kind: Kind) -> int:
    """Bytes of a row of so many values, which must be whole blocks."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    assert columns % values == 0
    return int(columns // values * size)


def encoded(values: torch.Tensor, kind: Kind) -> Bytes:
    """Values [..., columns] as rows [rows, bytes] of a type. Quantised types round; float types hold their own."""
    rows = values.reshape(-1, values.shape[-1])
    if kind in FLOATS:
        stored: Bytes = rows.to(FLOATS[kind]).contiguous().view(torch.uint8).numpy()
        return stored
    made: Bytes = np.empty((len(rows), row_bytes(rows.shape[1], kind)), np.uint8)
    for part in _slices(rows.shape):
        made[part] = gguf.quants.quantize(rows[part].float().numpy(), kind)
    return made


def decoded(raw: Bytes, kind: Kind) -> torch.Tensor:
    """The values [rows, columns] of rows [rows, bytes]: floats in their own type, others in float32.

    Raises SourceError for a type that cannot be read.
    """
    if kind in FLOATS:
        return torch.from_numpy(raw).view(FLOATS[kind])
    values, size = gguf.GGML_QUANT_SIZES[kind]
    made = np.empty((len(raw), raw.shape[1] // size * values), np.float32)
    try:
        for part in _slices(made.shape):
            made[part] = gguf.quants.dequantize(raw[part], kind)
    except NotImplementedError:
        raise SourceError(f"type {kind.name}: cannot be read", hint="give a file of another quantisation") from None
    return torch.from_numpy(made)


def rounded(values: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Values [..., columns] as a type holds them. Raises NotImplementedError for a type that the library only reads."""
    return decoded(encoded(values, kind), kind).view(values.shape)


def _slices(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, SLICE // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))


class Metadata(dict[str, Any]):
    """What a file says, by key. Raises SourceError for a key that is not there."""

    def __init__(self, path: Path, said: Mapping[str, Any]) -> None:
        super().__init__(said)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise SourceError(f"{self._path}: its metadata has no {key}", hint="give the model's safetensors")

    def without(self, prefix: str) -> Metadata:
        """The same, keys that begin so without their beginning."""
        return Metadata(self._path, {key.removeprefix(prefix): value for key, value in self.items()})


class GgufFile:
    """A GGUF file's metadata and tensors. Raises SourceError for one that cannot be read."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise SourceError(f"{path}: no such file")
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
            self.metadata = Metadata(path, said)
            self.end_ids = _end_ids(reader.fields)  # of tokens at which generation ends
        except (ValueError, OSError, KeyError, IndexError) as error:
            raise SourceError(f"{path}: {error}", hint="truncated or not GGUF? download it again") from None
        self.tensors = {
            one.name: Tensor(tuple(reversed(one.shape.tolist())), Kind(one.tensor_type)) for one in reader.tensors
        }
        self._offsets = {one.name: int(one.data_offset) for one in reader.tensors}

    def raw(self, name: str) -> Bytes:
        """A tensor's rows [rows, bytes], as stored. Raises SourceError where the file has gone or changed since."""
        tensor = self.tensors[name]
        try:
            raw = np.fromfile(self.path, np.uint8, tensor.bytes, offset=self._offsets[name])
        except OSError as error:
            raise SourceError(f"{self.path}: tensor {name}: {error.strerror or error}") from None
        if raw.size != tensor.bytes:
            raise SourceError(f"{self.path}: tensor {name}: seen {raw.size} bytes, wanted {tensor.bytes}")
        return raw.reshape(-1, tensor.row_bytes)

    def read(self, name: str) -> torch.Tensor:
        """A tensor's values in its shape."""
        tensor = self.tensors[name]
        return decoded(self.raw(name), tensor.kind).view(tensor.shape)


def _end_ids(fields: Mapping[str, gguf.ReaderField]) -> frozenset[int]:
    """The tokens that a file says are ends: of a text, a turn, a message. Older ones do not say what ends a turn: there
    the tokens that do by their text are taken too."""
    ids = {int(fields[key].contents()) for key in _ENDS if key in fields}
    if _EOT not in fields and _TOKENS in fields:
        tokens = fields[_TOKENS]
        ids |= {token for token, part in enumerate(tokens.data) if tokens.parts[part].tobytes() in _TURN_ENDS}
    return frozenset(ids)


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    rows: Iterable[tuple[str, Bytes]],
) -> None:
    """Writes a file from `rows`, which must come in the order of `tensors`."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (planned, tensor), (name, raw) in zip(tensors.items(), rows, strict=True):
            if (name, raw.nbytes) != (planned, tensor.bytes):
                raise AssertionError(f"tensor {name!r} is not the one planned")
            writer.write_tensor_data(raw)
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))
