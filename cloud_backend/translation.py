"""The engine of encoder-decoders: a source sequence is read once, then the decoder attends to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from cloud_backend.engine import EncodedRows, EncodeWant, EncodeWork, Result, TorchEngine, Work
from cloud_backend.kv_cache import KVCache
from cloud_backend.tensors import finite
from shared.wire import DTYPES, FloatName


class SourceCache(KVCache):
    """The KV cache of a decoder, and the source sequence that it reads."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.source: torch.Tensor | None = None  # [1, n, hidden], as the encoder left it

    @property
    def ready(self) -> bool:
        return self.source is not None

    def store(self, source: torch.Tensor) -> None:
        """Takes a source sequence [1, n, hidden] in place of the one before, and forgets every position."""
        self.cut(0)
        self.source = source
        self.read_anew()

    def read_anew(self) -> None:
        """Lets the next forward compute the keys and values of the source."""
        self.stock = EncoderDecoderCache(Cache(layers=self._layers), DynamicCache())


class TranslationEngine(TorchEngine):
    """Marian: a stock encoder of the source, a stock decoder with cross-attention."""

    encodes: tuple[EncodeWant, ...] = ("store",)

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None) -> None:
        super().__init__(model, dtype, context)
        self._layers = model.config.decoder_layers
        self.encoder_size: int = model.config.hidden_size
        self.encoder_context: int = model.config.max_position_embeddings

    def new_cache(self) -> SourceCache:
        return SourceCache(self._layers)

    @torch.inference_mode()
    def _run_one(self, work: Work) -> Result:
        if not isinstance(work, EncodeWork):
            return super()._run_one(work)
        assert isinstance(work.cache, SourceCache)
        embeddings = self._tensor(work.embeddings)[None]  # [1, n, hidden]
        states = self._model.get_encoder()(inputs_embeds=embeddings).last_hidden_state
        work.cache.store(finite(states))
        return EncodedRows(np.empty((0, self.hidden_size), DTYPES[work.dtype]))

    def forward(self, cache: KVCache, **inputs: torch.Tensor) -> torch.Tensor:
        assert isinstance(cache, SourceCache) and cache.source is not None
        try:
            return super().forward(cache, encoder_hidden_states=cache.source, **inputs)
        except BaseException:
            cache.read_anew()  # a layer may hold half of them
            raise

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = super()._logits(hidden) + self._model.final_logits_bias
        return logits
