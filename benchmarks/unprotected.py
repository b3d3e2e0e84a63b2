"""Unprotected loops in this process: the stock model's ids in, ids out, and the moment of each token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.full_cloud import PlainEngine, row_of
from cloud_backend.engine import LogitRows
from device_app.sampler import Sampler, Sampling


def in_process(engine: PlainEngine, asked: Sequence[list[int]], tokens: int) -> tuple[list[list[int]], list[float]]:
    """STIP's own engine: the ids behind each prompt, and the moment of each step; the first step has the prompts."""
    caches, sampler = [engine.new_cache() for _ in asked], Sampler(Sampling(), engine.vocab_size)
    found: list[list[int]] = [[] for _ in asked]
    moments, new = [], list(asked)
    for step in range(1 + tokens):
        outcomes = engine.run([engine.work(cache, ids) for cache, ids in zip(caches, new, strict=True)])
        for answer, rows, ids in zip(found, outcomes, asked, strict=True):
            assert isinstance(rows, LogitRows)
            token = sampler.choose(row_of(rows), len(ids) + step)
            assert token is not None
            answer.append(token)
        new = [answer[-1:] for answer in found]
        moments.append(time.monotonic())
    for cache in caches:
        cache.clear()
    return found, moments


@torch.inference_mode()
def static_cache(model: Any, prompt: list[int], tokens: int) -> list[float]:
    """transformers alone: the moment of each token, each of which is brought to the host."""
    cache = StaticCache(config=model.config, max_cache_len=len(prompt) + tokens)
    ids, moments = torch.tensor([prompt], device=model.device), []
    for _ in range(1 + tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        ids.cpu()
        moments.append(time.monotonic())
    return moments
