"""The device: embeds, hides, asks the cloud, reveals and samples. Needs neither torch nor transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from device_app.answer import Answer, Stats
    from device_app.assistant import Assistant
    from device_app.async_assistant import AsyncAnswer, AsyncAssistant
    from device_app.encoder import Encoder, Prediction
    from device_app.sampler import Sampling

__all__ = [
    "Answer",
    "Assistant",
    "AsyncAnswer",
    "AsyncAssistant",
    "Encoder",
    "Prediction",
    "Sampling",
    "Stats",
]

_MODULES = {
    "Answer": "answer",
    "Assistant": "assistant",
    "AsyncAnswer": "async_assistant",
    "AsyncAssistant": "async_assistant",
    "Encoder": "encoder",
    "Prediction": "encoder",
    "Sampling": "sampler",
    "Stats": "answer",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and that alone: the command line starts sooner (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
