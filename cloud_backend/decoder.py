"""The engine of decoders: many sequences through the stock model in one forward, over paged KV memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache

from cloud_backend import attention
from cloud_backend.answers import answers
from cloud_backend.attention import pooled_cache, running
from cloud_backend.engine import AppendKind, AppendWork, EncodeWant, HiddenRows, LogitRows, Outcome, Work, failed
from cloud_backend.graphs import Graphs
from cloud_backend.kv_cache import KVCache, Last
from cloud_backend.step import Span, Step, order, step_of
from cloud_backend.tensor_pool import LayerShape, TensorPool
from cloud_backend.tensors import TORCH_DTYPES, device_of, to_device
from shared.errors import EngineError
from shared.wire import Array, FloatName

log = logging.getLogger("stip.cloud")


class DecoderEngine:
    """A stock transformers decoder."""

    appends: tuple[AppendKind, ...] = ("text",)
    encodes: tuple[EncodeWant, ...] = ()
    same_length = False
    encoder_size = encoder_context = image_tokens = 0

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None, kv_bytes: int = 2**28) -> None:
        """context: most positions, where that is less than the model has. kv_bytes: the budget of KV memory."""
        config = model.config.get_text_config()
        self._model = model
        self._body = model.get_decoder()
        classifier = model.get_output_embeddings()
        self._classifier: Any = None if classifier.weight is None else classifier  # None: devices classify
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = 0 if self._classifier is None else self._classifier.out_features
        self.dtype = dtype
        self.device = device_of(model)
        self.pool = TensorPool(self._layers(), model.dtype, model.device, kv_bytes)
        longest = min(config.max_position_embeddings, self.pool.positions)
        self.context = min(context or longest, longest)
        self._body.set_attn_implementation(attention.NAME)
        self._past: Cache = self._pooled()
        self._graphs = self._captured() if self.device == "cuda" else None

    @torch.inference_mode()
    def _layers(self) -> list[LayerShape]:
        """What a position leaves in each layer, seen by running one through the model."""
        cache = DynamicCache()
        one = torch.zeros(1, 1, self.hidden_size, dtype=self._model.dtype, device=self._model.device)
        self._body(inputs_embeds=one, past_key_values=cache, use_cache=True)
        return layer_shapes(cache)

    def _pooled(self) -> Cache:
        return pooled_cache(self.pool)

    def _captured(self) -> Graphs | None:
        return Graphs(self.pool, self.hidden_size, self._model.dtype, self.context, self._through)

    def new_cache(self) -> KVCache:
        return KVCache(self.pool)

    @torch.inference_mode()
    def run(self, batch: Sequence[Work]) -> list[Outcome]:
        try:
            return self._run(batch)
        except EngineError:
            raise
        except Exception as error:  # any failure of a model: the server and other sessions go on
            for work in batch:
                if isinstance(work, AppendWork):
                    work.cache.cut(work.keep)
            if len(batch) > 1:  # one of them may be the reason
                return [outcome for work in batch for outcome in self.run([work])]
            log.error("engine failed: %s", type(error).__name__)  # its text could quote tensors
            return [failed()]

    def _run(self, batch: Sequence[Work]) -> list[Outcome]:
        works = [work for work in batch if isinstance(work, AppendWork)]
        states = self._states(works)
        outcomes = answers(works, states, None if self._classifier is None else self._logits)
        for work, outcome in zip(works, outcomes, strict=True):
            if not isinstance(outcome, (LogitRows, HiddenRows)):
                work.cache.cut(work.keep)
        return outcomes

    def _states(self, works: Sequence[AppendWork]) -> list[torch.Tensor]:
        """The last hidden states [rows, hidden] that each work asks for; its cache has grown by it."""
        states: list[torch.Tensor | None] = [_repeated(work) for work in works]
        new = [at for at, known in enumerate(states) if known is None]
        if new:
            for at, found in zip(new, self._forward([works[at] for at in new]), strict=True):
                states[at] = found
        return [found for found in states if found is not None]

    def _forward(self, works: Sequence[AppendWork]) -> list[torch.Tensor]:
        for work in works:
            work.cache.cut(work.keep)
            if not work.reserve():
                raise MemoryError("KV pool: nothing was reserved")
        spans = [self._span(work) for work in works]
        turns = order(spans)
        states = self._run_step([spans[at] for at in turns], self._tensor([works[at].embeddings for at in turns]))
        found = [states[:0]] * len(works)
        first = 0
        for at in turns:
            work, end = works[at], first + len(works[at].embeddings)
            found[at] = states[end - work.rows : end]
            work.cache.length = work.end
            # A copy: the others' rows are not kept for it, and what a graph computed into is written to again.
            work.cache.last = Last(work.embeddings[-1:].copy(), states[end - 1 : end].clone()) if work.rows else None
            first = end
        return found

    def _span(self, work: AppendWork) -> Span:
        assert work.cache.pages is not None
        return Span(work.cache.pages, work.keep, len(work.embeddings))

    def _run_step(self, spans: Sequence[Span], embeddings: torch.Tensor) -> torch.Tensor:
        """Last hidden states [tokens, hidden] of a step's embeddings [tokens, hidden]."""
        states = None if self._graphs is None else self._graphs.run(spans, embeddings)
        return self._through(step_of(self.pool, spans), embeddings) if states is None else states

    def _through(self, step: Step, embeddings: torch.Tensor) -> torch.Tensor:
        """The stock model's forward."""
        beside = self._beside(step)
        with running(step):
            output = self._body(inputs_embeds=embeddings[None], past_key_values=self._past, use_cache=True, **beside)
        states: torch.Tensor = output.last_hidden_state[0]
        return states

    def _beside(self, step: Step) -> dict[str, Any]:
        """What the stock model wants besides."""
        return {"position_ids": step.positions}

    def _tensor(self, embeddings: Sequence[Array]) -> torch.Tensor:
        """Embeddings [tokens, width] as the model computes with them, one behind the other."""
        if len({array.dtype for array in embeddings}) > 1:
            return torch.cat([self._tensor([array]) for array in embeddings])
        packed = np.concatenate(embeddings)
        return to_device(packed, self._model.device).to(TORCH_DTYPES[self.dtype])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab_size] of last hidden states."""
        logits: torch.Tensor = self._classifier(hidden)
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)


def layer_shapes(cache: DynamicCache) -> list[LayerShape]:
    """Of a stock cache that holds something."""
    return [LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]


def _repeated(work: AppendWork) -> torch.Tensor | None:
    """The last position's hidden state where it alone is appended again, as a device does to see its full row.

    No forward is needed then, and the full row is the one that the top of was sent, up to the rounding of a classifier
    that runs beside others.
    """
    return work.cache.last.state if work.repeats_last and work.cache.last is not None else None
