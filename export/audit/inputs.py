"""What devices hide: vectors of tokens and of image patches, as an export's own graphs or a public model make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from export.check import run_onnx
from export.embedding import IMAGE
from export.families import Family
from export.original import original
from export.source import Source
from shared.key import Index
from shared.manifest import DeviceManifest
from shared.wire import Array

PROMPT = 32  # tokens of each prompt, where devices add positions
IMAGES = 8  # that are sent


@dataclass(frozen=True, eq=False)
class Tokens:
    """How token ids become vectors: their rows in a table, and a position where the device adds one.

    A text [tokens] goes up in prompts of PROMPT tokens, one after another; the rows of ids [prompts, tokens] are
    prompts as they are.
    """

    table: Array  # [vocab, hidden], float32, scaled as the model does it
    positions: Array | None = None  # [context, hidden], float32
    scale: float = 1.0  # that is in `table`

    def places(self, *shape: int) -> Index:
        """Where in its prompt each token of ids of this shape stands; 0 for all where that makes no difference."""
        if self.positions is None:
            return np.zeros(shape, np.int64)
        along = np.arange(shape[-1])
        return along % min(PROMPT, len(self.positions)) if len(shape) == 1 else np.broadcast_to(along, shape)

    def embed(self, ids: Index) -> Array:
        """The vectors [..., tokens, hidden] of ids [..., tokens]."""
        rows: Array = self.table[ids]
        return rows if self.positions is None else rows + self.positions[self.places(*ids.shape)]

    def rows_at(self, place: int) -> Array:
        """All that may stand at one place of a prompt [vocab, hidden]."""
        return self.table if self.positions is None else self.table + self.positions[place]

    def mapped(self, change: Callable[[Array], Array]) -> Tokens:
        """The same after a linear map of rows."""
        return replace(
            self, table=change(self.table), positions=None if self.positions is None else change(self.positions)
        )

    def look_up(self, places: Index, match: Callable[[Index, Array], Index]) -> Index:
        """Ids [tokens] of tokens at `places` [tokens]: for each place `match` takes the numbers [n] of the tokens there
        and all the rows that may stand there [vocab, hidden], and gives n of those rows."""
        found = np.empty(places.size, np.int64)
        for place in np.unique(places):
            here = np.flatnonzero(places == place)
            found[here] = match(here, self.rows_at(int(place)))
        return found


@dataclass(frozen=True, eq=False)
class Images:
    """Images of random pixels, as rows, and the first row of every image there is, as its publisher gives it."""

    rows: Array  # [images, rows, width], float32: the truth
    first: Array  # [width], float32: class token and position


def device_tokens(device: Path) -> Tokens:
    """As embedding.onnx has them."""
    graph = onnx.load(device / "embedding.onnx").graph
    held = {one.name: numpy_helper.to_array(one).astype(np.float32) for one in graph.initializer}
    scale = float(held.get("scale", 1.0))
    return Tokens(held["table"] * np.float32(scale), held.get("position_table"), scale)


def public_tokens(source: Source, family: Family) -> Tokens:
    """As a public model has them; of no rows where it takes no text."""
    if family.text is None:
        return NO_TOKENS
    read = original(source, family, source.dtype)
    positions = None if family.text.positions is None else family.text.positions(source.config, read).float().numpy()
    scale = family.text.scale(source.config)
    return Tokens(read(family.text.table).float().numpy() * np.float32(scale), positions, scale)


NO_TOKENS = Tokens(np.zeros((0, 0), np.float32))


def device_images(device: Path, manifest: DeviceManifest) -> Images | None:
    """As image.onnx makes them."""
    if manifest.image is None:
        return None
    shape = (IMAGES, manifest.image.height, manifest.image.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    rows = np.stack([run_onnx(device / IMAGE, pixels=one) for one in pixels])
    return Images(rows, rows[0, 0])


def public_first_row(source: Source, family: Family) -> Array | None:
    """The class token and its position [width], as a public model has them."""
    if family.image is None:
        return None
    read = original(source, family, source.dtype)
    token, positions = (read(name).float() for name in (family.image.class_token, family.image.positions))
    first: Array = (token.reshape(-1) + positions.reshape(-1, token.numel())[0]).numpy()
    return first
