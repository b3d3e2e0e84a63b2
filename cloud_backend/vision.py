"""The engines that see: image encoders, and decoders that take images between texts.

Devices cut images into patches and embed them, so the stock models begin behind their own embeddings.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from cloud_backend.encoder import EncoderEngine
from cloud_backend.engine import AppendKind, AppendWork, TorchEngine
from cloud_backend.tensors import finite
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

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None) -> None:
        """context: without effect, as every image has the same length."""
        super().__init__(model, dtype)
        self._body.pooler = None  # it is not offered
        self._body.embeddings = Embedded(model.dtype)

    def _pools(self) -> bool:
        return False

    def _longest(self) -> int:
        return int(self._body.embeddings.patch_embeddings.num_patches) + 1  # the class token

    def _forward(self, model: Any, padded: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
        return model(pixel_values=padded)


class VisionEngine(TorchEngine):
    """LLaVA: a stock decoder, and a CLIP tower whose patches become positions of the decoder."""

    appends: tuple[AppendKind, ...] = ("text", "image")

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None) -> None:
        super().__init__(model, dtype, context)
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

    def _inputs(self, work: AppendWork, embeddings: torch.Tensor) -> torch.Tensor:
        if work.kind == "text":
            return embeddings
        (features,) = self._model.get_image_features(pixel_values=embeddings[None]).pooler_output
        return finite(features)  # [image_tokens, hidden]; no row of it is sent that would be checked
