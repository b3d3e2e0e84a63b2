"""What an attacker meets, what it knows, and the truth that scores it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import torch
from transformers import AutoConfig, PretrainedConfig

from export.audit.corpus import Text, read_text
from export.families import Family, family_of
from export.permutation import Permutation
from export.scheme import Read, fold
from export.shards import Shards
from export.source import Source, open_source
from export.spaces import Axis, Dropped, Gain, Structure
from export.stock import empty_model
from shared.errors import AuditError
from shared.key import Index, UserKey
from shared.manifest import CloudManifest, DeviceManifest, read_manifest
from shared.wire import Array

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    which travels; `key` and `table` are the truth and score it."""

    scheme: str
    head: Literal["cloud", "device"]
    weights: Weights
    dtype: torch.dtype  # of what is stored and what travels
    key: UserKey
    table: Array  # the victim's own embedding table [vocab, hidden], float32

    def vectors(self, embeddings: Array) -> Array:
        """What goes up for plain embeddings [n, hidden], in the values of the stored dtype, as float32."""
        hidden = torch.from_numpy(np.ascontiguousarray(self.key.hide(embeddings)))
        rounded: Array = hidden.to(self.dtype).float().numpy()
        return rounded


@dataclass(frozen=True, eq=False)
class Scene:
    """One attack's stage."""

    target: Target
    family: Family
    table: Array  # the public embedding table [vocab, hidden], float32
    base: Weights | None  # all of the public base model, where the attacker has it
    text: Text

    def with_target(self, target: Target) -> Scene:
        """The same attacker before another victim."""
        return replace(self, target=target)

    def sent(self, ids: Index) -> Array:
        """The vectors that travel for token ids."""
        return self.target.vectors(self.target.table[ids])


class Backwards(Permutation):
    """No protection: every space in reverse order, which anyone can undo. What a sound attack must break.

    folds: whether gains are folded into what reads them, as the scheme under attack does.
    """

    def __init__(self, structures: Iterable[Structure], *, folds: bool = False) -> None:
        super().__init__(structures)
        self._folds = folds

    def act(self, name: str, tensor: torch.Tensor, axes: tuple[Axis, ...], read: Read) -> torch.Tensor:
        if self._folds and any(isinstance(axis, Gain) for axis in axes):
            return torch.ones_like(tensor)
        return super().act(name, fold(tensor, axes, read, lambda space: True) if self._folds else tensor, axes, read)

    def _order(self, size: int, *, moves: bool = False) -> Index:
        return np.arange(size)[::-1].copy()


def open_scene(out: Path, model: str | None) -> Scene:
    """The export in `out`, before an attacker who knows `model` (hub id, folder or .gguf), or its table alone.

    Raises AuditError, BundleError, SourceError.
    """
    cloud, device = read_manifest(out / "cloud", CloudManifest), read_manifest(out / "device", DeviceManifest)
    if cloud.key_id != device.key_id:
        raise AuditError(f"{out}: its two halves are of different exports", hint="give the folder of one export")
    config = AutoConfig.from_pretrained(out / "cloud")
    shards = Shards(out / "cloud")
    target = Target(
        scheme=cloud.scheme,
        head=device.head,
        weights=Weights(config, shards.shapes, lambda name: shards.read(name).float()),
        dtype=DTYPES[device.dtype],
        key=UserKey.load(out / "device" / "key.safetensors"),
        table=_table(out / "device", device.vocab_size),
    )
    family = family_of(config)
    table = target.table
    base = None
    if model is not None:
        base = public(open_source(model), family)
        _check_kinship(model, base, dict(target.weights.shapes) | {family.embedding: table.shape})
        table = base.read(family.embedding).numpy()
    return Scene(target, family, table, base, read_text(out / "device" / "tokenizer.json"))


def _check_kinship(model: str, base: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if base.shapes.get(name) != shape:
            raise AuditError(
                f"model {model}: {name}: seen {base.shapes.get(name) or 'no such tensor'}, wanted {shape}",
                hint="give the public model that the export is, or is a fine-tune of",
            )


def _table(device: Path, vocab_size: int) -> Array:
    session = ort.InferenceSession(device / "embedding.onnx", providers=["CPUExecutionProvider"])
    table: Array = session.run(None, {"ids": np.arange(vocab_size)})[0]
    return table


def public(source: Source, family: Family) -> Weights:
    """All weights of a model as its publisher gives them, a tied classifier under its own name."""
    stored = {name: name for name in source.shapes if not isinstance(family.axes(name), Dropped)}
    if source.config.tie_word_embeddings:
        stored[family.classifier] = family.embedding
    shapes = {name: source.shapes[origin] for name, origin in stored.items()}
    return Weights(source.config, shapes, lambda name: source.read(stored[name]).float())


def unprotected(scene: Scene, *, folds: bool | None = None) -> Target:
    """The victim without protection: the public weights in the stored dtype, every space listed backwards.

    folds: whether gains are folded; by default as in the victim at hand, so that attacks must undo it here too.
    """
    if folds is None:
        folds = scene.target.scheme == "rotation"
    known = scene.base
    if known is None:  # the table is all there is
        known = Weights(
            scene.target.weights.config,
            {scene.family.embedding: scene.table.shape},
            lambda name: torch.from_numpy(scene.table),
        )
    scheme = Backwards(scene.family.spaces(known.config), folds=folds)
    read = known.read

    def backwards(name: str) -> torch.Tensor:
        axes = scene.family.axes(name)
        assert not isinstance(axes, Dropped)
        return scheme.act(name, read(name), axes, read).to(scene.target.dtype).float()

    shapes = {name: shape for name, shape in known.shapes.items() if name != scene.family.embedding}
    config = copy.deepcopy(known.config)
    config.tie_word_embeddings = False
    return Target(
        "none",
        "cloud",
        Weights(config, shapes, backwards),
        scene.target.dtype,
        scheme.user_key("unprotected"),
        scene.table,
    )
