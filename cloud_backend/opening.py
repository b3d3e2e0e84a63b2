"""Opens an exported cloud folder: checks it, loads the stock model, and chooses the engine for its kind."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from cloud_backend.encoder import EncoderEngine
from cloud_backend.engine import Engine, TorchEngine
from cloud_backend.tensors import TORCH_DTYPES
from cloud_backend.translation import TranslationEngine
from cloud_backend.vision import ImageEncoderEngine, VisionEngine
from shared.errors import BundleError
from shared.manifest import CloudManifest, Kind, check_files, read_manifest
from shared.wire import FloatName

# The engine of each kind, and the stock classes it runs; a decoder's is any that gives the next token's logits.
ENGINES: dict[Kind, tuple[type[TorchEngine] | type[EncoderEngine], tuple[str, ...]]] = {
    "decoder": (TorchEngine, ("*ForCausalLM", "*LMHeadModel")),
    "encoder": (
        EncoderEngine,
        (
            "BertModel",
            "BertForSequenceClassification",
            "RobertaModel",
            "RobertaForSequenceClassification",
            "XLMRobertaModel",
            "XLMRobertaForSequenceClassification",
            "DistilBertModel",
            "DistilBertForSequenceClassification",
        ),
    ),
    "image-encoder": (ImageEncoderEngine, ("ViTModel", "ViTForImageClassification")),
    "vision-decoder": (VisionEngine, ("LlavaForConditionalGeneration",)),
    "encoder-decoder": (TranslationEngine, ("MarianMTModel",)),
}


def open_context(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    context: int | None = None,
    verify: bool = False,
    kv_bytes: int | None = None,
) -> tuple[CloudManifest, Engine]:
    """Checks an exported cloud folder and loads it. `verify` hashes every byte; shard headers are always checked.

    kv_bytes: what its KV caches may take of memory.

    Raises BundleError where the folder is not whole, or holds a model that its kind does not fit.
    """
    manifest = read_manifest(folder, CloudManifest)
    check_files(folder, manifest, contents=verify)
    chosen = manifest.dtype if dtype == "auto" else next(name for name in TORCH_DTYPES if name == dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BundleError(
            "device cuda: torch finds no CUDA device", hint="--device cpu, or install a CUDA build of torch"
        )
    engine, _ = ENGINES[manifest.kind]
    return manifest, engine(load_model(folder, chosen, device), chosen, context)


def load_model(folder: Path, dtype: FloatName, device: str) -> Any:
    """The stock model of a folder, without what the manifest says is absent from it.

    Raises BundleError if the checkpoint does not fit its architecture, or the architecture is not one of its kind.
    """
    manifest = read_manifest(folder, CloudManifest)
    model, info = _stock_class(folder, manifest.kind).from_pretrained(
        folder,
        dtype=TORCH_DTYPES[dtype],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused below
        local_files_only=True,
    )
    missing = _tensors(model) - _stored(folder, manifest) - set(manifest.absent)
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise BundleError(
            f"{folder}: the checkpoint does not fit its architecture: {len(missing)} tensors missing, "
            f"{len(info['unexpected_keys'])} unknown, {len(info['mismatched_keys'])} of another shape",
            hint="export it again",
        )
    _leave_out(model, manifest.absent)
    return model.eval().to(device)


def _stock_class(folder: Path, kind: Kind) -> Any:
    """The class of transformers that config.json names."""
    try:
        names = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures or []
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}: config.json: {str(error).splitlines()[0]}", hint="export it again") from None
    _, wanted = ENGINES[kind]
    seen = ", ".join(map(str, names)) or "none"
    if len(names) != 1 or not any(fnmatchcase(names[0], pattern) for pattern in wanted):
        raise BundleError(
            f"{folder}: config.json: architectures: seen {seen}, wanted one {kind}: {' or '.join(wanted)}",
            hint="export it again with this version of stip-export",
        )
    stock = getattr(transformers, names[0], None)
    if not isinstance(stock, type) or not issubclass(stock, transformers.PreTrainedModel):
        raise BundleError(
            f"{folder}: config.json: architectures: seen {seen}, wanted a model class of transformers",
            hint=f"is transformers {transformers.__version__} too old for it?",
        )
    return stock


def _tensors(model: Any) -> set[str]:
    """Names of every tensor that a checkpoint of the model has, tied ones once.

    transformers' own report of what is missing leaves out some that it can make anew, such as sinusoidal positions;
    but those belong to devices, and the cloud's must be the zeros of the checkpoint.
    """
    buffers = {name for name, _ in model.named_buffers()} & set(model.state_dict())  # the others are not stored
    return buffers | {name for name, _ in model.named_parameters()}


def _stored(folder: Path, manifest: CloudManifest) -> set[str]:
    """Names of the tensors in the folder's shards."""
    names: set[str] = set()
    for file in manifest.files:
        if file.endswith(".safetensors"):
            with safe_open(folder / file, "pt") as shard:
                names.update(shard.keys())
    return names


def _leave_out(model: Any, absent: list[str]) -> None:
    """Removes the tensors that devices have instead: the stock class made them of random numbers."""
    for name in absent:
        module, _, tensor = name.rpartition(".")
        setattr(model.get_submodule(module), tensor, None)
