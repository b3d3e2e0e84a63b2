"""The engines that see: image encoders, and decoders that take images between texts.

Devices cut images into patches and embed them, so the stock models begin behind their own embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from cloud_backend.decoder import DecoderEngine
from cloud_backend.encoder import EncoderEngine
from cloud_backend.engine import AppendKind, AppendWork, Outcome, Work, not_finite
from cloud_backend.tensors import to_numpy
from shared.errors import BundleError
from shared.wire import FloatName


class Embedded(torch.nn.Module):
    """Stands where a stock vision model embeds pixels, and gives embeddings as they came."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # ViT asks its projection for the dtype that it is to compute in.
        self.patch_embeddings = SimpleNamespace(projection=SimpleNamespace(weight=SimpleNamespace(dtype=dtype)))

    def forward(self, embeddings: torch.Tensor, **_: Any) -> torch.Tensor:
        """embeddings [images, rows, width]"""
        return embeddings


class ImageEncoderEngine(EncoderEngine):
    """A stock encoder of images, with or without a classifier. A sequence is one image's patches and class token."""

    same_length = True

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None, kv_bytes: int = 0) -> None:
        """context, kv_bytes: without effect, as every image has the same length."""
        super().__init__(model, dtype)
        self._body.pooler = None  # it is not offered
        self._body.embeddings = Embedded(model.dtype)

    def _pools(self) -> bool:
        return False

    def _longest(self) -> int:
        return int(self._body.embeddings.patch_embeddings.num_patches) + 1  # the class token

    def _forward(self, model: Any, padded: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
        return model(pixel_values=padded)


class VisionEngine(DecoderEngine):
    """LLaVA: a stock decoder, and a CLIP tower whose patches become positions of the decoder."""

    appends: tuple[AppendKind, ...] = ("text", "image")

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None, kv_bytes: int = 2**28) -> None:
        super().__init__(model, dtype, context, kv_bytes)
        tower, config = model.model.vision_tower, model.config
        if config.vision_config.model_type != "clip_vision_model":
            raise BundleError(
                f"vision tower: seen {config.vision_config.model_type!r}, wanted 'clip_vision_model'",
                hint="only LLaVA with a CLIP tower is served",
            )
        self.encoder_size: int = config.vision_config.hidden_size
        self.encoder_context: int = tower.embeddings.num_positions
        class_token = config.vision_feature_select_strategy == "default"  # which leaves it out
        self.image_tokens: int = self.encoder_context - class_token
        tower.embeddings = Embedded(model.dtype)

    def _run(self, batch: Sequence[Work]) -> list[Outcome]:
        works = [work for work in batch if isinstance(work, AppendWork)]  # it encodes nothing
        images = [work for work in works if work.kind == "image"]
        seen = iter(self._look(images) if images else ())
        others = iter(super()._run([work for work in works if work.kind != "image"]))
        return [next(seen if work.kind == "image" else others) for work in works]

    def _look(self, works: Sequence[AppendWork]) -> list[Outcome]:
        """What the tower makes of each image, to be appended like text: rows [image_tokens, hidden]."""
        patches = self._tensor([work.embeddings for work in works]).view(len(works), -1, self.encoder_size)
        features = self._model.get_image_features(pixel_values=patches).pooler_output  # one an image
        return [
            replace(work, kind="text", embeddings=to_numpy(rows)) if torch.isfinite(rows).all() else not_finite()
            for work, rows in zip(works, features, strict=True)
        ]
