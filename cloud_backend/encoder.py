"""The engine of encoders: sequences of different lengths through the stock model, several in one forward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from cloud_backend.engine import AppendKind, EncodedRows, EncodeWant, EncodeWork, Outcome, Work, failed, not_finite
from cloud_backend.grouping import groups
from cloud_backend.kv_cache import KVCache
from cloud_backend.tensors import TORCH_DTYPES, device_of, to_numpy, to_torch
from shared.wire import FloatName

log = logging.getLogger("stip.cloud")

MOST_POSITIONS = 4096  # of one forward, padding included, but for a sequence that is longer by itself


class EncoderEngine:
    """A stock encoder of texts, with or without a classifier of whole sequences."""

    appends: tuple[AppendKind, ...] = ()
    same_length = False
    encoder_size = encoder_context = image_tokens = 0
    pool = None

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None, kv_bytes: int = 0) -> None:
        """context: the longest sequence, where that is less than the model takes. kv_bytes: without effect."""
        self._model = model
        self._body = model.base_model  # itself, where it has no classifier
        classifies = model is not self._body
        pools = self._pools()
        if not pools and hasattr(self._body, "pooler"):
            self._body.pooler = None
        self.encodes: tuple[EncodeWant, ...] = (
            "hidden",
            *(("pooled",) if pools else ()),
            *(("logits",) if classifies else ()),
        )
        self.hidden_size: int = model.config.hidden_size
        self.vocab_size: int = model.config.num_labels if classifies else 0
        longest = self._longest()
        self.context = min(context or longest, longest)
        self.dtype = dtype
        self.device = device_of(model)

    def _pools(self) -> bool:
        pooler = getattr(self._body, "pooler", None)
        # A checkpoint may lack it, as masked language models have none.
        return pooler is not None and all(tensor is not None for tensor in pooler.dense._parameters.values())

    def _longest(self) -> int:
        """Positions that the model has. RoBERTa's begin behind the one of padding."""
        table = self._body.embeddings.position_embeddings
        skipped = 0 if table.padding_idx is None else table.padding_idx + 1
        return int(table.num_embeddings) - skipped

    def new_cache(self) -> KVCache:
        return KVCache(None)

    def run(self, batch: Sequence[Work]) -> list[Outcome]:
        try:
            return self._run([work for work in batch if isinstance(work, EncodeWork)])
        except Exception as error:  # any failure of a model: the server and other sessions go on
            if len(batch) > 1:  # one of them may be the reason
                return [outcome for work in batch for outcome in self.run([work])]
            log.error("engine failed: %s", type(error).__name__)  # its text could quote tensors
            return [failed()]

    @torch.inference_mode()
    def _run(self, works: Sequence[EncodeWork]) -> list[Outcome]:
        """Sequences of all works side by side, whoever sent them."""
        results: list[Outcome] = [not_finite()] * len(works)
        for want in dict.fromkeys(work.want for work in works):
            chosen = [at for at, work in enumerate(works) if work.want == want]
            encoded = iter(self._encode_all([rows for at in chosen for rows in self._sequences(works[at])], want))
            for at in chosen:
                rows = torch.cat([next(encoded) for _ in works[at].lengths]).to(TORCH_DTYPES[works[at].dtype])
                if torch.isfinite(rows).all():
                    results[at] = EncodedRows(to_numpy(rows))
        return results

    def _sequences(self, work: EncodeWork) -> Sequence[torch.Tensor]:
        """Each [length, hidden]."""
        embeddings = to_torch(work.embeddings.copy()).to(self._model.device, TORCH_DTYPES[self.dtype])
        return torch.split(embeddings, list(work.lengths))

    def _encode_all(self, sequences: list[torch.Tensor], want: EncodeWant) -> list[torch.Tensor]:
        results = list(sequences)
        for group in groups([len(sequence) for sequence in sequences], MOST_POSITIONS):
            outputs = self._encode([sequences[at] for at in group], want)
            for at, result in zip(group, outputs, strict=True):
                results[at] = result
        return results

    def _encode(self, sequences: list[torch.Tensor], want: EncodeWant) -> list[torch.Tensor]:
        """The result of each sequence: [length, hidden] for `hidden`, else one row."""
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # [sequences, longest, hidden]
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=padded.device)
        # [sequences, longest]; none where nothing is padded, as the stock model is faster then
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        attention_mask = None if mask.all() else mask.long()
        outputs = self._forward(self._model if want == "logits" else self._body, padded, attention_mask)
        if want == "hidden":
            states = outputs.last_hidden_state  # [sequences, longest, hidden]
            return [states[at, : len(sequence)] for at, sequence in enumerate(sequences)]
        rows = outputs.logits if want == "logits" else outputs.pooler_output
        return list(rows.split(1))

    def _forward(self, model: Any, padded: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
        return model(inputs_embeds=padded, attention_mask=attention_mask)
