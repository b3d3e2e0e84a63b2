"""Runs a stock model whose parameters are read when a module needs them and dropped right after.

Memory is the largest tensor, not the model; the architecture is the stock one, so any family works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig


def empty_model(config: PretrainedConfig) -> Any:
    """The stock model with parameters of no storage, and real buffers (rotary frequencies)."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config).eval()


def stream_parameters(model: torch.nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Makes each module read its own parameters, in float32, before it runs and drop them after.

    `read(name)` gives a parameter by its name in the model.
    """
    for module_name, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own:
            module.register_forward_pre_hook(_loader(module_name, own, read))
            module.register_forward_hook(_dropper(own))


def _loader(module_name: str, own: list[str], read: Callable[[str], torch.Tensor]) -> Callable[..., None]:
    def load(module: torch.nn.Module, _: object) -> None:
        for name in own:
            values = read(f"{module_name}.{name}").to(torch.float32)
            module.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))

    return load


def _dropper(own: list[str]) -> Callable[..., None]:
    def drop(module: torch.nn.Module, _: object, __: object) -> None:
        for name in own:
            empty = torch.empty(module.get_parameter(name).shape, device="meta")
            module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))

    return drop
