"""The device's half of an export: key, embeddings, tokenizer or image format, and what its manifest says of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.classifier import export_classifier
from export.embedding import Patches, export_embedding, export_image
from export.families import Family, ImageInput, longest
from export.original import folded_gain, has_pooler, original
from export.samples import IMAGE_AT, POSITIONS, Samples, sample_ids
from export.scheme import Head, Scheme
from export.source import Source
from export.tokenizer import export_tokenizer
from shared.errors import ExportError
from shared.manifest import ImageFormat

SAMPLE = (
    "The cabin was quiet. She asked the assistant to find a charging station near the river, to read the news, "
    "and then, after a pause, whether it would snow on Friday; 42 kilometres later the answer came: “Probably not.”"
)
SAMPLE_IMAGES = 8


@dataclass
class DeviceHalf:
    """What was written, for the manifest, and what the check is to try."""

    described: dict[str, Any] = field(default_factory=dict)  # fields of DeviceManifest
    samples: Samples = field(default_factory=Samples)


def write_device(
    source: Source, family: Family, scheme: Scheme, dtype: torch.dtype, folder: Path, key_id: str, head: Head
) -> DeviceHalf:
    """Writes all but the manifest and the table of successors. Raises ExportError."""
    key = scheme.user_key(key_id, head=head)
    key.save(folder / "key.safetensors")
    config = source.config
    half = DeviceHalf()
    half.described |= {
        "kind": family.kind,
        "family": family.name,
        "head": head,
        "hidden_size": key.hidden_size,
        "vocab_size": 0,
        "encoder_size": 0 if key.encoder is None else len(key.encoder),
        "streams": {
            name: "rotation" if scheme.turns(name) else "permutation"
            for name in ("residual", *(() if key.encoder is None else ("encoder",)))
        },
        "labels": _labels(config, key.vocab_size) if family.kind in ("encoder", "image-encoder") else [],
        "activation": _activation(config) if family.kind in ("encoder", "image-encoder") else "softmax",
        "tokenizer": "none",
        "tokenizer_proof": "this model takes no text",
        "prefix_ids": [],
        "end_ids": [],
        "hidden_ids": [],
        "special_tokens": {},
    }
    if family.text is not None:
        _write_text(source, family, dtype, folder, half)
    if family.image is not None:
        _write_images(source, family, family.image, dtype, folder, half)
    if head == "device":
        _write_classifier(source, family, scheme, dtype, folder)
    if family.kind in ("encoder", "image-encoder"):
        half.described |= _outputs(source, family, half.described)
    return half


def _write_text(source: Source, family: Family, dtype: torch.dtype, folder: Path, half: DeviceHalf) -> None:
    assert family.text is not None
    text, config = family.text, source.config
    read = original(source, family, dtype)
    positions = None if text.positions is None else text.positions(config, lambda name: read(name).float())
    table = read(text.table)
    export_embedding(table, folder, scale=text.scale(config), positions=positions)
    context = longest(config) if positions is None else len(positions)
    tokenizer = source.tokenizer()
    report = export_tokenizer(tokenizer, folder)
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
    prefix, suffix = _around(tokenizer)
    half.described |= {
        "vocab_size": len(table),
        "context": context,
        "tokenizer": report.kind,
        "tokenizer_proof": report.reason,
        "prefix_ids": prefix,
        "suffix_ids": [] if family.kind in ("decoder", "vision-decoder") else suffix,
        "end_ids": source.end_ids(),
        "banned_ids": source.banned_ids(),
        "hidden_ids": sorted(tokenizer.all_special_ids),
        "special_tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
    sample = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    ids = sample_ids(len(table), sample, min(POSITIONS, context))
    if (padding := config.get_text_config().pad_token_id) is not None:
        ids[ids == padding] = (padding + 1) % len(table)  # it stands between texts, and RoBERTa does not count it
    if family.kind == "encoder-decoder":
        half.described |= {"encoder_context": context, "start_ids": [config.decoder_start_token_id]}
        half.samples = Samples(ids, ids[:, ::-1].copy())
    else:
        # Class logits are a row a sequence.
        short = max(1, len(ids[0]) // 8)
        half.samples = Samples(ids[:, : 8 * short].reshape(-1, short) if half.described["labels"] else ids)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before plain text, and behind it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(at for at in range(len(full)) if full[at : at + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _write_images(
    source: Source, family: Family, image: ImageInput, dtype: torch.dtype, folder: Path, half: DeviceHalf
) -> None:
    read, config, settings = original(source, family, dtype), image.config(source.config), source.image_settings()
    sides = config.image_size, config.patch_size
    if not all(isinstance(side, int) for side in sides):
        raise ExportError(f"image and patch size: seen {sides[0]} and {sides[1]}, wanted squares, one number each")
    size, patch = sides
    resize = _resize(settings, size)
    patches = Patches(
        kernel=read(image.patches),
        bias=None if image.bias is None else read(image.bias),
        class_token=read(image.class_token),
        positions=read(image.positions),
        rescale=float(settings["rescale_factor"]) if settings.get("do_rescale", True) else 1.0,
        mean=tuple(settings["image_mean"]) if settings.get("do_normalize", True) else (0.0,) * 3,
        std=tuple(settings["image_std"]) if settings.get("do_normalize", True) else (1.0,) * 3,
    )
    export_image(patches, folder, size, size)
    rows = (size // patch) ** 2 + 1
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLE_IMAGES, size, size, 3), np.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (patches.mean, patches.std))
    scaled = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() * patches.rescale - mean) / std
    tokens, token_id = 0, None
    if family.kind == "vision-decoder":
        tokens = rows - (source.config.vision_feature_select_strategy == "default")
        token_id = source.config.image_token_id
        half.described["encoder_context"] = rows
        half.samples = _with_images(half.samples, pixels, scaled, tokens, token_id)
    else:
        half.described["context"] = rows
        half.samples = Samples(images=pixels, pixels=scaled)
    half.described["image"] = ImageFormat(
        height=size,
        width=size,
        resize=resize,
        resample=int(settings["resample"]),
        patches=rows,
        tokens=tokens,
        token_id=token_id,
    )


def _resize(settings: dict[str, Any], size: int) -> tuple[int, int] | int:
    """How the stock image processor resizes. Raises ExportError for what a device could not do the same."""
    wanted, cropped = settings.get("size") or {}, settings.get("do_center_crop", False)
    crop = settings.get("crop_size") or {}
    if settings.get("do_pad"):
        raise ExportError("image processor: seen do_pad, wanted resizing and cropping alone")
    if cropped and (crop.get("height"), crop.get("width")) != (size, size):
        raise ExportError(f"image processor: it crops to {crop}, wanted the model's {size} × {size}")
    if not settings.get("do_resize", True):
        raise ExportError("image processor: seen do_resize false, wanted one that resizes")
    if set(wanted) == {"shortest_edge"} and cropped and wanted["shortest_edge"] >= size:
        return int(wanted["shortest_edge"])
    if set(wanted) == {"height", "width"} and (cropped or wanted == {"height": size, "width": size}):
        return int(wanted["height"]), int(wanted["width"])
    raise ExportError(f"image processor: it resizes to {wanted}, which does not give the model's {size} × {size}")


def _with_images(samples: Samples, images: np.ndarray, pixels: torch.Tensor, tokens: int, token_id: int) -> Samples:
    """Text with an image in each sequence."""
    assert samples.ids is not None
    text = np.where(samples.ids == token_id, 0, samples.ids)
    placeholder = np.full((len(text), tokens), token_id)
    ids = np.concatenate([text[:, :IMAGE_AT], placeholder, text[:, IMAGE_AT:]], axis=1)
    return Samples(ids, images=images[: len(text)], pixels=pixels[: len(text)], image_tokens=tokens)


def _write_classifier(source: Source, family: Family, scheme: Scheme, dtype: torch.dtype, folder: Path) -> None:
    assert family.embedding is not None
    gain = folded_gain(source, family, scheme)
    export_classifier(
        dtype,
        source.shapes[family.embedding],
        folder,
        gain=None if gain is None else gain.to(dtype),
        cap=getattr(source.config, "final_logit_softcapping", None),
    )


def _activation(config: Any) -> str:
    """What the stock pipelines make of class logits: one class of several, several at once, or a score."""
    if config.problem_type == "regression":
        return "none"
    several = config.problem_type == "multi_label_classification" or config.num_labels == 1
    return "sigmoid" if several else "softmax"


def _labels(config: Any, classes: int) -> list[str]:
    return [str(config.id2label[number]) for number in range(classes)]


def _outputs(source: Source, family: Family, described: dict[str, Any]) -> dict[str, Any]:
    """What an encoder can be asked for, and how it makes one vector of a sentence."""
    if family.kind == "image-encoder":
        return {"outputs": ["logits"]}
    outputs = ["hidden"]
    if has_pooler(source):
        outputs.append("pooled")
    settings = source.pooling()
    pooling = "first" if settings.get("pooling_mode_cls_token") else "mean"
    if settings and not (settings.get("pooling_mode_cls_token") or settings.get("pooling_mode_mean_tokens")):
        raise ExportError("sentence pooling: wanted the mean of all tokens, or the first one")
    return {
        "outputs": [*outputs, "logits"] if described["labels"] else outputs,
        "context": min(described["context"], settings.get("max_seq_length") or described["context"]),
        "pooling": pooling if settings else None,  # a model that was not trained for sentences has none
        "normalize": bool(settings.get("normalize", False)),
    }
