"""Attacks on images: the first row of every image is the same public vector, and weights are as public as elsewhere."""

from __future__ import annotations

import numpy as np
import torch

from export.audit.attack import Attack, Outcome, needs, needs_base, needs_image
from export.audit.base import by_norms, misfit, reading_rows
from export.audit.inputs import IMAGES, Images
from export.audit.matching import turn
from export.audit.scene import Scene
from shared.errors import AuditError
from shared.key import Index
from shared.wire import Array

NEAR = 0.1  # of a row's length: how far a row that was read may be from the truth; two features swapped are 0.07 of 768
TIED = 0.01  # share of features that may be equal to another


def _images(scene: Scene) -> Images:
    if scene.images is None:
        raise AuditError(f"a model of kind {scene.family.kind} takes no images")
    return scene.images


def _sent(scene: Scene) -> Array:
    """The rows [images, rows, width] that travel."""
    return scene.target.vectors(_images(scene).rows, scene.image_stream)


def _read(scene: Scene, found: Array) -> float:
    """Share of the patches' rows [images, rows, width] that are right. The first row is known anyway."""
    truth = _images(scene).rows[:, 1:]
    error = np.linalg.norm(found[:, 1:] - truth, axis=-1)
    return float((error <= NEAR * np.linalg.norm(truth, axis=-1)).mean())


def _needs_an_order(scene: Scene) -> str | None:
    first = torch.from_numpy(_images(scene).first).to(scene.target.dtype).float().numpy()
    if 1 - np.unique(first).size / first.size <= TIED:
        return None
    return "in 16 bits many entries of the class token are equal, which leaves their order open: see image-base-norms"


def order_of(hidden: Array, plain: Array) -> Index:
    """The feature that each position of `hidden` [width] holds, if it is `plain` [width] in another order."""
    order = np.empty(hidden.size, np.int64)
    order[np.argsort(hidden, kind="stable")] = np.argsort(plain, kind="stable")
    return order


def _by_class_token(scene: Scene) -> Outcome:
    sent = _sent(scene)
    order = order_of(sent[0, 0], _images(scene).first)
    found = np.empty_like(sent)
    found[..., order] = sent
    same = bool((sent[:, 0] == sent[0, 0]).all())
    return Outcome(_read(scene, found), {"rows": sent.shape[1], "first_row_is_the_same_in_all": same})


def _by_norms(scene: Scene) -> Outcome:
    pairs = reading_rows(scene, stream=scene.image_stream)
    basis = by_norms(pairs)
    return Outcome(_read(scene, turn(_sent(scene), basis)), {"misfit": misfit(pairs, basis)})


_PATCHES = f"patches of {IMAGES} images of random pixels, as vectors within 10 %: pixels follow, by a public linear map"
ATTACKS = (
    Attack(
        name="image-class-token",
        title="The constant class token, sorted",
        knows="the public class token and its position",
        after=_PATCHES,
        source="known plaintext, STIP §5.3: one vector is enough for a permutation",
        run=_by_class_token,
        applies=needs(needs_image, _needs_an_order),
    ),
    Attack(
        name="image-base-norms",
        title="Images, by rows of weights matched by norm",
        knows="the public base model",
        after=_PATCHES,
        source="orthogonal Procrustes (Schönemann 1966), as for tokens",
        run=_by_norms,
        applies=needs(needs_image, needs_base),
    ),
)
