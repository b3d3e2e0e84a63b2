"""The schemes there are, by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from export.permutation import Permutation
from export.rotation import Rotation
from export.scheme import RandomBytes, Scheme, SchemeName
from export.spaces import Structure


def draw(
    name: SchemeName,
    structures: Iterable[Structure],
    random_bytes: RandomBytes = os.urandom,
    blocks: Mapping[str, tuple[int, ...]] | None = None,
) -> Scheme:
    """The scheme `name` with fresh secrets for every space in `structures`.

    blocks: what a permutation must keep together, as `Permutation` takes it.
    """
    if name == "permutation":
        return Permutation(structures, random_bytes, blocks or {})
    assert not blocks
    return Rotation(structures, random_bytes)
