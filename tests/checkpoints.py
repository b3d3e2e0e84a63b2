"""Tiny checkpoints of every family and class that the tables serve, from stock configs, every tensor random."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CLIPImageProcessorPil,
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
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
    ViTConfig,
    ViTImageProcessorPil,
    XLMRobertaConfig,
)

from export.families import family_of

SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Grouped heads, odd head counts, heads wider than hidden_size / heads, biases, tied and untied, a sliding window.
TINY = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-odd-heads": LlamaConfig(
        **SIZES | {"hidden_size": 45, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10}
    ),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1}, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES | {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 16}),
    "qwen3-tied": Qwen3Config(**SIZES | {"head_dim": 12}, tie_word_embeddings=True),
}

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

PLACEHOLDER = "<|pad|>"  # id 0 of the tiny tokenizer; stands for an image
# As SmolVLM's: content is a list of parts.
LOOKING_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + PLACEHOLDER + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

# --- the other families ---

UNGROUPED = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
ENCODER = UNGROUPED | {"num_hidden_layers": 2, "max_position_embeddings": 66, "num_labels": 5}
ROBERTA = ENCODER | {"pad_token_id": 1}  # from behind which positions count
DISTILBERT = {
    "vocab_size": 320,
    "dim": 48,
    "hidden_dim": 80,
    "n_layers": 2,
    "n_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 5,
}
OPT = UNGROUPED | {"ffn_dim": 80, "word_embed_proj_dim": 48, "max_position_embeddings": 64}
LAYERS_OF_BOTH_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def _served_as(stock: str, config: Any) -> Any:
    config.architectures = [stock]
    return config


FAMILIES: dict[str, Any] = {
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, **LAYERS_OF_BOTH_KINDS),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, **LAYERS_OF_BOTH_KINDS),
    "phi": PhiConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "phi3": Phi3Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=320, n_embd=48, n_layer=3, n_head=6, n_positions=64, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(**OPT),
    "opt-post-norm": OPTConfig(**OPT, do_layer_norm_before=False),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[1]),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=12, decoder_sparse_step=2),
    "bert": _served_as("BertModel", BertConfig(**ENCODER)),
    "bert-classifier": _served_as("BertForSequenceClassification", BertConfig(**ENCODER)),
    "roberta": _served_as("RobertaModel", RobertaConfig(**ROBERTA)),
    "roberta-classifier": _served_as("RobertaForSequenceClassification", RobertaConfig(**ROBERTA)),
    "xlm-roberta": _served_as("XLMRobertaModel", XLMRobertaConfig(**ROBERTA)),
    "xlm-roberta-classifier": _served_as("XLMRobertaForSequenceClassification", XLMRobertaConfig(**ROBERTA)),
    "distilbert": _served_as("DistilBertModel", DistilBertConfig(**DISTILBERT)),
    "distilbert-classifier": _served_as("DistilBertForSequenceClassification", DistilBertConfig(**DISTILBERT)),
    "vit": _served_as(
        "ViTForImageClassification",
        ViTConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            image_size=24,
            patch_size=8,
            num_labels=5,
        ),
    ),
    "llava": _served_as(
        "LlavaForConditionalGeneration",
        LlavaConfig(
            text_config=LlamaConfig(**SIZES),
            vision_config=CLIPVisionConfig(
                hidden_size=40,
                intermediate_size=56,
                num_hidden_layers=3,
                num_attention_heads=5,
                image_size=24,
                patch_size=8,
            ),
            image_token_id=0,
        ),
    ),
    "marian": _served_as(
        "MarianMTModel",
        MarianConfig(
            vocab_size=320,
            d_model=48,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=6,
            decoder_attention_heads=4,
            encoder_ffn_dim=80,
            decoder_ffn_dim=72,
            max_position_embeddings=64,
            scale_embedding=True,
            pad_token_id=0,
            eos_token_id=2,
            forced_eos_token_id=2,
            decoder_start_token_id=0,
        ),
    ),
}
# One of every family and class.
EVERY: dict[str, Any] = {kind: TINY[kind] for kind in ("llama-biases", "mistral", "qwen2", "qwen3")} | FAMILIES
ALL: dict[str, Any] = TINY | FAMILIES


def tiny_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens with a chat template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    text = ["the cat sat on the mat, and the dog sang in the rain; then all of them went home together"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=template,
    )


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter drawn anew: fresh models have unit norms and zero biases, which hide what is forgotten.

    Stored buffers of floats too; what the stock model computes (Marian's sinusoids) stays.
    """
    generator = torch.Generator().manual_seed(seed)
    learned = [(name, values) for name, values in model.named_parameters() if values.requires_grad]
    stored = [(name, values) for name, values in model.named_buffers() if name in model.state_dict()]
    with torch.no_grad():
        for name, values in [*learned, *stored]:
            module, _, own = name.rpartition(".")
            gain = own == "weight" and "Norm" in type(model.get_submodule(module)).__name__
            scale = 0.3 if values.ndim == 1 else values.shape[-1] ** -0.5
            drawn = torch.randn(values.shape, generator=generator)
            if values.is_floating_point():
                values.copy_(drawn * scale + float(gain))


def make_checkpoint(
    folder: Path, kind: str | PretrainedConfig, *, dtype: torch.dtype = torch.float32, shards: str = "60KB"
) -> Path:
    """A stock checkpoint of a kind (a key of ALL) or config, every tensor randomised, in several shards."""
    config = ALL[kind] if isinstance(kind, str) else kind
    model = stock_model(config)
    randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    if kind == "bert":
        write_sentence_settings(folder)
    family = family_of(config)
    if family.text is not None:
        tiny_tokenizer(LOOKING_TEMPLATE if family.image is not None else TEMPLATE).save_pretrained(folder)
    if family.image is not None:
        image_processor(config, family.image.config(config).image_size).save_pretrained(folder)
    return folder


def write_sentence_settings(folder: Path, *, cls: bool = False) -> None:
    """What sentence-transformers writes beside an encoder that was trained for vectors of sentences."""
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": cls, "pooling_mode_mean_tokens": not cls}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def stock_model(config: PretrainedConfig) -> Any:
    """The stock class that a config names, or its causal language model, in float32."""
    if config.architectures is None:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return getattr(transformers, config.architectures[0])(deepcopy(config)).eval()


def image_processor(config: PretrainedConfig, size: int) -> Any:
    """The stock image processor that a model of this kind comes with, for images of size × size."""
    if config.model_type == "vit":
        return ViTImageProcessorPil(size={"height": size, "width": size})
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
