"""The cloud's half of an export as one GGUF file, which llama.cpp runs: what the file is going to hold.

It holds the same values as the stock checkpoint, in the types that it was asked for. Quantised ones are those of the
original, quantised, or of the source's own blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from transformers.core_model_loading import dot_natural_key

from export.cloud_half import CloudPlan
from export.families import Family, Read
from export.gguf.blocks import levels, merged
from export.gguf.file import FLOATS, GgufFile, Tensor, block, rounded
from export.gguf.layout import CLASSIFIER, FREQUENCIES, TOKEN_TABLE, Form, Forms
from export.gguf.settings import frequency_factors, settings
from export.original import original
from export.scheme import SchemeName
from export.source import GgufSource, Source
from export.spaces import Axis, Each, of_each, spaces_of
from shared.errors import FamilyError, SourceError

GgufName = Literal["f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "source"]
GGUF_FILE = "model.gguf"
KEY_ID = "stip.key_id"
QUANTISATION_VERSION = 2  # of the quantised types' layouts
_SMALL = (Kind.Q4_0, Kind.F16)  # types for zeros, the smaller one first


@dataclass(frozen=True)
class GgufPlan:
    """What the file is going to hold."""

    quantisation: str  # what its matrices are stored as, mostly
    forms: Mapping[str, Form]  # of the stock model's tensors that are written, in the file's order
    stock_shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor]  # of the file
    zeros: frozenset[str]  # which of these are zeros, as devices do that part
    computed: Mapping[str, torch.Tensor]  # which of these follow from the config
    metadata: Mapping[str, object]
    source: GgufFile | None  # whose blocks are moved; None where values are stored anew
    origins: Mapping[str, str]  # of the file's tensors: which of the source's they are made of
    unquantised: list[str]  # the stock model's matrices whose columns are not whole blocks, so that they are in float32

    @property
    def dtype(self) -> torch.dtype:
        """The one in which values are rounded, if any are: of floats the matrices', else float32."""
        return {"f16": torch.float16, "bf16": torch.bfloat16}.get(self.quantisation, torch.float32)

    def blocks(self, plan: CloudPlan) -> dict[str, tuple[int, ...]]:
        """The blocks that the order of a space must keep together, largest first, where there are any."""
        return blocks_of(self.forms, self.tensors, plan.axes, self.stock_shapes)

    def original(self, source: Source, family: Family, dtype: torch.dtype) -> Read:
        """Reads the original with the values that this half stores, and in `dtype` what devices have."""
        plain, on_devices = original(source, family, torch.float32), original(source, family, dtype)

        def read(name: str) -> torch.Tensor:
            form = self.forms.get(name)
            if form is None or any(part in self.zeros for part in form.names):
                return on_devices(name)
            if self.source is not None:
                return plain(name)
            parts = zip(form.stored(plain(name)), (self.tensors[part].kind for part in form.names), strict=True)
            return form.stock([rounded(part, kind) for part, kind in parts]).float()

        return read


def plan_gguf(
    source: Source, family: Family, plan: CloudPlan, wanted: GgufName, scheme: SchemeName, key_id: str
) -> GgufPlan:
    """Decides what each tensor of the file is. Raises FamilyError for an architecture, a config, a tensor or a scheme
    that does not go into such a file, and SourceError where `wanted` is source and the source has no blocks."""
    _check_wanted(source, wanted, scheme)
    moved = source if wanted == "source" and isinstance(source, GgufSource) else None
    form, config = Forms(source.config), source.config
    shapes = {name: tuple(source.shapes[stored]) for name, stored in plan.stored.items()} | plan.zeros
    forms = {name: form(name) for name in sorted(shapes, key=dot_natural_key)}
    classifier = shapes.get(family.classifier or "", (1, config.hidden_size))
    kept, factors = settings(config, classifier[0]), frequency_factors(config)
    tensors = {TOKEN_TABLE: Tensor(classifier, _small(classifier[1]))}
    if factors is not None:
        tensors[FREQUENCIES] = Tensor(tuple(factors.shape), Kind.F32)
    zeros, origins, unquantised = {TOKEN_TABLE}, dict[str, str](), list[str]()
    for name, one in forms.items():
        for number, (part, shape) in enumerate(zip(one.names, one.shapes(shapes[name]), strict=True)):
            if name in plan.zeros:
                zeros.add(part)
                kind = _small(shape[-1])
            elif moved is not None:
                origins[part] = moved.forms[plan.stored[name]].names[number]
                kind = moved.file.tensors[origins[part]].kind
            else:
                asked = _asked(part, shape, Kind[wanted.upper()])
                kind = asked if shape[-1] % block(asked) == 0 else Kind.F32
                if kind is not asked and name not in unquantised:
                    unquantised.append(name)
            tensors[part] = Tensor(shape, kind)
    made = Kind[wanted.upper()] if moved is None else _most(tensors, zeros)
    _check_made(made, moved, config.hidden_size)
    metadata = {f"{form.layout.name}.{key}": value for key, value in kept.items()} | {
        "general.file_type": _file_type(made, moved),
        "general.quantization_version": QUANTISATION_VERSION,
        "tokenizer.ggml.model": "none",
        KEY_ID: key_id,
    }
    return GgufPlan(
        quantisation=made.name.lower(),
        forms=forms,
        stock_shapes=shapes,
        tensors=tensors,
        zeros=frozenset(zeros),
        computed={} if factors is None else {FREQUENCIES: factors},
        metadata=metadata,
        source=None if moved is None else moved.file,
        origins=origins,
        unquantised=unquantised,
    )


def _check_wanted(source: Source, wanted: GgufName, scheme: SchemeName) -> None:
    """Raises SourceError, FamilyError."""
    if wanted == "source" and not isinstance(source, GgufSource):
        raise SourceError(
            "--gguf source: seen a model of safetensors, wanted a quantised .gguf file", hint="--gguf q8_0, or another"
        )
    if scheme != "permutation" and wanted not in ("f32", "f16", "bf16"):
        raise FamilyError(
            f"--gguf {wanted}: seen the scheme {scheme}, wanted permutation: quantised values can be moved, not mixed",
            hint="--scheme permutation, or --gguf f16",
        )


def _check_made(made: Kind, moved: GgufSource | None, hidden_size: int) -> None:
    """Raises SourceError for a source whose blocks should be moved and that has none, FamilyError for a stream that is
    not of whole blocks."""
    if moved is not None and made in FLOATS:
        raise SourceError(
            f"{moved.path}: its tensors are {made.name}, wanted a quantised file for --gguf source",
            hint=f"--gguf {made.name.lower()}",
        )
    if hidden_size % block(made):
        raise FamilyError(
            f"hidden size: seen {hidden_size}, wanted a multiple of {block(made)}, the values in a {made.name} block",
            hint="--gguf f16",
        )


def _small(columns: int) -> Kind:
    return next(kind for kind in _SMALL if columns % block(kind) == 0)


def _asked(part: str, shape: tuple[int, ...], wanted: Kind) -> Kind:
    """What a tensor should be: norms, biases and routers are few values, and llama.cpp wants them in float32."""
    if len(shape) < 2 or "ffn_gate_inp" in part:
        return Kind.F32
    return Kind.Q8_0 if wanted not in FLOATS and part == CLASSIFIER else wanted


def _most(tensors: Mapping[str, Tensor], zeros: set[str]) -> Kind:
    """The type of most values."""
    counts: Counter[Kind] = Counter()
    for name, tensor in tensors.items():
        if name not in zeros:
            counts[tensor.kind] += torch.Size(tensor.shape).numel()
    return counts.most_common(1)[0][0]


def _file_type(made: Kind, source: GgufSource | None) -> int:
    if source is not None:
        return int(source.file.metadata.get("general.file_type", gguf.LlamaFileType.GUESSED))
    if made is Kind.F32:
        return int(gguf.LlamaFileType.ALL_F32)
    return int(gguf.LlamaFileType[f"MOSTLY_{made.name}"])


def blocks_of(
    forms: Mapping[str, Form],
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, tuple[Axis, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Which blocks the order of a space keeps together, largest first, where the stock model's tensors `axes` are
    stored as `tensors`."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for name in forms.keys() & axes.keys():
        for part in forms[name].names:
            if sizes := levels(tensors[part].kind):
                for space in _inputs(name, axes[name], forms[name], shapes[name]):
                    found.setdefault(space, []).append(sizes)
    return {space: merged(*sizes) for space, sizes in found.items()}


def _inputs(name: str, axes: tuple[Axis, ...], form: Form, shape: tuple[int, ...]) -> Iterator[str]:
    """The spaces of the axis along which llama.cpp stores a tensor's blocks: that of its inputs."""
    rows = list(of_each(axes, shape[0])) if isinstance(axes[0], Each) else [axes]
    for row in rows:
        spaces = spaces_of(row[0] if form.transposed else row[-1])
        if len(spaces) > 1:
            raise FamilyError(f"tensor {name!r}: its blocks are of several spaces: {', '.join(spaces)}")
        yield from spaces
