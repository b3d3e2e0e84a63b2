"""Runs a stock model whose parameters are read when a module needs them and dropped right after.

Memory is the largest tensor, not the model; the architecture is the stock one, so any family works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig

from export.stock import empty_model


@torch.inference_mode()
def streamed(
    config: PretrainedConfig, read: Callable[[str], torch.Tensor], forward: Callable[[Any], torch.Tensor]
) -> npt.NDArray[np.float32]:
    """What `forward` makes of the stock model in float32; `read(name)` gives a tensor of it."""
    model = empty_model(config)
    stored = model.state_dict().keys()
    # Values are put where parameters of the same shape were before: freeing and allocating large tensors between
    # small ones leaves the heap many times their size.
    places: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def load(module_name: str, own: dict[str, torch.Size]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, _: object) -> None:
            for name, shape in own.items():
                if (name, shape) not in places:
                    places[name, shape] = torch.empty(shape)
                places[name, shape].copy_(read(f"{module_name}.{name}"))
                module.register_parameter(name, torch.nn.Parameter(places[name, shape], requires_grad=False))

        return hook

    def drop(own: dict[str, torch.Size]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, _: object, __: object) -> None:
            for name, shape in own.items():
                empty = torch.empty(shape, device="meta")
                module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))

        return hook

    for module_name, module in model.named_modules():
        own = {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}
        if own and module_name:
            module.register_forward_pre_hook(load(module_name, own))
            module.register_forward_hook(drop(own))
        for name, buffer in module.named_buffers(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if full in stored:
                buffer.copy_(read(full))
    result: npt.NDArray[np.float32] = forward(model).numpy()
    places.clear()
    return result
