"""One export, from source to two folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from transformers import PretrainedConfig

from export.check import Check, check_equivalence, sample_ids
from export.classifier import export_classifier
from export.embedding import export_embedding
from export.families import Axis, Dropped, Family, Features, Structure, family_of, normalized
from export.progress import bar
from export.scheme import Head, Scheme, SchemeName, draw
from export.shards import TensorPlan, plan_shards, write_index, write_shard
from export.source import Source, open_source
from export.tokenizer import export_tokenizer
from shared.errors import ExportError, FamilyError
from shared.key import new_key_id
from shared.manifest import CloudManifest, DeviceManifest, FileEntry, file_entry, write_manifest
from shared.wire import FloatName

SEEDED = "seeded: not for use"
DTYPES: dict[FloatName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SAMPLE = (
    "The cabin was quiet. She asked the assistant to find a charging station near the river, to read the news, "
    "and then, after a pause, whether it would snow on Friday; 42 kilometres later the answer came: “Probably not.”"
)


@dataclass(frozen=True)
class Report:
    """What an export did. Written to OUT/export.json for the model developer; holds no secret."""

    served_name: str
    key_id: str
    family: str
    scheme: str
    head: Head
    dtype: FloatName
    log2_keys: float | None  # None where the secrets are not countable
    tokenizer: str
    tokenizer_proof: str
    check: Check
    unmoved: dict[str, str]  # tensors that are stored as they were, and why
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
    shard_bytes: int = 2 * 2**30,
    seed: int | None = None,
) -> Report:
    """Exports `model` (hub id, folder or .gguf) to OUT/cloud, OUT/device and OUT/export.json.

    head: where the classifier runs. On the device it must be tied, as devices hold the embedding table alone.
    dtype: of the stored weights; auto keeps the source's, or float32 where it is mixed or quantised.
    name: what devices ask for; by default `model-` and part of the key id, as the cloud need not know more.
    seed: for tests alone; the output then says that it is not for use.
    Raises ExportError; nothing is then left at `out`.
    """
    started = time.monotonic()
    if out.exists():
        raise ExportError(f"output {out}: it exists already", hint="give a new folder, or remove that one first")
    source = open_source(model)
    family = family_of(source.config)
    if head == "device" and not source.config.tie_word_embeddings:
        raise ExportError(
            f"model {model!r}: its classifier is a matrix of its own ({family.classifier}), wanted a tied one, as a "
            "device holds the embedding table alone",
            hint="--head cloud",
        )
    absent = [family.embedding] if head == "cloud" else [family.embedding, family.classifier]
    random_bytes = os.urandom if seed is None else random.Random(seed).randbytes
    drawn = draw(scheme, _used_spaces(source, family, absent), random_bytes)
    stored = source.dtype if dtype == "auto" else DTYPES[dtype]
    dtype_name = next(known for known, kind in DTYPES.items() if kind is stored)
    key_id = new_key_id()
    common: dict[str, Any] = {
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
        files, unmoved = _write_cloud(source, family, drawn, stored, cloud, key_id, shard_bytes, absent)
        write_manifest(CloudManifest(**common, files=files, absent=absent), cloud)
        drawn.user_key(key_id, head=head).save(device / "key.safetensors")
        export_embedding(source.read(family.embedding).to(stored), device)
        if head == "device":
            gain = drawn.folded(_axes(family, family.classifier))
            export_classifier(
                stored,
                source.shapes[family.embedding],
                device,
                gain=None if gain is None else source.read(gain).to(stored),
            )
        tokenizer = source.tokenizer()
        text = export_tokenizer(tokenizer, device)
        if tokenizer.chat_template:
            (device / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
        vocab_size = normalized(source.config).vocab_size
        ids = sample_ids(vocab_size, tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"])
        check = check_equivalence(source, family, drawn, stored, cloud, device, ids, head)
        write_manifest(
            DeviceManifest(
                **common,
                files=_entries(device),
                family=family.name,
                head=head,
                hidden_size=normalized(source.config).hidden_size,
                vocab_size=vocab_size,
                context=source.config.max_position_embeddings,
                tokenizer=text.kind,
                tokenizer_proof=text.reason,
                prefix_ids=_prefix_ids(tokenizer),
                end_ids=source.end_ids(),
                hidden_ids=sorted(tokenizer.all_special_ids),
                special_tokens={key: str(value) for key, value in tokenizer.special_tokens_map.items()},
                check=msgspec.to_builtins(check),
            ),
            device,
        )
        report = Report(
            **{field: common[field] for field in ("served_name", "key_id", "scheme", "dtype", "warning")},
            family=family.name,
            head=head,
            log2_keys=None if drawn.log2_keys is None else round(drawn.log2_keys, 1),
            tokenizer=text.kind,
            tokenizer_proof=text.reason,
            check=check,
            unmoved=unmoved,
            seconds=round(time.monotonic() - started, 1),
        )
        (folder / "export.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report


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
        raise ExportError(f"output {out}: {error.strerror or error}", hint="is the disk full?") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _axes(family: Family, name: str) -> tuple[Axis, ...]:
    """The axes of a tensor that is not dropped."""
    axes = family.axes(name)
    assert not isinstance(axes, Dropped)
    return axes


def _used_spaces(source: Source, family: Family, absent: list[str]) -> list[Structure]:
    """The structures to draw secrets for. With neither table in the cloud, the vocabulary's order would hide nothing,
    and must not count as part of the key space."""
    structures = list(family.spaces(source.config))
    if family.classifier not in absent:
        return structures
    return [
        structure for structure in structures if not (isinstance(structure, Features) and structure.name == "vocab")
    ]


def _write_cloud(
    source: Source,
    family: Family,
    scheme: Scheme,
    dtype: torch.dtype,
    folder: Path,
    key_id: str,
    shard_bytes: int,
    absent: list[str],
) -> tuple[dict[str, FileEntry], dict[str, str]]:
    """The transformed checkpoint, tensor by tensor, but for what is `absent` from it.

    Gives its files, and why which tensors stayed as they were.
    """
    origin = {name: name for name in source.shapes if name not in absent}
    if family.embedding not in source.shapes:
        raise FamilyError(f"tensor {family.embedding!r}: missing from the source", hint="is the checkpoint complete?")
    if source.config.tie_word_embeddings and family.classifier not in absent:
        origin[family.classifier] = family.embedding  # untied: the cloud gets a permuted copy as its classifier
    table = {name: axes for name in sorted(origin) if not isinstance(axes := family.axes(name), Dropped)}
    plans = [TensorPlan(name, source.shapes[origin[name]], dtype) for name in table]
    shards = plan_shards(plans, shard_bytes)
    progress = bar(plans, "transforming")

    def transformed() -> Iterator[tuple[str, torch.Tensor]]:
        for plan in progress:
            tensor = source.read(origin[plan.name])
            yield plan.name, scheme.act(plan.name, tensor, table[plan.name], source.read).to(dtype)

    tensors = transformed()
    for file, planned in shards.items():
        part = (next(tensors) for _ in planned)
        write_shard(folder / file, planned, part, {"key_id": key_id, "file": file})
    next(progress, None)  # lets the bar finish
    write_index(folder, shards)
    config = _cloud_config(source.config, dtype)
    if family.classifier in absent:
        # Its true width would tell the base model, and make the stock class allocate two tables that nothing needs.
        config["vocab_size"] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    unmoved = {name: reason for name, axes in table.items() if (reason := scheme.unmoved(axes))}
    return _entries(folder), unmoved


def _cloud_config(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The stock architecture's own settings and nothing else: no names, no paths, no token ids."""
    known = type(config)().to_dict().keys()
    kept = {
        key: value
        for key, value in config.to_dict().items()
        if key in known
        and not key.startswith("_")
        and not key.endswith(("_token_id", "_token_ids"))
        and "label" not in key
    }
    # Written out as null, so that the stock class does not put its own defaults there.
    kept |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return kept | {
        "architectures": config.architectures,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "model_type": config.model_type,
    }


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {path.name: file_entry(path) for path in bar(sorted(folder.iterdir()), f"digests of {folder.name}")}


def _prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before plain text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return [] if full[: len(bare)] == bare else full[: full.index(bare[0])]
