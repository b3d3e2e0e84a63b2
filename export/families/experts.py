"""Mixtures of experts: experts change places among themselves, and features inside each one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from export.families.decoders import LLAMA, gated, llama_rows, partial_rotary
from export.families.parts import attention, same
from export.spaces import After, Each, Features, Fixed, Fused, Gated, Row, Stream, Structure

_LAYER = "model.layers.{i}."
_INPUT = After("residual", _LAYER + "post_attention_layernorm.weight")
_EXPERTS: dict[str, Row] = {
    _LAYER + "mlp.gate.weight": ("experts[{i}]", _INPUT),  # the router
    _LAYER + "mlp.experts.gate_up_proj": (Each("experts[{i}]"), Fused(("gate[{i}][{e}]", "up[{i}][{e}]")), _INPUT),
    _LAYER + "mlp.experts.down_proj": (Each("experts[{i}]"), "residual", "product[{i}][{e}]"),
}


def _experts(layer: int, count: int, inner: int) -> Iterator[Structure]:
    yield Features(f"experts[{layer}]", count)
    for expert in range(count):
        where = f"[{layer}][{expert}]"
        yield Gated(f"gate{where}", f"up{where}", f"product{where}", inner)


def _mixtral_structures(config: PretrainedConfig) -> Iterable[Structure]:
    yield Stream("residual", config.hidden_size, "rms")
    yield Features("vocab", config.vocab_size)
    for layer in range(config.num_hidden_layers):
        yield attention(config, layer)
        yield from _experts(layer, config.num_local_experts, config.intermediate_size)


MIXTRAL = replace(
    LLAMA,
    tried="random weights",
    name="mixtral",
    model_types=("mixtral",),
    classes=same("MixtralForCausalLM"),
    tensors={name: row for name, row in llama_rows().items() if "mlp." not in name} | _EXPERTS,
    structures=_mixtral_structures,
)


def _qwen_structures(config: Any) -> Iterable[Structure]:
    yield Stream("residual", config.hidden_size, "rms")
    yield Features("vocab", config.vocab_size)
    for layer in range(config.num_hidden_layers):
        yield attention(config, layer, normed=config.model_type == "qwen3_moe", rotary=partial_rotary(config))
        sparse = layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        if not sparse or not config.num_experts:
            yield gated(config, layer)
            continue
        yield from _experts(layer, config.num_experts, config.moe_intermediate_size)
        if config.model_type == "qwen2_moe":
            inner = config.shared_expert_intermediate_size
            yield Gated(f"shared.gate[{layer}]", f"shared.up[{layer}]", f"shared.product[{layer}]", inner)


_SHARED = _LAYER + "mlp.shared_expert"
QWEN_MOE = replace(
    LLAMA,
    tried="random weights",
    name="qwen-moe",
    model_types=("qwen2_moe", "qwen3_moe"),
    classes=same("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
    tensors=llama_rows()
    | _EXPERTS
    | {
        _SHARED + ".gate_proj.weight": ("shared.gate[{i}]", _INPUT),
        _SHARED + ".up_proj.weight": ("shared.up[{i}]", _INPUT),
        _SHARED + ".down_proj.weight": ("residual", "shared.product[{i}]"),
        _SHARED + "_gate.weight": (Fixed("one row, the weight of the shared expert"), _INPUT),
    },
    structures=_qwen_structures,
)
