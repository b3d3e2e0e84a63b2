"""llama.cpp's own loop on an unprotected file: token ids in, the likeliest next id out, one after the other."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloud_backend.llama.context import KVDtype, LlamaModel, set_kv_dtype
from cloud_backend.llama.library import floats, library


@dataclass(frozen=True)
class Continued:
    """Greedy ids behind a prompt, and what each took after the first, in seconds."""

    ids: list[int]
    seconds: list[float]


class PlainLlama:
    """A GGUF file in llama.cpp, as its own programs would run it: one sequence, fed token ids."""

    def __init__(self, path: Path, *, context: int = 2048, kv_dtype: KVDtype = "float16", threads: int = 2) -> None:
        self._c = c = library()
        self._model = LlamaModel(path, gpu=False)
        parameters = c.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_threads = parameters.n_threads_batch = threads
        set_kv_dtype(parameters, kv_dtype)
        self._context = c.llama_init_from_model(self._model.pointer, parameters)

    def __call__(self, prompt: Sequence[int], count: int) -> Continued:
        """`count` ids behind those of a prompt."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        ids, seconds = [self._next(prompt)], []
        while len(ids) < count:
            began = time.perf_counter()
            ids.append(self._next(ids[-1:]))
            seconds.append(time.perf_counter() - began)
        return Continued(ids, seconds)

    def _next(self, ids: Sequence[int]) -> int:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode")
        logits = self._c.llama_get_logits_ith(self._context, -1)
        return int(floats(logits, self._model.vocab_size).argmax())
