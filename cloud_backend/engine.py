"""The engine: runs appends through the stock model. `Engine` is the seam for other engines; torch is the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from cloud_backend.kv_cache import KVCache, Last
from shared.errors import BundleError
from shared.manifest import CloudManifest, check_files, read_manifest
from shared.wire import DTYPES, Array, FloatName

TORCH_DTYPES: dict[FloatName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Work:
    """One append: cut `cache` to `keep`, append `embeddings` [n, hidden_size], answer for the last `rows`."""

    cache: KVCache
    keep: int
    embeddings: Array
    rows: int
    want: Literal["logits", "hidden"]
    top_k: int  # 0: full rows
    temperature: float
    dtype: FloatName  # of the values that are sent


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


Result = LogitRows | HiddenRows


class Engine(Protocol):
    """Runs batches of appends. Every Work of a batch belongs to another sequence."""

    hidden_size: int
    vocab_size: int  # 0 where the classifier is on devices: no Work then wants logits
    context: int  # most positions of a sequence
    dtype: FloatName  # what it computes in, and the dtype of results
    largest_batch: int

    def new_cache(self) -> KVCache:
        """An empty sequence."""

    def run(self, batch: Sequence[Work]) -> list[Result]:
        """One result a Work, in order. Works fit the limits above; an exception leaves caches cut to `keep`."""


class TorchEngine:
    """The stock transformers model, one sequence at a time."""

    largest_batch = 1

    def __init__(self, model: Any, dtype: FloatName, context: int) -> None:
        self._model = model
        self._body = model.get_decoder()
        self._classifier = model.get_output_embeddings()
        self._layers = model.config.num_hidden_layers
        self.hidden_size: int = model.config.hidden_size
        self.vocab_size: int = 0 if self._classifier is None else model.config.vocab_size
        self.context = context
        self.dtype = dtype

    @classmethod
    def load(
        cls, folder: Path, dtype: FloatName, device: str, context: int | None = None, attention: str = "sdpa"
    ) -> TorchEngine:
        """Loads a stock checkpoint without its embedding, and without its classifier if the manifest says that it is
        absent. Raises BundleError if it is not whole."""
        manifest = read_manifest(folder, CloudManifest)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            local_files_only=True,
        )
        missing, unknown = set(info["missing_keys"]) - set(manifest.absent), set(info["unexpected_keys"])
        if missing or unknown or info["mismatched_keys"]:
            raise BundleError(
                f"{folder}: the checkpoint does not fit its architecture: {len(missing)} tensors missing, "
                f"{len(unknown)} unknown, {len(info['mismatched_keys'])} of another shape",
                hint="export it again",
            )
        model.set_input_embeddings(None)  # devices embed; the random table that the stock class made is not needed
        classifier = model.get_output_embeddings()
        if any(f"{name}.weight" in manifest.absent for name, module in model.named_modules() if module is classifier):
            model.set_output_embeddings(None)  # devices classify
        longest = model.config.max_position_embeddings
        return cls(model.eval().to(device), dtype, min(context or longest, longest))

    def new_cache(self) -> KVCache:
        return KVCache(self._layers)

    def run(self, batch: Sequence[Work]) -> list[Result]:
        return [self._run_one(work) for work in batch]

    @torch.inference_mode()
    def _run_one(self, work: Work) -> Result:
        # [n, hidden]
        embeddings = _to_torch(work.embeddings).to(self._model.device, TORCH_DTYPES[self.dtype])
        try:
            hidden = self._repeated(work, embeddings)
            if hidden is None:
                work.cache.cut(work.keep)
                states = self.forward(work.cache, inputs_embeds=embeddings[None])[0]
                work.cache.last = Last(embeddings[-1:].clone(), states[-1:].clone())
                hidden = states[len(states) - work.rows :]
            sent_as = TORCH_DTYPES[work.dtype]
            if work.want == "hidden":
                return HiddenRows(_to_numpy(_finite(hidden.to(sent_as))))
            return self.logit_rows(self._classifier(hidden).to(sent_as), work.top_k, work.temperature)
        except BaseException:
            work.cache.cut(work.keep)
            raise

    @staticmethod
    def _repeated(work: Work, embeddings: torch.Tensor) -> torch.Tensor | None:
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
        wide = _finite(logits).float()
        at_one = torch.logsumexp(wide, -1)
        at_temperature = at_one if temperature == 1.0 else torch.logsumexp(wide / temperature, -1)
        log_sum_exp = torch.stack([at_one, at_temperature], -1).cpu().numpy()
        if top_k == 0:
            return LogitRows(_to_numpy(logits), np.empty((len(logits), 0), np.uint32), log_sum_exp)
        top = torch.topk(wide, min(top_k, logits.shape[-1]), sorted=False)
        values, ids = top.values.cpu().numpy(), top.indices.cpu().numpy().astype(np.uint32)
        order = np.lexsort((ids, -values))
        values, ids = np.take_along_axis(values, order, -1), np.take_along_axis(ids, order, -1)
        # Back to the dtype it was computed in: exact, as it came from there.
        return LogitRows(values.astype(DTYPES[str(logits.dtype).removeprefix("torch.")]), ids, log_sum_exp)


def open_context(
    folder: Path, *, dtype: str = "auto", device: str = "auto", context: int | None = None, verify: bool = False
) -> tuple[CloudManifest, TorchEngine]:
    """Checks an exported cloud folder and loads it. `verify` hashes every byte; shard headers are always checked."""
    manifest = read_manifest(folder, CloudManifest)
    check_files(folder, manifest, contents=verify)
    chosen = manifest.dtype if dtype == "auto" else next(name for name in TORCH_DTYPES if name == dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BundleError(
            "device cuda: torch finds no CUDA device", hint="--device cpu, or install a CUDA build of torch"
        )
    return manifest, TorchEngine.load(folder, chosen, device, context)


def _finite(values: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise ArithmeticError("the model computed values that are not finite")
    return values


def _to_torch(array: Array) -> torch.Tensor:
    """A copy as a tensor (numpy's bfloat16 is not torch's)."""
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _to_numpy(tensor: torch.Tensor) -> Array:
    tensor = tensor.cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return tensor.numpy()
