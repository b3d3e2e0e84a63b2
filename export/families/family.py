"""A family: one table, and what else has to be known of an architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from optimum.utils import NormalizedConfigManager, NormalizedTextConfigWithGQA
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from export.spaces import Dropped, Each, OnDevice, Row, Structure, filled, prefixed
from shared.errors import FamilyError
from shared.manifest import Kind

Read = Callable[[str], torch.Tensor]  # a tensor of the original, by name


@dataclass(frozen=True)
class TextInput:
    """How the stock model embeds token ids: table[ids] · scale + positions."""

    table: str  # name of the token table [vocab, hidden]
    scale: Callable[[Any], float] = lambda config: 1.0
    # Positions [context, hidden], with whatever else every token gets; None where the cloud's layers know positions.
    positions: Callable[[Any, Read], torch.Tensor] | None = None


@dataclass(frozen=True)
class ImageInput:
    """How the stock model embeds pixels: a convolution over patches, a class token before them, positions."""

    config: Callable[[Any], Any]  # the part of the model's config that is about images
    patches: str  # weight of the convolution [width, 3, patch, patch]
    bias: str | None
    class_token: str
    positions: str
    tower: str  # module that embeds and encodes


@dataclass(frozen=True)
class Family:
    """One table: which architectures it covers, their tensors' axes, and the structure of their spaces."""

    name: str
    model_types: tuple[str, ...]
    kind: Kind
    # Class named in a config → class that is served: the same, or one with less on top of it.
    classes: Mapping[str, str]
    tensors: Mapping[str, Row]
    structures: Callable[[PretrainedConfig], Iterable[Structure]]
    text: TextInput | None = None
    image: ImageInput | None = None
    classifier: str | None = None  # the matrix that gives logits over `vocab`
    prefix: str = ""  # names may begin with it: a model inside one with a head
    optional: tuple[str, ...] = ()  # names that begin so may be missing: masked language models have no pooler
    unsupported: Callable[[PretrainedConfig], str | None] = lambda config: None  # why a config does not fit the table
    settings: Mapping[str, Any] | None = None  # of the config that differ in the cloud, as devices do that part
    computed: Mapping[str, Callable[[Any], torch.Tensor]] | None = None  # parameters that no checkpoint stores
    tried: str = "random weights"  # what the whole system was proven on, beside random weights of every class

    @property
    def embedding(self) -> str | None:
        """Name of the token table, which goes to devices alone."""
        return None if self.text is None else self.text.table

    @cached_property
    def routes(self) -> bool:
        """Whether a router chooses experts: where two are nearly as good, rounding alone may change the choice."""
        return any(isinstance(row, tuple) and isinstance(row[0], Each) for row in self.tensors.values())

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Row]]:
        # {i}: a layer's number. {*}: anything.
        return [
            (re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{\*\}", ".+")), row)
            for name, row in self.tensors.items()
        ]

    def axes(self, tensor: str) -> Row:
        """The space of each axis of `tensor`, layer numbers filled in. Raises FamilyError for a tensor in no row."""
        bare = tensor.removeprefix(self.prefix)
        for pattern, row in self._patterns:
            if match := pattern.fullmatch(bare):
                if isinstance(row, Dropped | OnDevice):
                    return row
                row = filled(row, i=match.groupdict().get("i") or "")
                return row if bare == tensor else prefixed(row, self.prefix)
        raise FamilyError(
            f"tensor {tensor!r} is named by no row of the {self.name} table; nothing is passed through untransformed",
            hint="the architecture differs from the stock one; its table in export/families needs a row",
        )

    def spaces(self, config: PretrainedConfig) -> list[Structure]:
        """Every structure of a model."""
        return list(self.structures(config))

    def served_class(self, config: PretrainedConfig) -> str:
        """The class of transformers that the cloud runs. Raises FamilyError naming it and what is supported."""
        usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, next(iter(self.classes)))
        named = (config.architectures or [usual])[0]
        if named not in self.classes:
            supported = ", ".join(self.classes)
            raise FamilyError(
                f"architecture {config.model_type!r}: seen the class {named!r}, wanted one of: {supported}",
                hint="its head has no row in the table: export the model without it, or add rows",
            )
        return self.classes[named]


def longest(config: Any) -> int:
    """Positions of a decoder's text that the cloud computes as the stock model does.

    LongRoPE (Phi-3, 128k) takes other frequencies once a text is longer than the original context, for all of its
    positions: keys that are cached would have the wrong ones. So such a model has its original context here.
    """
    text = config.get_text_config()
    original = [one["original_max_position_embeddings"] for one in _rotations(text) if one["rope_type"] == "longrope"]
    return int(min([text.max_position_embeddings, *original]))


def _rotations(config: Any) -> list[Any]:
    """The settings of rotary positions: one for all layers, or one for each type of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    each = [settings] if "rope_type" in settings else [one for one in settings.values() if isinstance(one, dict)]
    return [{"original_max_position_embeddings": config.max_position_embeddings} | one for one in each]


def unsupported_rotation(config: Any) -> str | None:
    """Why the cloud could not compute a model's rotary positions as the stock model does."""
    if any(one["rope_type"] == "dynamic" for one in _rotations(config.get_text_config())):
        return "rope_type: seen 'dynamic', whose frequencies depend on the length so far, wanted fixed ones"
    return None


def normalized(config: PretrainedConfig) -> Any:
    """Sizes under the same names for every architecture (num_layers, hidden_size, …)."""
    try:
        return NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:  # younger than the library's list
        return NormalizedTextConfigWithGQA(config)
