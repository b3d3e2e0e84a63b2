"""Models that see: ViT, and LLaVA with a CLIP tower. Patches are embedded on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from export.families.decoders import llama_rows, llama_structures
from export.families.family import Family, ImageInput, TextInput
from export.families.parts import attention, layer_norm, linear, projections, same
from export.spaces import After, Dropped, Features, OnDevice, Row, Stream, Structure, prefixed

# --- ViT: LayerNorm before each block ---


def _vit_structures(config: Any) -> Iterable[Structure]:
    yield Stream("residual", config.hidden_size, "layer")
    yield Features("classes", config.num_labels)
    for layer in range(config.num_hidden_layers):
        yield attention(config, layer, rotary=0.0)
        yield Features(f"ffn[{layer}]", config.intermediate_size)


def _vit_rows() -> dict[str, Row]:
    into_attention = After("residual", "layers.{i}.layernorm_before.weight")
    into_ffn = After("residual", "layers.{i}.layernorm_after.weight")
    rows: dict[str, Row] = {
        **layer_norm("layers.{i}.layernorm_before"),
        **projections(
            *(f"layers.{{i}}.attention.{name}_proj" for name in "qkvo"), into=into_attention, stream="residual"
        ),
        **layer_norm("layers.{i}.layernorm_after"),
        **linear("layers.{i}.mlp.fc1", into=into_ffn, out="ffn[{i}]"),
        **linear("layers.{i}.mlp.fc2", into="ffn[{i}]", out="residual"),
        **layer_norm("layernorm"),
    }
    return {
        **{f"vit.{name}": prefixed(row, "vit.") for name, row in rows.items()},
        "vit.embeddings.cls_token": OnDevice(),
        "vit.embeddings.position_embeddings": OnDevice(),
        "vit.embeddings.patch_embeddings.projection.weight": OnDevice(),
        "vit.embeddings.patch_embeddings.projection.bias": OnDevice(),
        "vit.embeddings.mask_token": Dropped("for training alone"),
        "vit.pooler.{*}": Dropped("not served"),
        **linear("classifier", into=After("residual", "vit.layernorm.weight"), out="classes"),
    }


VIT = Family(
    name="vit",
    model_types=("vit",),
    kind="image-encoder",
    classes=same("ViTForImageClassification"),
    tensors=_vit_rows(),
    structures=_vit_structures,
    image=ImageInput(
        config=lambda config: config,
        patches="vit.embeddings.patch_embeddings.projection.weight",
        bias="vit.embeddings.patch_embeddings.projection.bias",
        class_token="vit.embeddings.cls_token",
        positions="vit.embeddings.position_embeddings",
        tower="vit",
    ),
    unsupported=lambda config: (
        None if config.num_channels == 3 else f"num_channels: seen {config.num_channels}, wanted 3"
    ),
)


# --- LLaVA: a CLIP tower, a projector, a LLaMA ---

_TOWER = "model.vision_tower."
_LAYER = _TOWER + "encoder.layers.{i}."


def _llava_structures(config: Any) -> Iterable[Structure]:
    vision = config.vision_config
    # CLIP's first norm writes the stream, and the projector reads it as it is: nothing but places may change.
    yield Stream("encoder", vision.hidden_size, "post")
    for layer in range(vision.num_hidden_layers):
        yield attention(vision, layer, block="vision.", rotary=0.0)
        yield Features(f"vision.ffn[{layer}]", vision.intermediate_size)
    yield Features("projector", config.text_config.hidden_size)
    yield from llama_structures(config.text_config)


def _llava_rows() -> dict[str, Row]:
    into_attention, into_ffn = (After("encoder", f"{_LAYER}layer_norm{which}.weight") for which in (1, 2))
    return {
        _TOWER + "embeddings.class_embedding": OnDevice(),
        _TOWER + "embeddings.patch_embedding.weight": OnDevice(),
        _TOWER + "embeddings.position_embedding.weight": OnDevice(),
        _TOWER + "embeddings.position_ids": Dropped("a buffer that the stock model computes"),
        **layer_norm(_TOWER + "pre_layrnorm", "encoder"),
        **layer_norm(_LAYER + "layer_norm1", "encoder"),
        **projections(
            *(f"{_LAYER}self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
            into=into_attention,
            stream="encoder",
            block="vision.",
        ),
        **layer_norm(_LAYER + "layer_norm2", "encoder"),
        **linear(_LAYER + "mlp.fc1", into=into_ffn, out="vision.ffn[{i}]"),
        **linear(_LAYER + "mlp.fc2", into="vision.ffn[{i}]", out="encoder"),
        **layer_norm(_TOWER + "post_layernorm", "encoder"),
        **linear("model.multi_modal_projector.linear_1", into="encoder", out="projector"),
        **linear("model.multi_modal_projector.linear_2", into="projector", out="residual"),
        **llama_rows("model.language_model."),
    }


def _llava_unsupported(config: Any) -> str | None:
    vision, text = config.vision_config.model_type, config.text_config.model_type
    if vision != "clip_vision_model":
        return f"vision tower: seen {vision!r}, wanted 'clip_vision_model'"
    if text not in ("llama", "mistral", "qwen2"):
        return f"language model: seen {text!r}, wanted 'llama', 'mistral' or 'qwen2'"
    if not isinstance(config.vision_feature_layer, int):
        return "vision_feature_layer: seen several layers, wanted one"
    return None


LLAVA = Family(
    name="llava",
    model_types=("llava",),
    kind="vision-decoder",
    classes=same("LlavaForConditionalGeneration"),
    tensors=_llava_rows(),
    structures=_llava_structures,
    text=TextInput("model.language_model.embed_tokens.weight"),
    image=ImageInput(
        config=lambda config: config.vision_config,
        patches=_TOWER + "embeddings.patch_embedding.weight",
        bias=None,
        class_token=_TOWER + "embeddings.class_embedding",
        positions=_TOWER + "embeddings.position_embedding.weight",
        tower="model.vision_tower",
    ),
    classifier="lm_head.weight",
    unsupported=_llava_unsupported,
)
