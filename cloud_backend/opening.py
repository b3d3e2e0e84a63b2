"""Opens an exported cloud folder: checks it, chooses the engine for its kind and its weights, and loads it."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
import transformers
from safetensors import safe_open

from cloud_backend.decoder import DecoderEngine
from cloud_backend.encoder import EncoderEngine
from cloud_backend.engine import Engine
from cloud_backend.tensors import TORCH_DTYPES
from cloud_backend.translation import TranslationEngine
from cloud_backend.vision import ImageEncoderEngine, VisionEngine
from shared.errors import BundleError
from shared.manifest import CloudManifest, Kind, check_files, read_manifest
from shared.wire import FloatName

if TYPE_CHECKING:
    from cloud_backend.tensor_parallel.ranks import Ranks

log = logging.getLogger("stip.cloud")

# The engine of each kind, and the stock classes it runs; a decoder's is any that gives the next token's logits.
ENGINES: dict[Kind, tuple[type[DecoderEngine] | type[EncoderEngine], tuple[str, ...]]] = {
    "decoder": (DecoderEngine, ("*ForCausalLM", "*LMHeadModel")),
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


NVIDIA = Path("/dev/nvidiactl")  # where a machine has a card: a torch that does not see it is no reason to do without
SHARE = {"cpu": 4, "cuda": 2}  # of the free memory that sessions get: one part in so many

EngineName = Literal["auto", "torch", "llama.cpp"]
RUN_BY: dict[str, EngineName] = {"safetensors": "torch", "gguf": "llama.cpp"}


def open_context(
    folder: Path,
    *,
    engine: EngineName = "auto",
    dtype: str = "auto",
    device: str = "auto",
    context: int | None = None,
    kv_bytes: int | None = None,
    verify: bool = False,
    ranks: Ranks | None = None,
) -> tuple[CloudManifest, Engine]:
    """Checks an exported cloud folder and loads it. `verify` hashes every byte; shard headers are always checked.

    engine: auto takes the one that runs weights of this kind. kv_bytes: the budget of KV memory; None takes a share of
    what is free once the model is loaded.
    ranks: the processes that share the model, where there are several; its device is theirs.

    Raises BundleError where the folder is not whole, or holds a model that its kind or the engine does not fit, and
    UsageError where the engine is not there, or KV memory is too little or cannot be had.
    """
    manifest = read_manifest(folder, CloudManifest)
    check_engine(folder, manifest, engine)
    check_files(folder, manifest, contents=verify)
    if manifest.weights == "gguf" and ranks is None:
        from cloud_backend.llama.opening import open_llama

        return manifest, open_llama(folder, manifest, dtype=dtype, device=device, context=context, kv_bytes=kv_bytes)
    device = ranks.device if ranks is not None else device_called(device)
    chosen = dtype_of(manifest, device) if dtype == "auto" else next(name for name in TORCH_DTYPES if name == dtype)
    if ranks is not None:
        from cloud_backend.tensor_parallel.engine import open_split

        return manifest, open_split(folder, manifest, chosen, context, kv_bytes, ranks)
    kind, _ = ENGINES[manifest.kind]
    model = load_model(folder, chosen, device)
    return manifest, kind(model, chosen, context, kv_bytes or free_memory(device) // SHARE[device])


def device_called(name: str) -> Literal["cpu", "cuda"]:
    """The device that `auto`, `cpu` or `cuda` means on this machine. Raises BundleError where there is none such."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available() and not NVIDIA.exists()):
        return "cpu"
    if not torch.cuda.is_available():
        raise BundleError(
            "device cuda: torch finds no CUDA device",
            hint="install a build of torch that fits its driver, or say --device cpu",
        )
    return "cuda"


def check_engine(folder: Path, manifest: CloudManifest, engine: EngineName) -> None:
    """Raises BundleError where an engine does not run the weights of a folder."""
    wanted = RUN_BY[manifest.weights]
    if engine not in ("auto", wanted):
        raise BundleError(
            f"{folder}: its weights are {manifest.weights}, which {engine} does not run",
            hint=f"serve it with --engine {wanted}; or export it again, "
            + ("with --gguf q8_0" if engine == "llama.cpp" else "without --gguf"),
        )


def dtype_of(manifest: CloudManifest, device: str) -> FloatName:
    """The checkpoint's own dtype; float32 for bfloat16 on a processor that has no instructions for it."""
    if manifest.dtype == "bfloat16" and device == "cpu" and not has_bfloat16():
        log.info("%s: float32, as this processor has no bfloat16 instructions", manifest.served_name)
        return "float32"
    return manifest.dtype


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 by itself."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def free_memory(device: str) -> int:
    """Bytes that are free on a device now."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def load_model(folder: Path, dtype: FloatName, device: str, **options: Any) -> Any:
    """The stock model of a folder, without what the manifest says is absent from it. options: of `from_pretrained`.

    Raises BundleError if the checkpoint does not fit its architecture, or the architecture is not one of its kind.
    """
    manifest = read_manifest(folder, CloudManifest)
    model, info = stock_class(folder, manifest.kind).from_pretrained(
        folder,
        dtype=TORCH_DTYPES[dtype],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused below
        local_files_only=True,
        **options,
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


def stock_class(folder: Path, kind: Kind) -> Any:
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
