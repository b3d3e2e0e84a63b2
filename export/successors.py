"""The table that devices draft from: after each of the most used tokens, the one that the model finds most likely.

The model reads each token alone, behind the token that begins a text. Ids of a vocabulary begin with the most used
ones (merges are numbered as they were learned), so the first few thousand are most of what matters: on SmolLM2,
4,096 of 49,152 ids save four fifths of the round trips that all of them save.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from export.families import Family, normalized
from export.original import original
from export.progress import bar
from export.source import Source
from export.streaming import streamed

SUCCESSORS = "successors.npy"
SURE = 255  # a chance of 1
MOST_IDS = 4096
WORK = 2e12  # multiplications at most, about a minute on two cores: large models get a shorter table
BYTES = 8 * 2**20  # of the widest values between layers, and of logits; the heap grows by many times as much


def write_successors(
    source: Source, family: Family, dtype: torch.dtype, folder: Path, beginning: list[int], banned: list[int]
) -> int:
    """Writes the table of a decoder of text; gives how many ids it is for.

    beginning: ids that stand before every text. banned: ids that never follow.
    """
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    text = source.config.get_text_config()
    count = min(source.shapes[family.embedding or ""][0], MOST_IDS, max(1, int(WORK / parameters)))
    begin = beginning or [next((one for one in (text.bos_token_id, text.eos_token_id) if isinstance(one, int)), 0)]
    read, rows = original(source, family, dtype), _embedded(source, family, dtype, [*begin, *range(count)])
    # Of the two largest tensors, the token table is not held at all, and the classifier when the body is done.
    hidden = torch.from_numpy(
        streamed(source.config, read, lambda model: _hidden(model, rows[: len(begin)], rows[len(begin) :]))
    )
    table = streamed(source.config, read, lambda model: _most_likely(model, hidden, banned))
    np.save(folder / SUCCESSORS, np.rint(table * (1, SURE)).astype(np.uint32))
    return count


def _embedded(source: Source, family: Family, dtype: torch.dtype, ids: list[int]) -> torch.Tensor:
    """[n, hidden_size]: what the stock model takes instead of `ids`."""
    assert family.text is not None
    return original(source, family, dtype)(family.text.table)[ids].float() * family.text.scale(source.config)


def _hidden(model: Any, begin: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[n, hidden_size]: what the classifier is given behind each of `rows`; all are embedded."""
    body, cache = model.get_decoder(), _Beginning()
    body(inputs_embeds=begin[None], past_key_values=cache, use_cache=True)
    # Up and gate projections, and what comes of them, are the most that is held at once.
    most = max(1, BYTES // (4 * 3 * _widest(normalized(body.config))))
    return torch.cat(
        [
            body(inputs_embeds=part[:, None], past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            for part in bar(torch.split(rows, most), "likely successors")
        ]
    )


def _widest(sizes: Any) -> int:
    try:
        return max(int(sizes.intermediate_size), int(sizes.hidden_size))
    except AttributeError:
        return 4 * int(sizes.hidden_size)


def _most_likely(model: Any, hidden: torch.Tensor, banned: list[int]) -> torch.Tensor:
    """[n, 2]: the most likely token behind each hidden state and its probability."""
    head = model.get_output_embeddings()

    def in_parts(hidden: torch.Tensor) -> torch.Tensor:
        found = []
        for part in torch.split(hidden, max(1, BYTES // (4 * head.out_features))):
            # What some families do to their logits afterwards changes no order, and the chance but little.
            logits = torch.nn.functional.linear(part, head.weight, head.bias)
            logits[:, banned] = -torch.inf
            top, token = logits.max(-1)
            # Token ids stay exact in float32 up to 2^24.
            found.append(torch.stack([token.float(), (top - logits.logsumexp(-1)).exp()], dim=1))
        return torch.cat(found)

    head.forward = in_parts  # one call, so that its weights are read once
    successors: torch.Tensor = head(hidden)
    return successors


class _Beginning(DynamicCache):  # type: ignore[misc]
    """Holds the keys and values of how every text begins, for any number of texts that go on from there, and keeps
    nothing of those."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx >= len(self.layers):
            kept: tuple[torch.Tensor, torch.Tensor] = super().update(
                key_states, value_states, layer_idx, *args, **kwargs
            )
            return kept
        layer, texts = self.layers[layer_idx], len(key_states)
        keys, values = layer.keys.expand(texts, -1, -1, -1), layer.values.expand(texts, -1, -1, -1)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
