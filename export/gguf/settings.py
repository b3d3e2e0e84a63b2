"""What llama.cpp must know of a model beside its tensors, from the stock config, and what it cannot compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from export.families import longest
from export.gguf.layout import Layout, layout_of
from shared.errors import FamilyError

Setting = int | float | str


def settings(config: PretrainedConfig, vocab_size: int) -> dict[str, Setting]:
    """The metadata of a model, as in `described`. Raises FamilyError for a config that llama.cpp would compute
    otherwise, or not at all."""
    if (reason := next(_unsupported(config, layout_of(config.model_type)), None)) is not None:
        raise FamilyError(f"architecture {config.model_type!r} as GGUF: {reason}", hint="export it without --gguf")
    return described(config, vocab_size)


def described(config: PretrainedConfig, vocab_size: int) -> dict[str, Setting]:
    """The metadata that llama.cpp reads, without the architecture's name before each key: sizes, heads, norms, rotary
    positions, experts."""
    heads, dim = config.num_attention_heads, head_dim(config)
    kept: dict[str, Setting] = {
        "block_count": config.num_hidden_layers,
        "context_length": longest(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": _inner(config),
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "vocab_size": vocab_size,
    }
    for name, key in (
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
        ("layer_norm_eps", "attention.layer_norm_epsilon"),
        ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
        ("num_experts_per_tok", "expert_used_count"),
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ):
        if (value := getattr(config, name, None)) is not None:
            kept[key] = value
    if experts := _experts(config):
        kept["expert_count"] = experts
    return kept | _rotary(config)


def head_dim(config: Any) -> int:
    """Features of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def frequency_factors(config: PretrainedConfig) -> torch.Tensor | None:
    """[planes]: what each rotary frequency is divided by in Llama 3's way; None for other models."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    dim = head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors: torch.Tensor = (plain / scaled.double()).float()
    return factors


# --- parts of a config ---


def _inner(config: Any) -> int:
    if config.model_type == "gpt2":
        return int(config.n_inner or 4 * config.hidden_size)
    return int(config.intermediate_size)


def _experts(config: Any) -> int:
    """Experts of a layer; 0 where there is no mixture."""
    if config.model_type == "mixtral":
        return int(config.num_local_experts)
    return int(config.num_experts) if config.model_type.endswith("_moe") else 0


def _rope(config: Any) -> dict[str, Any]:
    """The settings of rotary positions. Empty where there are none."""
    return dict(getattr(config, "rope_parameters", None) or {})


def _rotary(config: Any) -> dict[str, Setting]:
    rope = _rope(config)
    if not rope:
        return {}
    kept: dict[str, Setting] = {
        "rope.dimension_count": int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        kept |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        kept["rope.scaling.original_context_length"] = int(original)
    return kept


def _window(config: Any) -> int:
    """Positions that some layers attend to at most; 0 where all attend to all."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not window or window >= longest(config) or (types and "sliding_attention" not in types):
        return 0
    return int(window)


# --- what llama.cpp does not compute ---


def _unsupported(config: Any, layout: Layout) -> Iterator[str]:
    """Why llama.cpp would not compute what the stock model does, one reason after the other."""
    names = ("hidden_act", "activation_function")
    activation = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if activation not in layout.activations:
        yield f"activation: seen {activation!r}, wanted one of: {', '.join(layout.activations)}"
    if _window(config):
        # llama.cpp gives cells to others once they are behind their sequence's window, and drops that part of the
        # sequence. A session that is cut back, as after a refused draft, would lack keys and say nothing of it.
        yield (
            f"sliding_window: seen {config.sliding_window}, wanted at least the context, {longest(config)}, as "
            "llama.cpp lets go of keys that a session may go back to"
        )
    yield from _unsupported_rotation(config, layout)
    yield from _unsupported_experts(config)
    dim = head_dim(config)
    if config.model_type in ("phi", "phi3", "qwen2_moe") and dim * config.num_attention_heads != config.hidden_size:
        yield f"head_dim: seen {dim}, wanted {config.hidden_size} / {config.num_attention_heads}"
    if config.model_type in ("qwen3", "qwen3_moe", "smollm3"):
        for name in ("attention_bias", "mlp_bias"):
            if getattr(config, name, False):
                yield f"{name}: seen true, wanted false"
    if config.model_type == "smollm3" and list(config.no_rope_layers) != [
        int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)
    ]:
        yield "no_rope_layers: seen another pattern, wanted every fourth layer without rotary positions"
    if config.model_type == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        yield "attention scores: seen a scale of their own, wanted the root of the head's width"


def _unsupported_rotation(config: Any, layout: Layout) -> Iterator[str]:
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    wanted = ("default", "linear", "yarn", *(("llama3",) if layout.scaled_frequencies else ()))
    if kind not in wanted:
        yield f"rope_type: seen {kind!r}, wanted one of: {', '.join(wanted)}"
    if kind == "yarn":
        odd = [name for name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate") if rope.get(name)]
        factor = rope.get("attention_factor")
        if odd or (factor is not None and not math.isclose(factor, 0.1 * math.log(rope["factor"]) + 1)):
            yield f"rope_parameters: seen {', '.join(odd) or 'attention_factor'}, wanted YaRN's own values"
    if layout.interleaved and rope.get("partial_rotary_factor", 1.0) != 1:
        yield f"partial_rotary_factor: seen {rope['partial_rotary_factor']}, wanted 1"


def _unsupported_experts(config: Any) -> Iterator[str]:
    if not config.model_type.endswith("_moe"):
        return
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        yield "mlp_only_layers, decoder_sparse_step: seen layers without experts, wanted a mixture in every layer"
    wanted = config.model_type == "qwen3_moe"
    if config.norm_topk_prob != wanted:
        yield f"norm_topk_prob: seen {config.norm_topk_prob}, wanted {wanted}"
