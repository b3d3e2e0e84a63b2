"""What an export is tried on: text, images, and what stands between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from export.outputs import Inputs

POSITIONS = 64  # a sequence
IMAGE_AT = 2  # where an image stands in a sample of text


@dataclass(frozen=True, eq=False)
class Samples:
    """What both models are tried on. ids, target: [sequences, positions]; images: uint8 [images, height, width, 3], and
    the same as the stock model takes them; image_tokens: positions of the text that stand for each image."""

    ids: np.ndarray | None = None
    target: np.ndarray | None = None
    images: np.ndarray | None = None
    pixels: torch.Tensor | None = None
    image_tokens: int = 0

    def inputs(self) -> Inputs:
        """The same for the stock model."""
        ids, target = (None if given is None else torch.from_numpy(given) for given in (self.ids, self.target))
        return Inputs(ids, target, self.pixels)


def sample_ids(vocab_size: int, text_ids: list[int], positions: int = POSITIONS) -> np.ndarray:
    """Two sequences [2, positions]: text (repeated to length), and ids drawn evenly from the whole vocabulary."""
    even = np.random.default_rng(0).integers(0, vocab_size, positions)
    text = np.resize(text_ids, positions) if text_ids else even[::-1]
    return np.stack([text, even]).astype(np.int64)
