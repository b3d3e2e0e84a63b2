"""The engine: runs work through the stock model. `Engine` is the seam for other engines; torch is the reference.

The engine of decoders is here; `encoder`, `vision` and `translation` hold those of the other kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from cloud_backend.kv_cache import KVCache, Last
from cloud_backend.tensors import TORCH_DTYPES, finite, to_numpy, to_torch
from shared.wire import DTYPES, Array, FloatName

AppendKind = Literal["text", "image"]
EncodeWant = Literal["hidden", "pooled", "logits", "store"]


@dataclass(frozen=True)
class AppendWork:
    """One Append: cut `cache` to `keep`, append `embeddings` [n, width], answer for the last `rows`."""

    cache: KVCache
    keep: int
    embeddings: Array
    rows: int
    want: Literal["logits", "hidden"]
    top_k: int  # 0: full rows
    temperature: float
    dtype: FloatName  # of the values that are sent
    kind: AppendKind = "text"  # image: the embeddings are the patches of one


@dataclass(frozen=True)
class EncodeWork:
    """One Encode: sequences of these `lengths`, one behind the other in `embeddings` [sum of lengths, width]."""

    cache: KVCache  # that `store` empties, and leaves its sequence with
    embeddings: Array
    lengths: tuple[int, ...]
    want: EncodeWant
    dtype: FloatName  # of the values that are sent


Work = AppendWork | EncodeWork


@dataclass(frozen=True)
class LogitRows:
    """values [rows, k], ids [rows, k] uint32 (k = 0 where rows are full), log_sum_exp [rows, 2] float32"""

    values: Array
    ids: Array
    log_sum_exp: Array


@dataclass(frozen=True)
class HiddenRows:
    """hidden [rows, hidden_size]"""

    hidden: Array


@dataclass(frozen=True)
class EncodedRows:
    """result [rows, width], by what the Encode wanted"""

    result: Array


Result = LogitRows | HiddenRows | EncodedRows


class Engine(Protocol):
    """Runs batches of work. Every Work of a batch belongs to another session."""

    appends: tuple[AppendKind, ...]  # the kinds of Append it takes
    encodes: tuple[EncodeWant, ...]  # what an Encode may want of it
    hidden_size: int
    vocab_size: int  # 0 where the classifier is on devices, and no Work wants logits; of an encoder, its classes
    context: int  # most positions of a KV cache, or of a sequence to encode
    same_length: bool  # whether every sequence to encode has `context` positions, as images have
    encoder_size: int  # width of an image or a source sequence, 0 where it takes neither
    encoder_context: int  # rows of every image, most rows of a source sequence
    image_tokens: int  # positions that an image takes in the KV cache
    dtype: FloatName  # what it computes in, and the dtype of results
    largest_batch: int

    def new_cache(self) -> KVCache:
        """The cache of a new session."""

    def run(self, batch: Sequence[Work]) -> list[Result]:
        """One result a Work, in order. Works fit what is said above. An exception leaves caches cut to `keep`, and as
        they were where the Work is an Encode."""


class TorchEngine:
    """The stock transformers decoder, one sequence at a time."""

    appends: tuple[AppendKind, ...] = ("text",)
    encodes: tuple[EncodeWant, ...] = ()
    same_length = False
    encoder_size = encoder_context = image_tokens = 0
    largest_batch = 1

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None) -> None:
        """context: most positions, where that is less than the model has."""
        config = model.config.get_text_config()
        self._model = model
        self._body = model.get_decoder()
        classifier = model.get_output_embeddings()
        self._classifier: Any = None if classifier.weight is None else classifier  # None: devices classify
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self._layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = 0 if self._classifier is None else self._classifier.out_features
        self.context = min(context or config.max_position_embeddings, config.max_position_embeddings)
        self.dtype = dtype

    def new_cache(self) -> KVCache:
        return KVCache(self._layers)

    def run(self, batch: Sequence[Work]) -> list[Result]:
        return [self._run_one(work) for work in batch]

    @torch.inference_mode()
    def _run_one(self, work: Work) -> Result:
        assert isinstance(work, AppendWork)  # it encodes nothing
        embeddings = self._tensor(work.embeddings)  # [n, width]
        try:
            hidden = self._repeated(work, embeddings)
            if hidden is None:
                inputs = self._inputs(work, embeddings)
                work.cache.cut(work.keep)
                states = self.forward(work.cache, inputs_embeds=inputs[None])[0]
                # An image is never appended again to see its rows, as it has none.
                last = Last(embeddings[-1:].clone(), states[-1:].clone()) if work.kind == "text" else None
                work.cache.last = last
                hidden = states[len(states) - work.rows :]
            sent_as = TORCH_DTYPES[work.dtype]
            if work.want == "hidden":
                return HiddenRows(to_numpy(finite(hidden.to(sent_as))))
            return self.logit_rows(self._logits(hidden).to(sent_as), work.top_k, work.temperature)
        except BaseException:
            work.cache.cut(work.keep)
            raise

    def _tensor(self, embeddings: Array) -> torch.Tensor:
        """Embeddings as the model computes with them."""
        return to_torch(embeddings).to(self._model.device, TORCH_DTYPES[self.dtype])

    def _inputs(self, work: AppendWork, embeddings: torch.Tensor) -> torch.Tensor:
        """What goes into the decoder [positions, hidden_size] for the embeddings of an Append."""
        return embeddings

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab_size] of last hidden states."""
        logits: torch.Tensor = self._classifier(hidden)
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    @staticmethod
    def _repeated(work: AppendWork, embeddings: torch.Tensor) -> torch.Tensor | None:
        """The last position's hidden state where it alone is appended again, as a device does to see its full row.

        No forward is needed then, and the full row is the very one that the top of was sent.
        """
        last = work.cache.last
        again = last is not None and work.keep == work.cache.length - 1 and work.rows == len(embeddings) == 1
        return last.hidden if again and last is not None and torch.equal(last.embedding, embeddings) else None

    def forward(self, cache: KVCache, **inputs: torch.Tensor) -> torch.Tensor:
        """The last hidden states [1, n, hidden] for `inputs_embeds`, or `input_ids` if the model can embed."""
        states: torch.Tensor = self._body(**inputs, past_key_values=cache.stock, use_cache=True).last_hidden_state
        return states

    @staticmethod
    def logit_rows(logits: torch.Tensor, top_k: int, temperature: float) -> LogitRows:
        """What a reply says of logits [rows, vocab], in the dtype they are sent in: the top k by value, then id, or
        all of them; and log-sum-exp of the values as sent, so that a device can rely on it."""
        wide = finite(logits).float()
        at_one = torch.logsumexp(wide, -1)
        at_temperature = at_one if temperature == 1.0 else torch.logsumexp(wide / temperature, -1)
        log_sum_exp = torch.stack([at_one, at_temperature], -1).cpu().numpy()
        if top_k == 0:
            return LogitRows(to_numpy(logits), np.empty((len(logits), 0), np.uint32), log_sum_exp)
        top = torch.topk(wide, min(top_k, logits.shape[-1]), sorted=False)
        values, ids = top.values.cpu().numpy(), top.indices.cpu().numpy().astype(np.uint32)
        order = np.lexsort((ids, -values))
        values, ids = np.take_along_axis(values, order, -1), np.take_along_axis(ids, order, -1)
        # Back to the dtype it was computed in: exact, as it came from there.
        return LogitRows(values.astype(DTYPES[str(logits.dtype).removeprefix("torch.")]), ids, log_sum_exp)
