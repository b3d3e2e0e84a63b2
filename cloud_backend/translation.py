"""The engine of encoder-decoders: a source sequence is read once, then the decoder attends to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from cloud_backend.attention import pooled_cache
from cloud_backend.decoder import DecoderEngine, layer_shapes
from cloud_backend.engine import AppendWork, EncodedRows, EncodeWant, EncodeWork, Outcome, Work, failed
from cloud_backend.kv_cache import PAGE, KVCache, PagePool, Pages
from cloud_backend.step import Span, Step
from cloud_backend.tensor_pool import LayerShape
from cloud_backend.tensors import finite
from shared.errors import UsageError
from shared.wire import DTYPES, FloatName

log = logging.getLogger("stip.cloud")


class SourceCache(KVCache):
    """The KV cache of a decoder, and the source sequence that it reads: keys and values in pages of their own."""

    def __init__(self, pool: PagePool) -> None:
        super().__init__(pool)
        self.source, self.coming = Pages(pool), Pages(pool)
        self.source_length = 0

    @property
    def ready(self) -> bool:
        return self.source_length > 0

    @property
    def held(self) -> int:
        return super().held + len(self.source) + len(self.coming)

    def reserve_source(self, length: int) -> bool:
        return self.coming.reserve(length)

    def store(self, length: int) -> None:
        """Takes what is in `coming` in place of the source before, and forgets every position."""
        self.cut(0)
        self.source, self.coming = self.coming, self.source
        self.source_length = length
        self.trim()

    def trim(self) -> None:
        super().trim()
        self.source.trim(self.source_length)
        self.coming.trim(0)

    def clear(self) -> None:
        self.source_length = 0
        super().clear()


class NoPositions(torch.nn.Module):
    """Stands where Marian adds positions, which devices have added already."""

    def forward(self, *_: Any, **__: Any) -> float:
        return 0.0


class TranslationEngine(DecoderEngine):
    """Marian: a stock encoder of the source, a stock decoder with cross-attention."""

    encodes: tuple[EncodeWant, ...] = ("store",)

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None, kv_bytes: int = 2**28) -> None:
        self.encoder_size: int = model.config.hidden_size
        self.encoder_context: int = model.config.max_position_embeddings
        self._one = torch.zeros(1, 1, self.encoder_size, dtype=model.dtype, device=model.device)
        super().__init__(model, dtype, context, kv_bytes)
        self._body.embed_positions = NoPositions()
        # A source and an answer of full length must fit together with the next source, until that is stored.
        third = self.pool.pages // 3 * PAGE
        if not third:
            raise UsageError(
                f"KV memory: seen {self.pool.budget} bytes, wanted at least {3 * self.pool.page_bytes}",
                hint="give it more with --kv-bytes",
            )
        self.encoder_context, self.context = min(self.encoder_context, third), min(self.context, third)

    @torch.inference_mode()
    def _layers(self) -> list[LayerShape]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._body(inputs_embeds=self._one, encoder_hidden_states=self._one, past_key_values=cache, use_cache=True)
        return layer_shapes(cache.self_attention_cache)

    def _pooled(self) -> Cache:
        return pooled_cache(self.pool, sources=True)

    def _captured(self) -> None:
        """Sources have lengths of their own: its steps are launched one by one."""

    def new_cache(self) -> SourceCache:
        return SourceCache(self.pool)

    def _run(self, batch: Sequence[Work]) -> list[Outcome]:
        appended = iter(super()._run([work for work in batch if isinstance(work, AppendWork)]))
        return [self._stored(work) if isinstance(work, EncodeWork) else next(appended) for work in batch]

    def _stored(self, work: EncodeWork) -> Outcome:
        """A failure here is no reason to run the others again: whoever has stored its source gave memory back."""
        try:
            return self._store(work)
        except Exception as error:
            log.error("engine failed: %s", type(error).__name__)  # its text could quote tensors
            return failed()

    def _store(self, work: EncodeWork) -> Outcome:
        cache = work.cache
        assert isinstance(cache, SourceCache)
        if not work.reserve():
            raise MemoryError("KV pool: nothing was reserved")
        (length,) = work.lengths
        embeddings = self._tensor([work.embeddings])[None]  # [1, n, hidden]
        states = finite(self._model.get_encoder()(inputs_embeds=embeddings).last_hidden_state[0])  # [n, hidden]
        rows = torch.from_numpy(cache.coming.rows[:length]).to(states.device)
        for layer, keys, values in zip(self._body.layers, self.pool.keys, self.pool.values, strict=True):
            attention = layer.encoder_attn
            for memory, projected in ((keys, attention.k_proj(states)), (values, attention.v_proj(states))):
                memory.index_copy_(1, rows, projected.unflatten(-1, (len(memory), -1)).transpose(0, 1))
        cache.store(length)
        return EncodedRows(np.empty((0, self.hidden_size), DTYPES[work.dtype]))

    def _span(self, work: AppendWork) -> Span:
        cache = work.cache
        assert isinstance(cache, SourceCache) and cache.pages is not None
        return Span(cache.pages, work.keep, len(work.embeddings), cache.source, cache.source_length)

    def _beside(self, step: Step) -> dict[str, Any]:
        return {"encoder_hidden_states": self._one}  # that there is a source; its keys and values are in the pool

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = super()._logits(hidden) + self._model.final_logits_bias
        return logits
