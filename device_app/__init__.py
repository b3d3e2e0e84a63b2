"""The device: embeds, hides, asks the cloud, reveals and samples. Needs neither torch nor transformers."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from device_app.answer import Answer, Stats
    from device_app.assistant import Assistant
    from device_app.async_assistant import AsyncAnswer, AsyncAssistant
    from device_app.drafting import Drafting
    from device_app.encoder import Encoder, Prediction
    from device_app.sampler import Sampling

__all__ = [
    "Answer",
    "Assistant",
    "AsyncAnswer",
    "AsyncAssistant",
    "Drafting",
    "Encoder",
    "Prediction",
    "Sampling",
    "Stats",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and that alone: the command line starts sooner (PEP 562)."""
    module: ModuleType
    if name in ("Answer", "Stats"):
        from device_app import answer as module
    elif name == "Assistant":
        from device_app import assistant as module
    elif name in ("AsyncAnswer", "AsyncAssistant"):
        from device_app import async_assistant as module
    elif name == "Drafting":
        from device_app import drafting as module
    elif name in ("Encoder", "Prediction"):
        from device_app import encoder as module
    elif name == "Sampling":
        from device_app import sampler as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
