"""Families: for every tensor of an architecture, the space in which each of its axes lives. A file a kind of model."""

from __future__ import annotations

from transformers import PretrainedConfig

from export.families.decoders import GEMMA, GEMMA2, GPT2, LLAMA, OPT, PHI, PHI3
from export.families.encoders import BERT, DISTILBERT, ROBERTA
from export.families.experts import MIXTRAL, QWEN_MOE
from export.families.family import Family, ImageInput, Read, TextInput, longest, normalized, unsupported_rotation
from export.families.translation import MARIAN
from export.families.vision import LLAVA, VIT
from export.progress import listed
from shared.errors import FamilyError

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    GEMMA,
    GEMMA2,
    PHI,
    PHI3,
    GPT2,
    OPT,
    MIXTRAL,
    QWEN_MOE,
    BERT,
    ROBERTA,
    DISTILBERT,
    VIT,
    LLAVA,
    MARIAN,
)

__all__ = ["FAMILIES", "LLAMA", "Family", "ImageInput", "Read", "TextInput", "family_of", "longest", "normalized"]


def family_of(config: PretrainedConfig) -> Family:
    """The table for a config. Raises FamilyError naming the architecture and what is supported, or what of the config
    does not fit its table."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            if reason := family.unsupported(config) or unsupported_rotation(config):
                raise FamilyError(f"architecture {config.model_type!r}: {reason}")
            return family
    supported = listed((name for family in FAMILIES for name in family.model_types), most=40)
    raise FamilyError(
        f"architecture {config.model_type!r} is in no table; supported: {supported}",
        hint="a family is a table from tensor name to the space of each axis: see export/families",
    )
