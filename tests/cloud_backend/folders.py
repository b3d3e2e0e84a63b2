"""Cloud folders of tiny stock models, as an export leaves them but for the key: plain, which a cloud cannot tell."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.manifest import CloudManifest, Kind, file_entry, write_manifest
from tests.checkpoints import randomise


def randomised(model: Any, seed: int = 0) -> Any:
    """The model with every parameter and every buffer of a checkpoint drawn anew."""
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    stored = model.state_dict()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model.eval()


def save_cloud(
    model: Any,
    out: Path,
    kind: Kind,
    *,
    absent: Collection[str],
    zero: Collection[str] = (),
    left_out: Collection[str] = (),
    **config: Any,
) -> Path:
    """Writes OUT/cloud, and gives OUT.

    absent: tensors that the device has instead. zero: tensors of which the cloud has zeros, as the device adds the
    true ones. left_out: tensors that are missing though the manifest does not say so. config: what config.json says
    otherwise.
    """
    folder = out / "cloud"
    folder.mkdir(parents=True)
    state = model.state_dict()
    assert {*absent, *zero, *left_out} <= set(state)
    tensors = {
        name: torch.zeros_like(tensor) if name in zero else tensor.clone()
        for name, tensor in state.items()
        if name not in absent and name not in left_out
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed = type(model.config).from_dict(model.config.to_dict() | {"architectures": [type(model).__name__]} | config)
    changed.save_pretrained(folder)
    files = {path.name: file_entry(path) for path in folder.iterdir()}
    manifest = CloudManifest(
        kind=kind,
        absent=sorted(absent),
        key_id="key",
        served_name=out.name,
        scheme="permutation",
        dtype="float32",
        files=files,
    )
    write_manifest(manifest, folder)
    return out
