"""The model as it was, by the names of the stock model's tensors."""

from __future__ import annotations

import torch

from export.families import Family, Read
from export.scheme import Scheme
from export.source import Source


def original(source: Source, family: Family, dtype: torch.dtype) -> Read:
    """Reads the stock model's tensors, rounded to `dtype`: shared and computed ones too, which no checkpoint stores."""

    def read(name: str) -> torch.Tensor:
        stored = stored_name(source, family, name)
        if stored is None:
            return (family.computed or {})[name](source.config)
        return source.read(stored).to(dtype)

    return read


def has_pooler(source: Source) -> bool:
    """Whether the checkpoint can give pooled vectors, as not every encoder's can."""
    return any(name.split(".")[-3:-2] == ["pooler"] for name in source.shapes)


def stored_name(source: Source, family: Family, name: str) -> str | None:
    """The name under which the source holds a tensor: its own, with the family's prefix or not, or that of the one it
    is tied to."""
    while name not in source.shapes and name in source.tied:
        name = source.tied[name]
    return next((known for known in (name, family.prefix + name) if known in source.shapes), None)


def folded_gain(source: Source, family: Family, scheme: Scheme) -> torch.Tensor | None:
    """The last norm's gain [hidden_size] in float32, where the scheme took it out of the norm."""
    assert family.classifier is not None
    axes = family.axes(family.classifier)
    assert isinstance(axes, tuple)
    axis = scheme.folded(axes)
    return None if axis is None else source.read(axis.gain).float() + axis.offset
