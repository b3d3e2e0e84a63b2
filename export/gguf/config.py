"""The stock config of a GGUF file. What transformers reads from one is mended with what the file says, as it leaves out
widths of heads and experts, scaled rotary positions and more, and puts its own defaults there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import MixtralConfig, PretrainedConfig

from export.gguf.settings import described, frequency_factors, head_dim

# llama.cpp's key → the stock config's name
_NAMES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# How models with Llama 3's rotary positions were trained; their files have the factors of frequencies alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def mended(
    config: PretrainedConfig, metadata: Mapping[str, Any], tensors: Collection[str], factors: torch.Tensor | None
) -> PretrainedConfig:
    """The config that a file's metadata (keys without the architecture's name) and its tensors' names tell.

    factors: [planes] of rotary frequencies, where the file has them.
    """
    if config.model_type == "llama" and "expert_count" in metadata:
        known = MixtralConfig().to_dict().keys() - {"model_type", "architectures"}
        alike = {name: value for name, value in config.to_dict().items() if name in known}
        alike.pop("sliding_window", None)
        config = MixtralConfig(**alike, num_local_experts=metadata["expert_count"], sliding_window=None)
    for key, name in _NAMES.items():
        if key in metadata and hasattr(config, name):
            setattr(config, name, metadata[key])
    if config.model_type == "gpt2":
        config.n_inner = metadata["feed_forward_length"]
    if config.model_type.endswith("_moe"):
        config.norm_topk_prob = config.model_type == "qwen3_moe"  # what llama.cpp computes for any such file
    for setting, bias in (("attention_bias", "attn_output.bias"), ("mlp_bias", "ffn_down.bias")):
        if config.model_type == "llama":
            setattr(config, setting, f"blk.0.{bias}" in tensors)
    if (config.pad_token_id or 0) >= config.vocab_size:
        config.pad_token_id = None
    if getattr(config, "rope_parameters", None):
        config.rope_parameters = _rotation(config, metadata, factors)
    return config


def differences(config: PretrainedConfig, metadata: Mapping[str, Any]) -> list[str]:
    """The keys of a file's metadata that its config does not say, or says otherwise."""
    known = described(config, config.vocab_size)
    scaling = [key for key in metadata if key.startswith("rope.scaling.") and metadata[key] not in ("none", 0)]
    keys = {*known, *scaling} & metadata.keys()
    return sorted(key for key in keys if not _same(known.get(key), metadata[key]))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-5 * abs(one)
    return bool(one == other)


def _rotation(config: Any, metadata: Mapping[str, Any], factors: torch.Tensor | None) -> dict[str, Any]:
    """transformers' settings of rotary positions."""
    rope: dict[str, Any] = {"rope_theta": metadata.get("rope.freq_base", 10000.0), "rope_type": "default"}
    if (turned := metadata.get("rope.dimension_count", head_dim(config))) != head_dim(config):
        rope["partial_rotary_factor"] = turned / head_dim(config)
    if (kind := metadata.get("rope.scaling.type", "none")) != "none":
        rope |= {"rope_type": kind, "factor": metadata["rope.scaling.factor"]}
    if "rope.scaling.original_context_length" in metadata:
        rope["original_max_position_embeddings"] = metadata["rope.scaling.original_context_length"]
    if factors is not None:
        config.rope_parameters = rope | _LLAMA3 | {"rope_type": "llama3", "factor": round(float(factors.max()), 3)}
        read = frequency_factors(config)
        if read is not None and torch.allclose(read, factors, rtol=1e-4):
            rope = config.rope_parameters
    return rope
