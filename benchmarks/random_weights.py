"""Checkpoints at real shapes whose every tensor is random, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from export.shards import TensorPlan, plan_shards, write_index, write_shard
from export.stock import empty_model

SHARD = 500 * 2**20


def write_random(config: Any, folder: Path) -> None:
    """A checkpoint of the stock class that `config` names, in float32, without a tokenizer."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    model = empty_model(config)
    shards = plan_shards((TensorPlan(name, shape, torch.float32) for name, shape in learned(model).items()), SHARD)
    generator = torch.Generator().manual_seed(0)

    def tensors(plans: list[TensorPlan]) -> Iterator[tuple[str, torch.Tensor]]:
        for plan in plans:
            yield plan.name, drawn(model, plan.name, plan.shape, generator)

    for file, plans in shards.items():
        write_shard(folder / file, plans, tensors(plans), {})
    write_index(folder, shards)


def drawn(model: Any, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A tensor of the model, in float32 and where the generator is.

    Biases and gains are drawn too: fresh models have zeros and ones there, which hide what is forgotten. Rows of
    matrices have a length of about 1, so that activations stay in range through any number of layers.
    """
    module, _, own = name.rpartition(".")
    gain = own == "weight" and "Norm" in type(model.get_submodule(module)).__name__
    scale = 0.3 if len(shape) == 1 else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator, device=generator.device) * scale + float(gain)


def learned(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of all that a checkpoint of the model stores: what it computes and what is tied to another is not."""
    computed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    left_out = computed | set(model.all_tied_weights_keys or {})
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in left_out and tensor.is_floating_point()
    }
