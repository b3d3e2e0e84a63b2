"""The engine of encoders: sequences of different lengths through the stock model, several in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cloud_backend.engine import AppendKind, EncodedRows, EncodeWant, EncodeWork, Result, Work
from cloud_backend.kv_cache import KVCache
from cloud_backend.tensors import TORCH_DTYPES, finite, to_numpy, to_torch
from shared.wire import FloatName

MOST_POSITIONS = 4096  # of one forward, padding included, but for a sequence that is longer by itself


class EncoderEngine:
    """A stock encoder of texts, with or without a classifier of whole sequences."""

    appends: tuple[AppendKind, ...] = ()
    same_length = False
    encoder_size = encoder_context = image_tokens = 0
    largest_batch = 1

    def __init__(self, model: Any, dtype: FloatName, context: int | None = None) -> None:
        """context: the longest sequence, where that is less than the model takes."""
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
        return KVCache(0)

    def run(self, batch: Sequence[Work]) -> list[Result]:
        return [self._run_one(work) for work in batch]

    @torch.inference_mode()
    def _run_one(self, work: Work) -> Result:
        assert isinstance(work, EncodeWork)  # it has no KV cache to append to
        embeddings = to_torch(work.embeddings).to(self._model.device, TORCH_DTYPES[self.dtype])
        sequences = torch.split(embeddings, list(work.lengths))  # each [length, hidden]
        results = [embeddings] * len(sequences)
        for group in groups(work.lengths):
            outputs = self._encode([sequences[at] for at in group], work.want)
            for at, result in zip(group, outputs, strict=True):
                results[at] = result
        return EncodedRows(to_numpy(finite(torch.cat(results).to(TORCH_DTYPES[work.dtype]))))

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


def groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of the sequences that share a forward, of similar length: at most half of it is padding."""
    group: list[int] = []
    held = 0  # positions in the group that are no padding
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = (len(group) + 1) * lengths[at]  # as this one is the longest so far
        if group and padded > min(MOST_POSITIONS, 2 * (held + lengths[at])):
            yield group
            group, held = [], 0
        group.append(at)
        held += lengths[at]
    yield group
