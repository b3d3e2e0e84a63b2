"""The cloud's half of an export: a stock checkpoint in secret coordinates, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from export.families import Family
from export.original import stored_name
from export.progress import bar, listed
from export.scheme import Head, Scheme
from export.shards import TensorPlan, plan_shards, write_index, write_shard
from export.source import Source
from export.spaces import Axis, Dropped, Each, Features, OnDevice, Structure, of_each, spaces_of
from export.stock import empty_model
from shared.errors import FamilyError


@dataclass(frozen=True)
class CloudPlan:
    """Which tensors the cloud gets and which it does not."""

    axes: dict[str, tuple[Axis, ...]]  # of every tensor that is written in secret coordinates
    stored: dict[str, str]  # their names in the source
    zeros: dict[str, tuple[int, ...]]  # tensors whose part devices do, and their shapes
    absent: list[str]  # tensors of the stock model that are not written, as devices have them


def plan_cloud(source: Source, family: Family, head: Head) -> CloudPlan:
    """Decides over every tensor of the source and of the stock model. Raises FamilyError for one that no row names, and
    for one that the stock model needs and the source lacks."""
    stock = {name: tuple(tensor.shape) for name, tensor in empty_model(source.config).state_dict().items()}
    kept_back = [family.embedding, family.classifier if head == "device" else None]
    plan = CloudPlan({}, {}, {}, [])
    missing: list[str] = []
    for name in sorted(stock.keys() | source.shapes.keys()):
        row = family.axes(name)
        if isinstance(row, Dropped):
            continue
        if name in kept_back or (isinstance(row, OnDevice) and not row.zeros):
            plan.absent.append(name)
        elif isinstance(row, OnDevice):
            plan.zeros[name] = stock[name]
        elif (held := stored_name(source, family, name)) is None:
            (plan.absent if name.startswith(family.optional) else missing).append(name)
        else:
            plan.axes[name], plan.stored[name] = row, held
    if family.embedding is not None and stored_name(source, family, family.embedding) is None:
        missing.insert(0, family.embedding)
    if missing:
        raise FamilyError(f"tensors missing from the source: {listed(missing)}", hint="is the checkpoint complete?")
    return plan


def used_structures(structures: Iterable[Structure], plan: CloudPlan) -> list[Structure]:
    """The structures to draw secrets for: a space that no written tensor has hides nothing, and must not count as part
    of the key space."""
    structures = list(structures)
    sizes = {structure.name: structure.size for structure in structures if isinstance(structure, Features)}
    used: set[str] = set()
    for axes in plan.axes.values():
        rows = of_each(axes, sizes[axes[0].space]) if isinstance(axes[0], Each) else [axes]
        used.update(space for row in (axes, *rows) for axis in row for space in spaces_of(axis))
    return [structure for structure in structures if used & {str(name) for name in vars(structure).values()}]


def write_cloud(
    source: Source,
    family: Family,
    scheme: Scheme,
    plan: CloudPlan,
    dtype: torch.dtype,
    folder: Path,
    key_id: str,
    shard_bytes: int,
) -> None:
    """Writes the transformed checkpoint and its config."""
    shapes = {name: source.shapes[stored] for name, stored in plan.stored.items()} | plan.zeros
    plans = [TensorPlan(name, shapes[name], dtype) for name in sorted(shapes)]
    shards = plan_shards(plans, shard_bytes)
    progress = bar(plans, "transforming")

    def transformed() -> Iterator[tuple[str, torch.Tensor]]:
        for one in progress:
            if one.name in plan.zeros:
                yield one.name, torch.zeros(one.shape, dtype=dtype)
                continue
            tensor = source.read(plan.stored[one.name])
            yield one.name, scheme.act(one.name, tensor, plan.axes[one.name], source.read).to(dtype)

    tensors = transformed()
    for file, planned in shards.items():
        part = (next(tensors) for _ in planned)
        write_shard(folder / file, planned, part, {"key_id": key_id, "file": file})
    next(progress, None)  # lets the bar finish
    write_index(folder, shards)
    write_config(source.config, family, plan, dtype, folder)


def unmoved(scheme: Scheme, plan: CloudPlan) -> dict[str, str]:
    """The tensors that a scheme leaves as they were, and why."""
    return {name: reason for name, axes in plan.axes.items() if (reason := scheme.unmoved(axes))}


def write_config(config: PretrainedConfig, family: Family, plan: CloudPlan, dtype: torch.dtype, folder: Path) -> None:
    """Writes the cloud's config.json."""
    kept = cloud_config(config, family, dtype)
    if family.classifier is None or family.classifier in plan.absent:
        # Its true width would tell the base model, and make the stock class allocate tables that nothing needs.
        kept["vocab_size"] = 1
    (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n")


def cloud_config(config: PretrainedConfig, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """The stock architecture's own settings and nothing else: no names, no paths, no token ids, no labels."""
    kept = _settings(config) | {
        "architectures": config.architectures,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "model_type": config.model_type,
    }
    if family.kind in ("encoder", "image-encoder"):
        kept["num_labels"] = config.num_labels
    return kept | dict(family.settings or {})


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    known = {*type(config)().to_dict(), "head_dim"}  # which Qwen3-MoE's config has only where it is given
    kept: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        part = getattr(config, key, None)
        if isinstance(part, PretrainedConfig):  # of one of several models in one
            kept[key] = _settings(part) | {"model_type": part.model_type, "tie_word_embeddings": False}
        elif (
            key in known
            and not key.startswith("_")
            and not key.endswith(("_token_id", "_token_ids", "_token_index"))
            and "label" not in key
            and key != "extra_pos_embeddings"  # Marian's is a token id in disguise
        ):
            kept[key] = value
    # Written out as null, so that the stock class does not put its own defaults there.
    return kept | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
