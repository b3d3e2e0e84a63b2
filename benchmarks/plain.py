"""The unprotected side of every comparison: the original model, from the same source the exporter reads."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from examples.smollm2 import smollm2_gguf
from export.source import Source, open_source

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain_model(source: Source, dtype: torch.dtype) -> Any:
    """The stock model with the source's weights."""
    model = AutoModelForCausalLM.from_config(source.config, dtype=dtype, attn_implementation="sdpa")
    weights = {name: source.read(name).to(dtype) for name in source.shapes}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def smollm2_source() -> Source:
    """SmolLM2-135M-Instruct."""
    return open_source(str(smollm2_gguf()))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), model)
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
