"""Opens an exported cloud folder on llama.cpp: the GGUF file must be the manifest's, and fit its config."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import psutil
import transformers

from cloud_backend import opening
from cloud_backend.kv_cache import PAGE, PagePool, cannot_be_allocated
from cloud_backend.llama.context import KVDtype, LlamaModel
from cloud_backend.llama.engine import LlamaEngine
from cloud_backend.llama.library import gpu_memory, gpus
from shared.errors import BundleError, UsageError
from shared.manifest import CloudManifest

log = logging.getLogger("stip.cloud")

WEIGHTS = "model.gguf"
FULL_SESSIONS = 4  # of full length, for which there is memory unless the command line says how much
KV_BYTES = {"float16": 2, "float32": 4}  # of a value


def open_llama(
    folder: Path,
    manifest: CloudManifest,
    *,
    dtype: str = "auto",
    device: str = "auto",
    context: int | None = None,
    kv_bytes: int | None = None,
) -> LlamaEngine:
    """The engine of a folder whose files are checked.

    dtype: auto or float32, as the file says what weights are. kv_bytes: the KV memory; None takes what a few sessions
    of full length need, and at most a share of what is free once the weights are loaded.

    Raises BundleError for a file that is another export's or that llama.cpp cannot load, and UsageError where it cannot
    run as asked.
    """
    if dtype not in ("auto", "float32"):
        raise UsageError(
            f"dtype: seen {dtype}, wanted auto: llama.cpp computes as its file has the weights",
            hint=f"export it with --gguf {'bf16' if dtype == 'bfloat16' else 'f16'}",
        )
    where = _device(device)
    model = LlamaModel(folder / WEIGHTS, gpu=where == "cuda")
    _check(folder, manifest, model)
    # Where the weights are float32, so is all that is computed: nothing is rounded that the unprotected model keeps.
    kv_dtype: KVDtype = "float32" if manifest.quantisation == "f32" else "float16"
    page_bytes = PAGE * _position_values(model) * KV_BYTES[kv_dtype]
    longest = min(context or model.context, model.context)
    wanted = FULL_SESSIONS * -(-longest // PAGE) * page_bytes
    free = gpu_memory() if where == "cuda" else opening.free_memory("cpu")
    pool = PagePool(page_bytes, kv_bytes or min(wanted, free // opening.SHARE[where]))
    log.info(
        "%s: llama.cpp, %s; KV memory in %s: %d MiB, %d positions",
        manifest.served_name,
        manifest.quantisation,
        kv_dtype,
        pool.budget >> 20,
        pool.positions,
    )
    vocab_size = 0 if model.vocab_size == 1 else model.vocab_size  # 1: devices classify
    # llama.cpp writes to all of it at once, and a system may give more than there is until then.
    if where == "cpu" and pool.budget > psutil.virtual_memory().total:
        raise cannot_be_allocated(pool.budget)
    try:
        return LlamaEngine(model, pool, context=longest, vocab_size=vocab_size, kv_dtype=kv_dtype, device=where)
    except MemoryError:
        raise cannot_be_allocated(pool.budget) from None


def _device(asked: str) -> Literal["cpu", "cuda"]:
    """Where it computes. A graphics card of any make counts as cuda: steps are as large there."""
    cards = [] if asked == "cpu" else gpus()
    if asked == "cuda" and not any(name.startswith("CUDA") for name in cards):
        raise UsageError(
            f"device cuda: this build of llama.cpp can use {', '.join(cards) or 'no graphics card'}",
            hint="CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-binary llama-cpp-python "
            "llama-cpp-python; or say --device cpu",
        )
    return "cuda" if cards else "cpu"


def _check(folder: Path, manifest: CloudManifest, model: LlamaModel) -> None:
    """Raises BundleError unless the file has the manifest's key and the sizes of config.json."""
    path = folder / WEIGHTS
    if model.says("stip.key_id") != manifest.key_id:
        raise BundleError(f"{path}: a GGUF of another key", hint="copy the whole folder again from one export")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}: config.json: {str(error).splitlines()[0]}", hint="export it again") from None
    for name, seen, wanted in (
        ("hidden size", model.width, config.hidden_size),
        ("layers", model.layers, config.num_hidden_layers),
        ("vocabulary", model.vocab_size, 1 if "lm_head.weight" in manifest.absent else config.vocab_size),
    ):
        if seen != wanted:
            raise BundleError(
                f"{path}: {name}: seen {seen}, wanted {wanted} as config.json says", hint="export it again"
            )


def _position_values(model: LlamaModel) -> int:
    """Numbers that a position leaves in the KV memory."""
    name = model.says("general.architecture")
    width = model.head_width
    sizes = (model.says(f"{name}.attention.{which}_length") for which in ("key", "value"))
    return model.layers * model.key_value_heads * sum(int(size or width) for size in sizes)
