"""Between the arrays of the wire and torch's tensors."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from shared.wire import DTYPES, Array, FloatName

TORCH_DTYPES: dict[FloatName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def finite(values: torch.Tensor) -> torch.Tensor:
    """The same values. Raises ArithmeticError where one of them is not finite."""
    if not torch.isfinite(values).all():
        raise ArithmeticError("the model computed values that are not finite")
    return values


def to_torch(array: Array) -> torch.Tensor:
    """The same values as a tensor, in the same memory (numpy's bfloat16 is not torch's)."""
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_device(array: Array, device: torch.device) -> torch.Tensor:
    """The same values as a tensor of a device, in the same memory where that is the host's; else the copy does not wait
    for what the GPU computes."""
    tensor = to_torch(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same values in the host's memory, waiting for a GPU once for all of them."""
    if not tensors or tensors[0].device.type != "cuda":
        return list(tensors)
    copies = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True) for one in tensors]
    torch.cuda.current_stream().synchronize()
    return copies


def to_numpy(tensor: torch.Tensor) -> Array:
    """The same values as an array."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return tensor.numpy()


def device_of(model: Any) -> Literal["cpu", "cuda"]:
    """Where a stock model computes."""
    return "cuda" if model.device.type == "cuda" else "cpu"
