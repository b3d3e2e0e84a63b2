"""One export, from source to two folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from export.check import Check, check_equivalence
from export.cloud_half import plan_cloud, unmoved, used_structures, write_cloud, write_config
from export.device_half import write_device
from export.families import Family, family_of
from export.gguf.half import GgufName, plan_gguf
from export.gguf.writing import write_gguf_half
from export.original import original
from export.permutation import Permutation
from export.progress import bar
from export.scheme import Head, SchemeName
from export.schemes import draw
from export.source import Source, open_source
from export.successors import write_successors
from shared.errors import ExportError
from shared.key import new_key_id
from shared.manifest import CloudManifest, DeviceManifest, FileEntry, file_entry, write_manifest
from shared.wire import FloatName

Drafts = Literal["table", "none"]
SEEDED = "seeded: not for use"
DTYPES: dict[FloatName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Report:
    """What an export did. Written to OUT/export.json for the model developer; holds no secret."""

    served_name: str
    key_id: str
    family: str
    scheme: str
    head: Head
    streams: Mapping[str, str]  # what hides each residual stream
    dtype: FloatName
    quantisation: str | None  # what matrices of a GGUF file are stored as; None for safetensors
    log2_keys: float | None  # None where the secrets are not countable
    log2_keys_free: float | None  # what it would be without the blocks of quantised values; None where there are none
    tokenizer: str
    tokenizer_proof: str
    check: Check
    unmoved: dict[str, str]  # tensors that are stored as they were, and why
    unquantised: list[str]  # matrices in float32 all the same, as their columns are not whole blocks
    seconds: float
    warning: str | None


def export_model(
    model: str,
    out: Path,
    *,
    scheme: SchemeName = "permutation",
    head: Head = "cloud",
    dtype: FloatName | Literal["auto"] = "auto",
    name: str | None = None,
    gguf: GgufName | None = None,
    shard_bytes: int = 2 * 2**30,
    drafts: Drafts = "table",
    seed: int | None = None,
) -> Report:
    """Exports `model` (hub id, folder or .gguf) to OUT/cloud, OUT/device and OUT/export.json.

    head: where the classifier runs. On the device it must be tied, as devices hold the embedding table alone.
    dtype: of the stored weights; auto keeps the source's, or float32 where it is mixed or quantised.
    gguf: stores the cloud's weights as a GGUF file of this type, for llama.cpp; `dtype` is then of devices alone.
    name: what devices ask for; by default `model-` and part of the key id, as the cloud need not know more.
    drafts: whether devices of a decoder get a table of likely successors to draft from.
    seed: for tests alone; the output then says that it is not for use.
    Raises ExportError; nothing is then left at `out`.
    """
    started = time.monotonic()
    if out.exists():
        raise ExportError(f"output {out}: it exists already", hint="give a new folder, or remove that one first")
    source = open_source(model)
    family = family_of(source.config)
    if head == "device":
        _check_tied(model, source, family)
    structures = family.spaces(source.config)
    plan = plan_cloud(source, family, head)
    random_bytes = os.urandom if seed is None else random.Random(seed).randbytes
    key_id = new_key_id()
    made = None if gguf is None else plan_gguf(source, family, plan, gguf, scheme, key_id)
    drawn = draw(scheme, used_structures(structures, plan), random_bytes, None if made is None else made.blocks(plan))
    stored = source.dtype if dtype == "auto" else DTYPES[dtype]
    dtype_name = next(known for known, kind in DTYPES.items() if kind is stored)
    weights: dict[str, Any] = {} if made is None else {"weights": "gguf", "quantisation": made.quantisation}
    common: dict[str, Any] = {
        "kind": family.kind,
        "key_id": key_id,
        "served_name": name or f"model-{key_id[:8]}",
        "scheme": drawn.name,
        "dtype": dtype_name,
        "warning": None if seed is None else SEEDED,
    }
    with _appearing_whole(out) as folder:
        cloud, device = folder / "cloud", folder / "device"
        cloud.mkdir()
        device.mkdir(mode=0o700)
        if made is None:
            write_cloud(source, family, drawn, plan, stored, cloud, key_id, shard_bytes)
            rounding, read = stored, original(source, family, stored)
        else:
            write_gguf_half(source, drawn, plan, made, cloud)
            write_config(source.config, family, plan, stored, cloud)
            rounding, read = made.dtype, made.original(source, family, stored)
        write_manifest(CloudManifest(**common, **weights, files=_entries(cloud), absent=plan.absent), cloud)
        half = write_device(source, family, drawn, stored, device, key_id, head)
        check = check_equivalence(source, family, drawn, rounding, cloud, device, half.samples, head, read)
        if drafts == "table" and family.kind in ("decoder", "vision-decoder"):
            before, banned = half.described["prefix_ids"], half.described["banned_ids"]
            write_successors(source, family, stored, device, before, banned)
        manifest = DeviceManifest(**common | half.described, files=_entries(device), check=msgspec.to_builtins(check))
        write_manifest(manifest, device)
        report = Report(
            **{field: common[field] for field in ("served_name", "key_id", "scheme", "dtype", "warning")},
            family=family.name,
            head=head,
            streams=manifest.streams,
            quantisation=weights.get("quantisation"),
            log2_keys=_tenths(drawn.log2_keys),
            log2_keys_free=_tenths(drawn.log2_keys_free) if isinstance(drawn, Permutation) else None,
            tokenizer=manifest.tokenizer,
            tokenizer_proof=manifest.tokenizer_proof,
            check=check,
            unmoved=unmoved(drawn, plan),
            unquantised=[] if made is None else made.unquantised,
            seconds=round(time.monotonic() - started, 1),
        )
        (folder / "export.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report


def _tenths(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _check_tied(model: str, source: Source, family: Family) -> None:
    """Raises ExportError where devices could not classify with the embedding table they hold."""
    if family.kind != "decoder":
        raise ExportError(
            f"model {model!r}: seen a model of kind {family.kind}, wanted a decoder of text for --head device",
            hint="--head cloud",
        )
    assert family.classifier is not None
    if source.tied.get(family.classifier) != family.embedding:
        raise ExportError(
            f"model {model!r}: its classifier is a matrix of its own ({family.classifier}), wanted a tied one, as a "
            "device holds the embedding table alone",
            hint="--head cloud",
        )


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name on success and vanishes on any failure, Ctrl-C included."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ExportError(f"output {out}: {error.strerror}", hint="give a folder you may write to") from None
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "give a folder on a disk with more room" if full else None
        raise ExportError(f"output {out}: {error.strerror or error}", hint=hint) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {path.name: file_entry(path) for path in bar(sorted(folder.iterdir()), f"digests of {folder.name}")}
