"""The stock model of transformers without its weights: its class, its tensors, and how checkpoints name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from shared.errors import SourceError


def empty_model(config: PretrainedConfig) -> Any:
    """The model of the class that `config` names: parameters without storage, real buffers (rotary frequencies)."""
    stock = getattr(transformers, config.architectures[0])
    with init_empty_weights(include_buffers=False):
        return stock._from_config(config).eval()


@dataclass(frozen=True)
class _Parts:
    """Stored tensors that make up one of the stock model's."""

    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    converter: WeightConverter | None = None


class StockNames:
    """A checkpoint's tensors under the stock model's own names, made as transformers makes them when it loads.

    Old names become new ones, prefixes come and go, and experts stored one by one are stacked.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], torch.Tensor],
    ) -> None:
        """shapes, read: of the stored tensors, by their stored names."""
        self._read = read
        self._model = model = empty_model(config)
        stock: dict[str, torch.Tensor] = model.state_dict()
        self.known = frozenset(stock)  # names of the stock model's tensors
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._parts = _matched(model, stock, shapes)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(stock[name].shape) if parts.converter else shapes[parts.names[0]]
            for name, parts in self._parts.items()
        }

    def stored(self, name: str) -> list[str]:
        """The stored tensors that make up one of the stock model's."""
        return self._parts[name].names

    def read(self, name: str) -> torch.Tensor:
        """One tensor, shape `shapes[name]`."""
        parts = self._parts[name]
        if parts.converter is None:
            return self._read(parts.names[0])
        converter = deepcopy(parts.converter)
        for stored, pattern in zip(parts.names, parts.patterns, strict=True):
            converter.add_tensor(name, stored, pattern, self._read(stored))
        made = converter.convert(name, model=self._model, config=self._model.config)[name]
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor


def _matched(model: Any, stock: Mapping[str, Any], stored: Iterable[str]) -> dict[str, _Parts]:
    """The stored names behind every name of the stock model; names that it does not know stand for themselves."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    matched: dict[str, _Parts] = {}
    for name in sorted(stored, key=dot_natural_key):  # experts by number
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, stock)
        if renamed not in stock and name in stock:
            renamed, pattern = name, None
        if pattern is None:
            parts = matched.setdefault(renamed, _Parts())
        else:
            converter = by_pattern[pattern]
            if len(converter.target_patterns) > 1:
                raise SourceError(f"tensor {name!r}: the stock model has several in its place, wanted at most one")
            parts = matched.setdefault(renamed, _Parts(converter=converter))
        if parts.names and parts.converter is None:
            raise SourceError(f"tensor {renamed!r}: stored twice, as {parts.names[0]!r} and {name!r}")
        parts.names.append(name)
        parts.patterns.append(pattern or name)
    return matched
