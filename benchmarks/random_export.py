"""An export of random weights at real shapes, written as they are drawn: a model of 13 GB needs no second copy on disk.

Tables, scheme, writers and manifests are the exporter's own. There is no tokenizer, and the device's half has its
embedding table as an array: whoever measures asks with ids.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.random_weights import drawn, learned
from cloud_backend.tensors import TORCH_DTYPES
from export.cloud_half import plan_cloud, used_structures, write_cloud
from export.families import family_of
from export.schemes import draw
from export.stock import empty_model
from shared.key import new_key_id
from shared.manifest import CloudManifest, DeviceManifest, file_entry, write_manifest
from shared.wire import FloatName

EMBEDDING = "embedding.npy"  # [vocab_size, hidden_size] float32
SHARD = 2 * 2**30


class RandomSource:
    """What the exporter reads of a model: every tensor drawn when it is read, the same each time."""

    def __init__(self, config: Any, dtype: FloatName, device: str) -> None:
        """device: where tensors are drawn, as a GPU draws a hundred times as fast."""
        self.config, self.dtype = config, TORCH_DTYPES[dtype]
        self._model = empty_model(config)
        self._device = device
        self.shapes = learned(self._model)
        self.tied: dict[str, str] = dict(self._model.all_tied_weights_keys or {})

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the host's memory."""
        return self._drawn(name).cpu()

    def model(self) -> Any:
        """The stock model with these weights, unprotected, where they are drawn."""
        model = empty_model(self.config)
        model.load_state_dict({name: self._drawn(name) for name in self.shapes}, strict=False, assign=True)
        model.tie_weights()
        return model.eval().to(self._device)

    def _drawn(self, name: str) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return drawn(self._model, name, self.shapes[name], generator).to(self.dtype)


def write_export(source: RandomSource, out: Path, dtype: FloatName) -> None:
    """Writes OUT/cloud and OUT/device of a decoder."""
    read: Any = source  # the rest of a Source is asked for by what is left out here
    family, key_id = family_of(source.config), new_key_id()
    plan = plan_cloud(read, family, "cloud")
    scheme = draw("permutation", used_structures(family.spaces(source.config), plan))
    cloud, device = out / "cloud", out / "device"
    cloud.mkdir(parents=True)
    device.mkdir(mode=0o700)
    write_cloud(read, family, scheme, plan, source.dtype, cloud, key_id, SHARD)
    common: dict[str, Any] = {"key_id": key_id, "served_name": "random", "scheme": scheme.name, "dtype": dtype}
    write_manifest(CloudManifest(**common, files=_entries(cloud), absent=plan.absent), cloud)
    key = scheme.user_key(key_id)
    key.save(device / "key.safetensors")
    assert family.embedding is not None
    np.save(device / EMBEDDING, source.read(family.embedding).float().numpy())
    manifest = DeviceManifest(
        **common,
        files=_entries(device),
        family=family.name,
        hidden_size=key.hidden_size,
        vocab_size=key.vocab_size,
        context=source.config.max_position_embeddings,
        tokenizer="none",
        tokenizer_proof="the benchmark asks with ids",
        prefix_ids=[],
        end_ids=[],
        hidden_ids=[],
        special_tokens={},
        check={},
    )
    write_manifest(manifest, device)


def _entries(folder: Path) -> dict[str, Any]:
    return {path.name: file_entry(path) for path in sorted(folder.iterdir())}
