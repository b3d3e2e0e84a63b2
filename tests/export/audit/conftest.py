"""Scenes on tiny exports, controls, and ways to break an attack."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch

from export.audit.attack import Attack, Outcome
from export.audit.scene import Scene, open_scene, unprotected
from export.bundle import export_model
from export.scheme import SchemeName
from shared.wire import FloatName


class Scenes(Protocol):
    """Gives the scene of a kind's export before who has its public model, or its table alone."""

    def __call__(
        self, kind: str, scheme: SchemeName = "permutation", dtype: FloatName = "float32", *, base: bool = True
    ) -> Scene: ...


@pytest.fixture(scope="session")
def scenes(
    tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Scenes:
    made: dict[tuple[str, SchemeName, FloatName, bool], Scene] = {}

    def scene(
        kind: str, scheme: SchemeName = "permutation", dtype: FloatName = "float32", *, base: bool = True
    ) -> Scene:
        which = (kind, scheme, dtype, base)
        if which not in made:
            checkpoint = str(tiny_checkpoints(kind))
            if dtype == "float32":
                out = tiny_exports(kind, scheme)
            else:
                out = tmp_path_factory.mktemp("export") / kind
                export_model(checkpoint, out, scheme=scheme, dtype=dtype)
            made[which] = open_scene(out, checkpoint if base else None)
        return made[which]

    return scene


class KindExports(Protocol):
    """Gives a folder with a checkpoint of a kind as `model`, and a copy of its export as `out`."""

    def __call__(self, kind: str, scheme: SchemeName = "permutation") -> Path: ...


@pytest.fixture
def kind_exports(
    tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[..., Path], tmp_path: Path
) -> KindExports:
    def exported(kind: str, scheme: SchemeName = "permutation") -> Path:
        folder = tmp_path / kind
        shutil.copytree(tiny_exports(kind, scheme), folder / "out")
        (folder / "model").symlink_to(tiny_checkpoints(kind))
        return folder

    return exported


def control(attack: Attack, scene: Scene) -> Outcome:
    """The attack on a victim that is not protected."""
    return attack.control(scene) if attack.control else attack.run(scene.with_target(unprotected(scene)))


def named(attacks: tuple[Attack, ...], name: str) -> Attack:
    [attack] = [attack for attack in attacks if attack.name == name]
    return attack


def as_it_is(values: Any, *_: Any) -> Any:
    """In place of a step: nothing is done."""
    return values


def unit_basis(rows: Any, *_: Any) -> Any:
    """In place of an alignment: no turn at all."""
    return np.eye(rows.shape[1], dtype=np.float32)


def at_random(step: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a step: results of its shape and kind that have nothing to do with what it was given."""
    generator = np.random.default_rng(0)

    def broken(*arguments: Any, **options: Any) -> Any:
        return _like(step(*arguments, **options), generator)

    return broken


def _like(values: Any, generator: np.random.Generator) -> Any:
    if isinstance(values, tuple):
        return tuple(_like(part, generator) for part in values)
    if isinstance(values, torch.Tensor):
        return torch.from_numpy(_like(values.numpy(), generator))
    if values.dtype.kind == "i":
        return generator.integers(0, max(1, values.max()) + 1, values.shape)
    return generator.normal(size=values.shape).astype(values.dtype)
