"""Runs a stock model whose parameters are read when a module needs them and dropped right after.

Memory is the largest tensor, not the model; the architecture is the stock one, so any family works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig


def empty_model(config: PretrainedConfig) -> Any:
    """The stock model with parameters of no storage, and real buffers (rotary frequencies)."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config).eval()


def streamed_logits(
    config: PretrainedConfig, read: Callable[[str], torch.Tensor], **inputs: torch.Tensor
) -> npt.NDArray[np.float32]:
    """Logits [sequences, positions, vocab_size] of the stock model in float32; `read(name)` gives a parameter."""
    return _streamed(config, read, lambda model: model(**inputs).logits)


def streamed_hidden(
    config: PretrainedConfig, read: Callable[[str], torch.Tensor], **inputs: torch.Tensor
) -> npt.NDArray[np.float32]:
    """What the classifier would be given [sequences, positions, hidden_size]; the classifier itself is not read."""
    return _streamed(config, read, lambda model: model.get_decoder()(**inputs).last_hidden_state)


@torch.inference_mode()
def _streamed(
    config: PretrainedConfig, read: Callable[[str], torch.Tensor], forward: Callable[[Any], torch.Tensor]
) -> npt.NDArray[np.float32]:
    """What `forward` makes of the stock model."""
    model = empty_model(config)
    # Values are put where parameters of the same shape were before: freeing and allocating large tensors between
    # small ones leaves the heap many times their size.
    places: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def load(module_name: str, own: list[str]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, _: object) -> None:
            for name in own:
                place = (name, module.get_parameter(name).shape)
                if place not in places:
                    places[place] = torch.empty(place[1])
                places[place].copy_(read(f"{module_name}.{name}"))
                module.register_parameter(name, torch.nn.Parameter(places[place], requires_grad=False))

        return hook

    def drop(own: list[str]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, _: object, __: object) -> None:
            for name in own:
                empty = torch.empty(module.get_parameter(name).shape, device="meta")
                module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))

        return hook

    for module_name, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own:
            module.register_forward_pre_hook(load(module_name, own))
            module.register_forward_hook(drop(own))
    result: npt.NDArray[np.float32] = forward(model).numpy()
    places.clear()
    return result
