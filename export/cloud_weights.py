"""The weights of a cloud's half by the stock model's names, however they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoConfig

from export.gguf.file import GgufFile, rounded
from export.gguf.half import GGUF_FILE, blocks_of
from export.gguf.layout import Forms
from export.shards import Shards
from export.spaces import Axis
from export.stock import empty_model
from shared.manifest import CloudManifest, read_manifest


class CloudWeights(Protocol):
    """The tensors of a checkpoint in secret coordinates."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, by name."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, shape `shapes[name]`."""


def cloud_weights(folder: Path) -> CloudWeights:
    """The weights in OUT/cloud. Raises BundleError, SourceError."""
    manifest = read_manifest(folder, CloudManifest)
    return GgufWeights(folder, manifest.absent) if manifest.weights == "gguf" else Shards(folder)


class GgufWeights:
    """model.gguf, read as the stock model would have it."""

    def __init__(self, folder: Path, absent: list[str]) -> None:
        """absent: tensors of the stock model that are not there, whatever stands in their place."""
        config = AutoConfig.from_pretrained(folder)
        self._file, form = GgufFile(folder / GGUF_FILE), Forms(config)
        stock = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
        self.shapes = {name: shape for name, shape in stock.items() if name not in absent}
        self._forms = {name: form(name) for name in self.shapes}

    def read(self, name: str) -> torch.Tensor:
        form = self._forms[name]
        return form.stock([self._file.read(part) for part in form.names])

    def stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's values as the types of this file hold them, in float32. Types that can be read and not written,
        such as Q4_K, leave them as they are: a public file of that type holds such values already."""
        form = self._forms[name]
        parts = list(zip(form.stored(tensor), (self._file.tensors[part].kind for part in form.names), strict=True))
        try:
            return form.stock([rounded(part, kind) for part, kind in parts]).float()
        except NotImplementedError:
            return tensor.float()

    def blocks(self, axes: Mapping[str, tuple[Axis, ...]]) -> dict[str, tuple[int, ...]]:
        """Which blocks the order of a space keeps together, largest first, as the types of tensors with these axes
        tell."""
        return blocks_of(self._forms, self._file.tensors, axes, self.shapes)
