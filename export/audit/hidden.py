"""An attack on hidden states by who has the weights: try every token, keep the one that gives the states seen.

After "Hidden No More" (arXiv 2505.18332), which breaks permuted hidden states token by token and names STIP. There they
are compared by sorted entries; here by inner products, which rotations leave alone too.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from export.audit.attack import Attack, Outcome, needs, needs_base, needs_text
from export.audit.scene import Scene, Weights
from shared.key import Index

LAYERS = 2  # whose outputs are seen
PREFIX = 12  # tokens of each prompt
PROMPTS = 2
BATCH = 512  # candidates tried at a time, those first that the language model expects
GOOD_ENOUGH = 0.005  # a misfit that ends the search: bfloat16 leaves 0.001, another token 0.02 or more


def shallow(weights: Weights, layers: int) -> Any:
    """The stock model's first layers, or all where it has fewer."""
    config = copy.deepcopy(weights.config)
    text = config.get_text_config()
    there = text.num_hidden_layers
    layers = min(layers, there)
    text.num_hidden_layers = layers
    beyond = re.compile(rf"\.(layers|h)\.({'|'.join(map(str, range(layers, there)))})\.")
    kept = {name: shape for name, shape in weights.shapes.items() if layers == there or not beyond.search(name)}
    return replace(weights, config=config, shapes=kept).model()


class States:
    """Outputs of every layer of a shallow model. Call with embeddings [batch, tokens, hidden], go on with `cache`."""

    def __init__(self, model: Any) -> None:
        self._body = model.get_decoder()
        self._seen: list[torch.Tensor] = []
        for layer in self._body.h if hasattr(self._body, "h") else self._body.layers:  # GPT-2 calls them h
            layer.register_forward_hook(
                lambda module, inputs, output: self._seen.append(output[0] if isinstance(output, tuple) else output)
            )

    @torch.inference_mode()
    def __call__(self, embeddings: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """States [batch, tokens, layers, hidden], and the cache after them."""
        self._seen.clear()
        result = self._body(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        return torch.stack(self._seen, 2), result.past_key_values


def invariants(states: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """Inner products of states [batch, layers, hidden] with each other and with those of earlier positions [n, hidden].

    [batch, layers, layers + n]. No orthogonal map changes any of them.
    """
    return torch.cat([states @ states.transpose(1, 2), states @ earlier.T], 2)


def misfits(candidates: torch.Tensor, seen: torch.Tensor, earlier: torch.Tensor, seen_earlier: torch.Tensor) -> Any:
    """How far each candidate [batch, layers, hidden] is from what was seen [layers, hidden], as a share of lengths."""
    own = seen.norm(dim=1)
    scale = own[:, None] * torch.cat([own, seen_earlier.norm(dim=1)])
    difference = invariants(candidates, earlier) - invariants(seen[None], seen_earlier)
    return (difference / scale).square().mean((1, 2)).sqrt()


class Reader:
    """Reads a prompt from the states that the cloud saw of it."""

    def __init__(self, scene: Scene) -> None:
        self._tokens = scene.tokens
        counts = np.bincount(scene.text.public, minlength=len(scene.table))
        self._common_first = torch.from_numpy(np.argsort(-counts, kind="stable"))
        self._states = States(shallow(scene.public, LAYERS))
        self._language = scene.public.model()
        self.tried = 0

    def read(self, seen: torch.Tensor) -> Index:
        """Token ids for states [tokens, layers, hidden]."""
        found: list[int] = []
        earlier: list[torch.Tensor] = []
        cache = None
        for position in range(len(seen)):
            known = torch.cat(earlier) if earlier else torch.empty(0, seen.shape[-1])
            before = seen[:position].flatten(0, 1)
            rows = torch.from_numpy(self._tokens.rows_at(position))  # that may stand here
            token, states = self._best(self._expected(found), rows, cache, seen[position], known, before)
            found.append(token)
            earlier.append(states)
            _, cache = self._states(rows[[token]][None], cache)
        return np.array(found)

    @torch.inference_mode()
    def _expected(self, found: list[int]) -> torch.Tensor:
        """All tokens, those first that the language model expects next."""
        if not found:
            return self._common_first
        before = torch.from_numpy(self._tokens.embed(np.array([found])))
        logits = self._language(inputs_embeds=before, logits_to_keep=1).logits[0, -1]
        order: torch.Tensor = logits.argsort(descending=True)
        return order

    def _best(
        self, order: torch.Tensor, rows: torch.Tensor, cache: Any, seen: Any, earlier: Any, before: Any
    ) -> tuple[int, torch.Tensor]:
        best, token, kept = float("inf"), -1, torch.empty(0)
        for batch in torch.split(order, BATCH):
            self.tried += len(batch)
            expanded = None if cache is None else copy.deepcopy(cache)
            if expanded is not None:
                expanded.batch_repeat_interleave(len(batch))
            states = self._states(rows[batch][:, None], expanded)[0][:, 0]
            fits = misfits(states, seen, earlier, before)
            if float(fits.min()) < best:
                at = int(fits.argmin())
                best, token, kept = float(fits[at]), int(batch[at]), states[at]
            if best < GOOD_ENOUGH:
                break
        return token, kept


def _vocabulary_matching(scene: Scene) -> Outcome:
    reader = Reader(scene)
    cloud = States(shallow(scene.target.weights, LAYERS))
    right = tokens = 0
    for prompt in range(PROMPTS):
        ids = scene.text.secret[500 * prompt : 500 * prompt + PREFIX]
        seen, _ = cloud(torch.from_numpy(scene.sent(ids))[None])
        right += int((reader.read(seen[0]) == ids).sum())
        tokens += len(ids)
    return Outcome(
        right / tokens, {"tokens": tokens, "tried_per_token": reader.tried / tokens, "layers": seen.shape[2]}
    )


def _needs_one_direction(scene: Scene) -> str | None:
    if scene.family.kind in ("decoder", "vision-decoder"):
        return None
    return "what is sent is attended in both directions, so that no token can be tried before those behind it"


ATTACKS = (
    Attack(
        name="hidden-vocabulary",
        title="Prompts from hidden states, token by token",
        knows="the public base model, and sees hidden states alone, not embeddings",
        after=f"{PROMPTS * PREFIX} tokens of real text",
        source="arXiv 2505.18332, with inner products in place of sorted entries",
        run=_vocabulary_matching,
        applies=needs(needs_text, _needs_one_direction, needs_base),
    ),
)
