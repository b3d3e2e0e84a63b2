"""The original Transformer (Vaswani et al., arXiv 1706.03762): encoder and decoder, post-LayerNorm. Marian is the stock
implementation. Encoder and decoder have a stream each, and cross-attention reads the one from the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from export.families.family import Family, TextInput
from export.families.parts import attention, layer_norm, linear, projections, same
from export.spaces import Features, Fixed, OnDevice, Row, Stream, Structure


def _attention(name: str, block: str, reads: str, attends: str) -> dict[str, Row]:
    names = (f"{name}.{which}_proj" for which in ("q", "k", "v", "out"))
    return projections(*names, into=reads, attends=attends, stream=reads, block=block)


def _layer(name: str, block: str, stream: str) -> dict[str, Row]:
    return {
        **_attention(name + "self_attn", block, stream, stream),
        **layer_norm(name + "self_attn_layer_norm", stream),
        **linear(name + "fc1", into=stream, out=block + "ffn[{i}]"),
        **linear(name + "fc2", into=block + "ffn[{i}]", out=stream),
        **layer_norm(name + "final_layer_norm", stream),
    }


def _structures(config: Any) -> Iterable[Structure]:
    yield Stream("encoder", config.d_model, "post")
    yield Stream("residual", config.d_model, "post")
    yield Features("vocab", config.vocab_size)
    for layer in range(config.encoder_layers):
        yield attention(config, layer, block="encoder.", heads=config.encoder_attention_heads, rotary=0.0)
        yield Features(f"encoder.ffn[{layer}]", config.encoder_ffn_dim)
    for layer in range(config.decoder_layers):
        for block in ("decoder.", "cross."):
            yield attention(config, layer, block=block, heads=config.decoder_attention_heads, rotary=0.0)
        yield Features(f"decoder.ffn[{layer}]", config.decoder_ffn_dim)


def sinusoids(config: Any) -> torch.Tensor:
    """Positions [context, d_model]: sines in the first half of the features, cosines in the second (Marian's order)."""
    width = config.d_model
    position = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    return torch.cat([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=1).float()


_DECODER = "model.decoder.layers.{i}."
_POSITIONS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
MARIAN = Family(
    name="marian",
    model_types=("marian",),
    kind="encoder-decoder",
    classes=same("MarianMTModel"),
    tensors={
        "model.shared.weight": ("vocab", "residual"),
        "model.encoder.embed_tokens.weight": OnDevice(),
        "model.decoder.embed_tokens.weight": OnDevice(),
        **dict.fromkeys(_POSITIONS, OnDevice(zeros=True)),
        **_layer("model.encoder.layers.{i}.", "encoder.", "encoder"),
        **_layer(_DECODER, "decoder.", "residual"),
        **_attention(_DECODER + "encoder_attn", "cross.", "residual", "encoder"),
        **layer_norm(_DECODER + "encoder_attn_layer_norm"),
        "lm_head.weight": ("vocab", "residual"),
        "final_logits_bias": (Fixed("one row"), "vocab"),
    },
    structures=_structures,
    text=TextInput(
        "model.shared.weight",
        scale=lambda config: float(config.d_model**0.5) if config.scale_embedding else 1.0,
        positions=lambda config, read: sinusoids(config),
    ),
    classifier="lm_head.weight",
    unsupported=lambda config: (
        None if config.share_encoder_decoder_embeddings else "share_encoder_decoder_embeddings: seen false, wanted true"
    ),
    settings={"scale_embedding": False},
    computed=dict.fromkeys(_POSITIONS, sinusoids),
)
