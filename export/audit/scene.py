"""What an attacker meets, what it knows, and the truth that scores it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from export.audit.corpus import NO_TEXT, Text, read_text
from export.audit.inputs import (
    NO_TOKENS,
    Images,
    Tokens,
    device_images,
    device_tokens,
    public_first_row,
    public_tokens,
)
from export.bundle import DTYPES
from export.cloud_half import plan_cloud
from export.cloud_weights import CloudWeights, GgufWeights, cloud_weights
from export.families import Family, family_of
from export.original import stored_name
from export.permutation import Levels, Permutation
from export.scheme import Read, fold
from export.source import Source, open_source
from export.spaces import Axis, Stream, Structure
from export.stock import empty_model
from shared.errors import AuditError
from shared.key import Index, UserKey
from shared.manifest import CloudManifest, DeviceManifest, read_manifest
from shared.wire import Array


@dataclass(frozen=True, eq=False)
class Weights:
    """A checkpoint: shapes of its tensors by name, and their values as float32."""

    config: PretrainedConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]

    def model(self) -> Any:
        """The stock model with these weights in float32. What the checkpoint lacks has no storage."""
        model = empty_model(self.config)
        model.load_state_dict({name: self.read(name).clone() for name in self.shapes}, strict=False, assign=True)
        return model


@dataclass(frozen=True, eq=False)
class Target:
    """A victim. An attack may use `weights`, `scheme` and `head`, which the cloud holds, and what `vectors` gives,
    which travels; `key` and `tokens` are the truth and score it."""

    scheme: str
    head: Literal["cloud", "device"]
    weights: Weights
    dtype: torch.dtype  # of what travels, and of what is stored unless that is a GGUF file
    key: UserKey
    tokens: Tokens  # the victim's own
    block: int = 0  # features of the stream that quantised weights keep together; 0 where they move freely

    def vectors(self, embeddings: Array, stream: str = "residual") -> Array:
        """What goes up for plain rows [..., width] of a stream, in the values of `dtype`, as float32."""
        hide = self.key.hide_encoder if stream == "encoder" else self.key.hide
        rounded: Array = torch.from_numpy(np.ascontiguousarray(hide(embeddings))).to(self.dtype).float().numpy()
        return rounded


@dataclass(frozen=True, eq=False)
class Scene:
    """One attack's stage."""

    target: Target
    family: Family
    tokens: Tokens  # public; of no rows where the model takes no text
    base: Weights | None  # all of the public base model, where the attacker has it, as a cloud would run it
    text: Text
    stored: Callable[[str, torch.Tensor], torch.Tensor]  # a tensor's values as the export stores them, as float32
    quantisation: str | None = None  # what most of a GGUF file's matrices are; None for safetensors
    tied: bool = False  # whether the base model's classifier is its token table
    images: Images | None = None

    def with_target(self, target: Target) -> Scene:
        """The same attacker before another victim."""
        return replace(self, target=target)

    @property
    def table(self) -> Array:
        """The public token table [vocab, hidden], float32."""
        return self.tokens.table

    @property
    def public(self) -> Weights:
        """The base model. Raises AuditError where the attacker has none."""
        if self.base is None:
            raise AuditError("no public model was given", hint="--model MODEL")
        return self.base

    @property
    def embedding(self) -> str:
        """Name of the token table. Raises AuditError for a model that takes no text."""
        if self.family.embedding is None:
            raise AuditError(f"a model of kind {self.family.kind} has no token table")
        return self.family.embedding

    @property
    def classifier(self) -> str:
        """Name of the matrix that gives logits over tokens. Raises AuditError for a model without."""
        if self.family.classifier is None:
            raise AuditError(f"a model of kind {self.family.kind} has no classifier over tokens")
        return self.family.classifier

    @property
    def classifier_row(self) -> Index:
        """The row [vocab] of the cloud's classifier that is each token's, which is secret. Raises AuditError where the
        cloud has no classifier."""
        if self.target.key.vocab is None:
            raise AuditError("the cloud has no classifier")
        return np.argsort(self.target.key.vocab)

    @property
    def text_stream(self) -> str:
        """The stream that a prompt enters: of a translator, its encoder's."""
        return "encoder" if self.family.kind == "encoder-decoder" else "residual"

    @property
    def image_stream(self) -> str:
        """The stream that an image enters."""
        return "encoder" if self.family.kind == "vision-decoder" else "residual"

    @property
    def turned(self) -> bool:
        """Whether the stream of prompts is in another basis, rather than another order: scheme and architecture, which
        the cloud knows, tell."""
        return self.target.scheme == "rotation" and self.text_stream in self.may_turn

    @cached_property
    def may_turn(self) -> set[str]:
        """The streams that a rotation turns in this architecture."""
        return may_turn(self.family.spaces(self.target.weights.config))

    def sent(self, ids: Index) -> Array:
        """The vectors that travel for token ids: see `Tokens`."""
        return self.target.vectors(self.target.tokens.embed(ids), self.text_stream)


def may_turn(structures: Iterable[Structure]) -> set[str]:
    """The streams that a rotation may turn, folding the gains of their norms."""
    return {one.name for one in structures if isinstance(one, Stream) and one.norm != "post"}


class Backwards(Permutation):
    """No protection: every space in reverse order, which anyone can undo. What a sound attack must break.

    folds: whether gains are folded into what reads them, as the scheme under attack does.
    """

    def __init__(self, structures: Iterable[Structure], *, folds: bool = False) -> None:
        structures = list(structures)
        super().__init__(structures)
        self._folding = may_turn(structures) if folds else set()

    def act(self, name: str, tensor: torch.Tensor, axes: tuple[Axis, ...], read: Read) -> torch.Tensor:
        return super().act(name, fold(tensor, axes, read, self._folding.__contains__), axes, read)

    def _order(self, size: int, levels: Levels = (), *, moves: bool = False) -> Index:
        return np.arange(size)[::-1].copy()


def open_scene(out: Path, model: str | None) -> Scene:
    """The export in `out`, before an attacker who knows `model` (hub id, folder or .gguf), or its table alone.

    Raises AuditError, BundleError, SourceError.
    """
    cloud, device = read_manifest(out / "cloud", CloudManifest), read_manifest(out / "device", DeviceManifest)
    if cloud.key_id != device.key_id:
        raise AuditError(f"{out}: its two halves are of different exports", hint="give the folder of one export")
    config = AutoConfig.from_pretrained(out / "cloud")
    family = family_of(config)
    weights = cloud_weights(out / "cloud")
    tokens, text = NO_TOKENS, NO_TEXT
    if family.text is not None:
        tokens, text = device_tokens(out / "device"), read_text(out / "device" / "tokenizer.json")
    dtype = DTYPES[device.dtype]
    target = Target(
        scheme=cloud.scheme,
        head=device.head,
        weights=Weights(config, weights.shapes, lambda name: weights.read(name).float()),
        dtype=dtype,
        key=UserKey.load(out / "device" / "key.safetensors"),
        tokens=tokens,
        block=_block(weights, family),
    )

    def stored(name: str, values: torch.Tensor) -> torch.Tensor:
        if isinstance(weights, GgufWeights) and name in weights.shapes:
            return weights.stored(name, values)
        return values.to(dtype).float()

    images = device_images(out / "device", device)
    scene = Scene(target, family, tokens, None, text, stored, cloud.quantisation, images=images)
    return scene if model is None else _with_base(scene, model)


def _block(weights: CloudWeights, family: Family) -> int:
    """How many features of the stream that prompts enter certainly lie together."""
    if not isinstance(weights, GgufWeights):
        return 0
    rows = {name: family.axes(name) for name in weights.shapes}
    levels = weights.blocks({name: row for name, row in rows.items() if isinstance(row, tuple)}).get("residual", ())
    return levels[-1] if levels else 0


def _with_base(scene: Scene, model: str) -> Scene:
    source, family = open_source(model), scene.family
    wanted = dict(scene.target.weights.shapes)
    if family.embedding is not None:
        wanted[family.embedding] = scene.table.shape
    if family_of(source.config) is not family:
        raise AuditError(
            f"model {model}: seen the architecture {source.config.model_type!r}, wanted one of the {family.name} table",
            hint="give the public model that the export is, or is a fine-tune of",
        )
    base = public(source, family)
    for name, shape in wanted.items():
        if base.shapes.get(name) != shape:
            raise AuditError(
                f"model {model}: {name}: seen {base.shapes.get(name) or 'no such tensor'}, wanted {shape}",
                hint="give the public model that the export is, or is a fine-tune of",
            )
    tied = family.classifier is not None and source.tied.get(family.classifier) == family.embedding
    first, images = public_first_row(source, family), scene.images
    if first is not None and images is not None:
        images = replace(images, first=first)
    return replace(scene, base=base, tokens=public_tokens(source, family), tied=tied, images=images)


def public(source: Source, family: Family) -> Weights:
    """All weights of a model as its publisher gives them, a tied classifier under its own name. What devices add is
    zero here as it is in the cloud, so that the model takes what devices send, in plain."""
    plan = plan_cloud(source, family, "cloud")
    stored = dict(plan.stored)
    if family.embedding is not None:
        stored[family.embedding] = stored_name(source, family, family.embedding) or family.embedding
    config = copy.deepcopy(source.config)
    for setting, value in (family.settings or {}).items():
        setattr(config, setting, value)

    def read(name: str) -> torch.Tensor:
        return torch.zeros(plan.zeros[name]) if name in plan.zeros else source.read(stored[name]).float()

    return Weights(config, {name: source.shapes[origin] for name, origin in stored.items()} | plan.zeros, read)


def unprotected(scene: Scene, *, folds: bool | None = None) -> Target:
    """The victim without protection: the public weights as the export stores them, every space listed backwards.

    folds: whether gains are folded; by default as in the victim at hand, so that attacks must undo it here too.
    """
    if folds is None:
        folds = scene.target.scheme == "rotation"
    known = scene.base
    if known is None:  # what travels is all there is
        known = Weights(scene.target.weights.config, {}, scene.target.weights.read)
    scheme = Backwards(scene.family.spaces(known.config), folds=folds)
    read = known.read

    def backwards(name: str) -> torch.Tensor:
        axes = scene.family.axes(name)
        moved = scheme.act(name, read(name), axes, read) if isinstance(axes, tuple) else read(name)
        return scene.stored(name, moved)

    shapes = {name: shape for name, shape in known.shapes.items() if name != scene.family.embedding}
    config = copy.deepcopy(known.config)
    config.tie_word_embeddings = False
    key = scheme.user_key("unprotected")
    weights = Weights(config, shapes, backwards)
    return Target("none", "cloud", weights, scene.target.dtype, key, scene.tokens, scene.target.block)
