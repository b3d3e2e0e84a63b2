"""Sessions of one engine, each of which knows what it has appended and checks what comes of it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch

from cloud_backend.decoder import DecoderEngine
from cloud_backend.engine import AppendWork, HiddenRows, LogitRows, Outcome
from shared.wire import DTYPES
from tests.checkpoints import ALL, randomise, stock_model

KV_BYTES = 2**24
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}  # of the largest value


class Model:
    """A stock model that never was on a disk, twice: as it comes, and in an engine."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.stock = stock_model(deepcopy(ALL[kind])).eval()
        randomise(self.stock)
        self.inside = deepcopy(self.stock)
        self.engine = DecoderEngine(self.inside, "float32", **({"kv_bytes": KV_BYTES} | options))

    @torch.inference_mode()
    def whole(self, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the stock model, in one forward of [n, hidden] without a cache: states [n, hidden], logits [n, vocab]."""
        given = torch.from_numpy(embeddings)[None]
        states = self.stock.get_decoder()(inputs_embeds=given, use_cache=False).last_hidden_state[0]
        return states.numpy(), self.stock(inputs_embeds=given, use_cache=False).logits[0].numpy()


class Sequence:
    """One session: its cache, and what it holds."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model = model
        self.cache = model.engine.new_cache()
        self.held = np.empty((0, model.engine.hidden_size), np.float32)
        self._random = np.random.default_rng(seed)

    def append(self, count: int, *, cut: int = 0, rows: int = 1, dtype: Any = "float32", **fields: Any) -> AppendWork:
        """Work that appends `count` embeddings in place of the last `cut`; `held` is as if it had been run."""
        keep = max(0, len(self.held) - cut)
        new = self._random.normal(size=(count, self.held.shape[1])).astype(DTYPES[dtype])
        self.held = np.concatenate([self.held[:keep], new.astype(np.float32)])
        given = {"want": "logits", "top_k": 0, "temperature": 1.0} | fields
        return AppendWork(self.cache, keep, new, min(rows, count), dtype=dtype, **given)

    def check(self, work: AppendWork, outcome: Outcome) -> None:
        """Asserts that an outcome is what the stock model says of the whole sequence alone."""
        assert self.cache.length == len(self.held)
        states, logits = (rows[len(self.held) - work.rows :] for rows in self.model.whole(self.held))
        if work.want == "hidden":
            assert isinstance(outcome, HiddenRows)
            assert outcome.hidden.dtype.name == work.dtype
            close(outcome.hidden, states, work.dtype)
            return
        assert isinstance(outcome, LogitRows)
        assert outcome.values.dtype.name == work.dtype
        assert outcome.values.shape == (work.rows, work.top_k or logits.shape[-1])
        if work.top_k:
            close(outcome.values, -np.sort(-logits, -1)[:, : work.top_k], work.dtype)
            logits_of_ids = np.take_along_axis(logits, outcome.ids.astype(np.int64), -1)
            close(outcome.values, logits_of_ids, work.dtype)
        else:
            close(outcome.values, logits, work.dtype)
        if work.dtype == "float32" and work.rows:
            likeliest = outcome.ids[:, 0] if work.top_k else outcome.values.argmax(-1)
            assert likeliest.tolist() == logits.argmax(-1).tolist()
        wanted = np.stack([log_sum_exp(logits), log_sum_exp(logits / work.temperature)], -1)
        close(outcome.log_sum_exp, wanted, work.dtype)


def log_sum_exp(rows: np.ndarray) -> np.ndarray:
    """Of each row, in float64."""
    return np.logaddexp.reduce(rows.astype(np.float64), -1)


def close(seen: np.ndarray, wanted: np.ndarray, dtype: str = "float32") -> None:
    """Asserts that arrays are equal, but for what `dtype` and the order of sums leave open."""
    assert seen.shape == wanted.shape
    largest = np.abs(wanted).max(initial=0)
    np.testing.assert_allclose(seen.astype(np.float64), wanted, rtol=0, atol=TOLERANCE[dtype] * largest)


def run(model: Model, works: list[AppendWork]) -> list[Outcome]:
    """Takes the memory, as turns do, and runs all as one batch."""
    for work in works:
        assert work.reserve()
    return model.engine.run(works)
