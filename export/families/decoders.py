"""Decoders of text: LLaMA and its kin, Gemma, Phi, GPT-2, OPT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig

from export.families.family import Family, Read, TextInput
from export.families.parts import attention, layer_norm, linear, projections, same
from export.spaces import After, Dropped, Features, Fixed, Fused, Gain, Gated, OnDevice, Row, Stream, Structure

HEAD_NORM = Fixed(
    "one weight for each feature of a head, shared by all heads; features inside query and key heads are fixed by RoPE"
)
COMPUTED = Dropped("the stock model computes it from its config")


# --- LLaMA, Mistral, Qwen: RMSNorm before each block, rotary positions, gated feed-forward ---


def llama_rows(
    model: str = "model.", *, offset: float = 0.0, ffn_norm: str = "post_attention_layernorm"
) -> dict[str, Row]:
    """The rows of a LLaMA-like decoder. model: what its tensors' names begin with. offset: of its norms' weights.

    ffn_norm: the norm that the feed-forward block reads through.
    """
    layer = model + "layers.{i}."
    into_attention = After("residual", layer + "input_layernorm.weight", offset)
    into_ffn = After("residual", f"{layer}{ffn_norm}.weight", offset)
    gain = (Gain("residual", offset),)
    return {
        model + "embed_tokens.weight": ("vocab", "residual"),
        layer + "input_layernorm.weight": gain,
        layer + "self_attn.q_proj.weight": ("query[{i}]", into_attention),
        layer + "self_attn.q_proj.bias": ("query[{i}]",),
        layer + "self_attn.k_proj.weight": ("key[{i}]", into_attention),
        layer + "self_attn.k_proj.bias": ("key[{i}]",),
        layer + "self_attn.v_proj.weight": ("value[{i}]", into_attention),
        layer + "self_attn.v_proj.bias": ("value[{i}]",),
        layer + "self_attn.o_proj.weight": ("residual", "attended[{i}]"),
        layer + "self_attn.o_proj.bias": ("residual",),
        layer + "self_attn.q_norm.weight": (HEAD_NORM,),  # Qwen3, Gemma 3
        layer + "self_attn.k_norm.weight": (HEAD_NORM,),
        layer + "self_attn.rotary_emb.inv_freq": COMPUTED,
        layer + "post_attention_layernorm.weight": gain,
        # Both inner projections move with the inner features; the paper's printed rule leaves W₁ out and is wrong.
        layer + "mlp.gate_proj.weight": ("gate[{i}]", into_ffn),
        layer + "mlp.gate_proj.bias": ("gate[{i}]",),
        layer + "mlp.up_proj.weight": ("up[{i}]", into_ffn),
        layer + "mlp.up_proj.bias": ("up[{i}]",),
        layer + "mlp.down_proj.weight": ("residual", "product[{i}]"),
        layer + "mlp.down_proj.bias": ("residual",),
        model + "norm.weight": gain,
        "lm_head.weight": ("vocab", After("residual", model + "norm.weight", offset)),
    }


def gated(config: Any, layer: int) -> Gated:
    """The gated feed-forward block of one layer."""
    return Gated(f"gate[{layer}]", f"up[{layer}]", f"product[{layer}]", config.intermediate_size)


def llama_structures(config: PretrainedConfig) -> Iterable[Structure]:
    yield Stream("residual", config.hidden_size, "rms")
    yield Features("vocab", config.vocab_size)
    for layer in range(config.num_hidden_layers):
        yield attention(config, layer, normed=config.model_type == "qwen3", rotary=partial_rotary(config))
        yield gated(config, layer)


def partial_rotary(config: Any) -> float:
    """The share of a head's features that rotary positions turn."""
    return float((getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    kind="decoder",
    classes=same(
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"
    ),
    tensors=llama_rows(),
    structures=llama_structures,
    text=TextInput("model.embed_tokens.weight"),
    classifier="lm_head.weight",
    tried="SmolLM2-135M-Instruct, random weights",
)


# --- Gemma: norms that add 1 to their weight, embeddings times the root of their width ---


def _gemma2_structures(config: PretrainedConfig) -> Iterable[Structure]:
    # A norm behind each block, whose gain sits between it and the stream.
    yield Stream("residual", config.hidden_size, "post")
    yield Features("vocab", config.vocab_size)
    for layer in range(config.num_hidden_layers):
        yield attention(config, layer, normed=config.model_type == "gemma3_text")
        yield gated(config, layer)


GEMMA = replace(
    LLAMA,
    tried="random weights",
    name="gemma",
    model_types=("gemma",),
    classes=same("GemmaForCausalLM"),
    tensors=llama_rows(offset=1.0),
    text=TextInput("model.embed_tokens.weight", scale=lambda config: float(config.hidden_size**0.5)),
)
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    model_types=("gemma2", "gemma3_text"),
    classes=same("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    tensors=llama_rows(offset=1.0, ffn_norm="pre_feedforward_layernorm")
    | {
        "model.layers.{i}.pre_feedforward_layernorm.weight": (Gain("residual", 1.0),),
        "model.layers.{i}.post_feedforward_layernorm.weight": (Gain("residual", 1.0),),
    },
    structures=_gemma2_structures,
)


# --- Phi-3: LLaMA with its projections side by side in one matrix ---

_PHI3_LAYER = "model.layers.{i}."
PHI3 = replace(
    LLAMA,
    tried="random weights",
    name="phi3",
    model_types=("phi3",),
    classes=same("Phi3ForCausalLM"),
    tensors={name: row for name, row in llama_rows().items() if not ("self_attn." in name or "mlp." in name)}
    | {
        _PHI3_LAYER + "self_attn.qkv_proj.weight": (
            Fused(("query[{i}]", "key[{i}]", "value[{i}]")),
            After("residual", _PHI3_LAYER + "input_layernorm.weight"),
        ),
        _PHI3_LAYER + "self_attn.o_proj.weight": ("residual", "attended[{i}]"),
        _PHI3_LAYER + "mlp.gate_up_proj.weight": (
            Fused(("gate[{i}]", "up[{i}]")),
            After("residual", _PHI3_LAYER + "post_attention_layernorm.weight"),
        ),
        _PHI3_LAYER + "mlp.down_proj.weight": ("residual", "product[{i}]"),
    },
)


# --- LayerNorm before each block, one inner space: Phi, GPT-2, OPT ---


def _plain_structures(config: PretrainedConfig, inner: int, norm: Any, rotary: float) -> Iterable[Structure]:
    yield Stream("residual", config.hidden_size, norm)
    yield Features("vocab", config.vocab_size)
    for layer in range(config.num_hidden_layers):
        yield attention(config, layer, rotary=rotary)
        yield Features(f"ffn[{layer}]", inner)


_PHI_LAYER = "model.layers.{i}."
_PHI_INPUT = After("residual", _PHI_LAYER + "input_layernorm.weight")  # attention and feed-forward both read it
PHI = Family(
    name="phi",
    model_types=("phi",),
    kind="decoder",
    classes=same("PhiForCausalLM"),
    tensors={
        "model.embed_tokens.weight": ("vocab", "residual"),
        **layer_norm(_PHI_LAYER + "input_layernorm"),
        **projections(
            *(f"{_PHI_LAYER}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "dense")),
            into=_PHI_INPUT,
            stream="residual",
        ),
        **linear(_PHI_LAYER + "mlp.fc1", into=_PHI_INPUT, out="ffn[{i}]"),
        **linear(_PHI_LAYER + "mlp.fc2", into="ffn[{i}]", out="residual"),
        **layer_norm("model.final_layernorm"),
        **linear("lm_head", into=After("residual", "model.final_layernorm.weight"), out="vocab"),
    },
    structures=lambda config: _plain_structures(config, config.intermediate_size, "layer", partial_rotary(config)),
    text=TextInput("model.embed_tokens.weight"),
    classifier="lm_head.weight",
)

_GPT2_LAYER = "transformer.h.{i}."
GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    kind="decoder",
    classes=same("GPT2LMHeadModel"),
    tensors={
        "transformer.wte.weight": ("vocab", "residual"),
        "transformer.wpe.weight": OnDevice(zeros=True),
        **layer_norm(_GPT2_LAYER + "ln_1"),
        # The causal mask, in old checkpoints, whose names have no prefix.
        **dict.fromkeys((_GPT2_LAYER + "attn.bias", "h.{i}.attn.bias"), COMPUTED),
        **dict.fromkeys((_GPT2_LAYER + "attn.masked_bias", "h.{i}.attn.masked_bias"), COMPUTED),
        **linear(
            _GPT2_LAYER + "attn.c_attn",
            into=After("residual", _GPT2_LAYER + "ln_1.weight"),
            out=Fused(("query[{i}]", "key[{i}]", "value[{i}]")),
            transposed=True,
        ),
        **linear(_GPT2_LAYER + "attn.c_proj", into="attended[{i}]", out="residual", transposed=True),
        **layer_norm(_GPT2_LAYER + "ln_2"),
        **linear(
            _GPT2_LAYER + "mlp.c_fc",
            into=After("residual", _GPT2_LAYER + "ln_2.weight"),
            out="ffn[{i}]",
            transposed=True,
        ),
        **linear(_GPT2_LAYER + "mlp.c_proj", into="ffn[{i}]", out="residual", transposed=True),
        **layer_norm("transformer.ln_f"),
        "lm_head.weight": ("vocab", After("residual", "transformer.ln_f.weight")),
    },
    structures=lambda config: _plain_structures(config, config.n_inner or 4 * config.hidden_size, "layer", 0.0),
    text=TextInput("transformer.wte.weight", positions=lambda config, read: read("transformer.wpe.weight")),
    classifier="lm_head.weight",
)


def _opt_rows() -> Mapping[str, Row]:
    layer = "model.decoder.layers.{i}."
    into_attention = After("residual", layer + "self_attn_layer_norm.weight")
    into_ffn = After("residual", layer + "final_layer_norm.weight")
    return {
        "model.decoder.embed_tokens.weight": ("vocab", "residual"),
        "model.decoder.embed_positions.weight": OnDevice(zeros=True),
        **layer_norm(layer + "self_attn_layer_norm"),
        **projections(
            *(f"{layer}self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
            into=into_attention,
            stream="residual",
        ),
        **layer_norm(layer + "final_layer_norm"),
        **linear(layer + "fc1", into=into_ffn, out="ffn[{i}]"),
        **linear(layer + "fc2", into="ffn[{i}]", out="residual"),
        **layer_norm("model.decoder.final_layer_norm"),
        "lm_head.weight": ("vocab", After("residual", "model.decoder.final_layer_norm.weight")),
    }


def _opt_positions(config: Any, read: Read) -> torch.Tensor:
    return read("model.decoder.embed_positions.weight")[2:]  # the stock class adds 2 to every position


def _opt_unsupported(config: Any) -> str | None:
    if config.word_embed_proj_dim != config.hidden_size:
        return f"word_embed_proj_dim: seen {config.word_embed_proj_dim}, wanted the hidden size, {config.hidden_size}"
    return None if config.layer_norm_elementwise_affine else "layer_norm_elementwise_affine: seen false, wanted true"


OPT = Family(
    name="opt",
    model_types=("opt",),
    kind="decoder",
    classes=same("OPTForCausalLM"),
    tensors=_opt_rows(),
    structures=lambda config: _plain_structures(
        config, config.ffn_dim, "layer" if config.do_layer_norm_before else "post", 0.0
    ),
    text=TextInput("model.decoder.embed_tokens.weight", positions=_opt_positions),
    classifier="lm_head.weight",
    unsupported=_opt_unsupported,
)
