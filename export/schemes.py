"""The schemes there are, by name."""

from __future__ import annotations

import os
from collections.abc import Iterable

from export.permutation import Permutation
from export.rotation import Rotation
from export.scheme import RandomBytes, Scheme, SchemeName
from export.spaces import Structure

SCHEMES: dict[SchemeName, type[Permutation] | type[Rotation]] = {"permutation": Permutation, "rotation": Rotation}


def draw(name: SchemeName, structures: Iterable[Structure], random_bytes: RandomBytes = os.urandom) -> Scheme:
    """The scheme `name` with fresh secrets for every space in `structures`."""
    return SCHEMES[name](structures, random_bytes)
