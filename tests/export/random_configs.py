"""Random stock configs of every family: heads, groups, widths, layers, experts, biases, tied or not, images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    DistilBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MarianConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
    ViTConfig,
    XLMRobertaConfig,
)

Draw = Callable[[st.SearchStrategy[Any]], Any]

TOKENS = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # the tiny tokenizer's


def _number(draw: Draw, least: int, most: int) -> int:
    return int(draw(st.integers(least, most)))


def _flag(draw: Draw) -> bool:
    return bool(draw(st.booleans()))


def _sizes(draw: Draw, *, grouped: bool = True, dim_apart: bool = False, multiple: int = 2) -> dict[str, Any]:
    """Sizes of a decoder. grouped: fewer key/value heads than query heads. dim_apart: heads that are wider or narrower
    than hidden_size / heads. multiple: of what widths are multiples."""
    groups, members = _number(draw, 1, 3), _number(draw, 1, 3) if grouped else 1
    heads, dim = groups * members, multiple * _number(draw, 2, 12 // multiple)
    sizes = {
        "hidden_size": heads * (multiple * _number(draw, 2, 12 // multiple) if dim_apart else dim),
        "intermediate_size": multiple * _number(draw, 3, 20),
        "num_hidden_layers": _number(draw, 1, 3),
        "num_attention_heads": heads,
        "max_position_embeddings": 64,
        "tie_word_embeddings": _flag(draw),
    }
    sizes |= {"num_key_value_heads": groups} if grouped else {}
    return TOKENS | sizes | ({"head_dim": dim} if dim_apart else {})


def _sliding(draw: Draw, layers: int) -> dict[str, Any]:
    kinds = st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=layers, max_size=layers)
    return {"sliding_window": _number(draw, 4, 70), "layer_types": draw(kinds)}


def _rotary(draw: Draw) -> dict[str, Any]:
    return {"rope_theta": 10000.0, "partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))}


def _llama(draw: Draw) -> Any:
    return LlamaConfig(**_sizes(draw, dim_apart=True), attention_bias=_flag(draw), mlp_bias=_flag(draw))


def _mistral(draw: Draw) -> Any:
    return MistralConfig(**_sizes(draw, dim_apart=True), sliding_window=draw(st.sampled_from([None, 5, 100])))


def _qwen3(draw: Draw) -> Any:
    return Qwen3Config(**_sizes(draw, dim_apart=True), attention_bias=_flag(draw))


def _smollm3(draw: Draw) -> Any:
    sizes = _sizes(draw)
    rotary = [_number(draw, 0, 1) for _ in range(sizes["num_hidden_layers"])]
    return SmolLM3Config(**sizes, no_rope_layers=rotary, attention_bias=_flag(draw), mlp_bias=_flag(draw))


def _gemma2(draw: Draw) -> Any:
    sizes = _sizes(draw, dim_apart=True)
    cap = draw(st.sampled_from([None, 30.0]))
    window = _sliding(draw, sizes["num_hidden_layers"])
    return Gemma2Config(**sizes, **window, attention_bias=_flag(draw), final_logit_softcapping=cap)


def _gemma3(draw: Draw) -> Any:
    sizes = _sizes(draw, dim_apart=True)
    return Gemma3TextConfig(**sizes, **_sliding(draw, sizes["num_hidden_layers"]), attention_bias=_flag(draw))


def _phi(draw: Draw) -> Any:
    sizes = _sizes(draw)
    sizes["hidden_size"] = sizes["num_attention_heads"] * 8  # of which a quarter is a pair
    return PhiConfig(**sizes, rope_parameters=_rotary(draw))


def _phi3(draw: Draw) -> Any:
    sizes = _sizes(draw)
    sizes["hidden_size"] = sizes["num_attention_heads"] * 8
    return Phi3Config(**sizes, rope_parameters=_rotary(draw))


def _gpt2(draw: Draw) -> Any:
    sizes = _sizes(draw, grouped=False)
    return GPT2Config(
        **TOKENS,
        n_embd=sizes["hidden_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        n_positions=_number(draw, 40, 80),
        n_inner=draw(st.sampled_from([None, 20, 50])),
        tie_word_embeddings=sizes["tie_word_embeddings"],
        scale_attn_by_inverse_layer_idx=_flag(draw),
    )


def _opt(draw: Draw) -> Any:
    sizes = _sizes(draw, grouped=False)
    width = {"ffn_dim": sizes.pop("intermediate_size"), "word_embed_proj_dim": sizes["hidden_size"]}
    return OPTConfig(**sizes, **width, do_layer_norm_before=_flag(draw), enable_bias=_flag(draw))


FOUR = {"multiple": 4}  # torch multiplies experts only where rows are multiples of 16 bytes


def _experts(draw: Draw) -> dict[str, int]:
    experts = _number(draw, 2, 4)
    return {"num_experts": experts, "num_experts_per_tok": _number(draw, 1, experts)}


def _mixtral(draw: Draw) -> Any:
    experts = _experts(draw)
    experts["num_local_experts"] = experts.pop("num_experts")
    return MixtralConfig(**_sizes(draw, dim_apart=True, **FOUR), **experts)


def _qwen_moe(draw: Draw) -> dict[str, Any]:
    return {
        **_experts(draw),
        "moe_intermediate_size": 4 * _number(draw, 2, 10),
        "decoder_sparse_step": _number(draw, 1, 2),
        "mlp_only_layers": draw(st.sampled_from([[], [0]])),
        "norm_topk_prob": _flag(draw),
    }


def _qwen2_moe(draw: Draw) -> Any:
    return Qwen2MoeConfig(
        **_sizes(draw, **FOUR),
        **_qwen_moe(draw),
        shared_expert_intermediate_size=_number(draw, 8, 40),
        qkv_bias=_flag(draw),
    )


def _qwen3_moe(draw: Draw) -> Any:
    return Qwen3MoeConfig(**_sizes(draw, dim_apart=True, **FOUR), **_qwen_moe(draw), attention_bias=_flag(draw))


def _encoder(config: Any, stock: str, padding: int = 0) -> Callable[[Draw], Any]:
    def drawn(draw: Draw) -> Any:
        sizes = _sizes(draw, grouped=False) | {"pad_token_id": padding, "max_position_embeddings": 66}
        head = draw(st.sampled_from(["Model", "ForSequenceClassification"]))
        return config(**sizes, num_labels=_number(draw, 2, 9), architectures=[stock + head])

    return drawn


def _distilbert(draw: Draw) -> Any:
    sizes = _sizes(draw, grouped=False)
    return DistilBertConfig(
        vocab_size=320,
        dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        n_layers=sizes["num_hidden_layers"],
        n_heads=sizes["num_attention_heads"],
        max_position_embeddings=66,
        num_labels=_number(draw, 2, 9),
        architectures=[draw(st.sampled_from(["DistilBertModel", "DistilBertForSequenceClassification"]))],
    )


def _vision(draw: Draw) -> dict[str, Any]:
    """Sizes of a model of images; a patch need not divide an image."""
    heads, patch = _number(draw, 1, 4), _number(draw, 3, 8)
    return {
        "hidden_size": heads * 2 * _number(draw, 2, 6),
        "intermediate_size": _number(draw, 8, 60),
        "num_hidden_layers": _number(draw, 1, 3),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": patch * _number(draw, 2, 4) + _number(draw, 0, patch - 1),
    }


def _vit(draw: Draw) -> Any:
    classes, bias = _number(draw, 2, 9), _flag(draw)
    return ViTConfig(**_vision(draw), num_labels=classes, qkv_bias=bias, architectures=["ViTForImageClassification"])


def _llava(draw: Draw) -> Any:
    text = draw(st.sampled_from([_llama, _mistral, lambda draw: Qwen2Config(**_sizes(draw))]))(draw)
    text.tie_word_embeddings = False
    vision = CLIPVisionConfig(**_vision(draw))
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_number(draw, 3, 319),
        vision_feature_layer=-_number(draw, 1, vision.num_hidden_layers + 1),
        vision_feature_select_strategy=draw(st.sampled_from(["default", "full"])),
        multimodal_projector_bias=_flag(draw),
        architectures=["LlavaForConditionalGeneration"],
    )


def _marian(draw: Draw) -> Any:
    encoder, decoder, dim = _number(draw, 1, 4), _number(draw, 1, 4), 2 * _number(draw, 1, 3)
    return MarianConfig(
        vocab_size=320,
        d_model=encoder * decoder * dim,  # both numbers of heads divide it
        encoder_layers=_number(draw, 1, 2),
        decoder_layers=_number(draw, 1, 3),
        encoder_attention_heads=encoder,
        decoder_attention_heads=decoder,
        encoder_ffn_dim=_number(draw, 8, 60),
        decoder_ffn_dim=_number(draw, 8, 60),
        max_position_embeddings=_number(draw, 40, 80),
        scale_embedding=_flag(draw),
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=2,
        forced_eos_token_id=2,
        architectures=["MarianMTModel"],
    )


RANDOM: dict[str, Callable[[Draw], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": lambda draw: Qwen2Config(**_sizes(draw)),
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "gemma": lambda draw: GemmaConfig(**_sizes(draw, dim_apart=True), attention_bias=_flag(draw)),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "opt": _opt,
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2_moe,
    "qwen3-moe": _qwen3_moe,
    "bert": _encoder(BertConfig, "Bert"),
    "roberta": _encoder(RobertaConfig, "Roberta", padding=1),
    "xlm-roberta": _encoder(XLMRobertaConfig, "XLMRoberta", padding=1),
    "distilbert": _distilbert,
    "vit": _vit,
    "llava": _llava,
    "marian": _marian,
}
