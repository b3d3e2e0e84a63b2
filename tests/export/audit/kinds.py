"""Tiny checkpoints of one family of each kind and shape of table, every tensor random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MarianConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    ViTConfig,
)

from tests.conftest import SIZES, randomise, tiny_tokenizer

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "intermediate_size": 80}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
TEXT = {name: SIZES[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(**TEXT, n_embd=48, n_layer=2, n_head=4, n_positions=256),
    "opt": OPTConfig(
        **TEXT, hidden_size=48, word_embed_proj_dim=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=80
    ),
    "phi": PhiConfig(**TEXT | LAYERS, max_position_embeddings=256),
    "phi3": Phi3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=12),
    "gemma2": Gemma2Config(**SIZES, head_dim=12),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False),
    "bert": BertConfig(**TEXT | LAYERS, max_position_embeddings=64),
    "marian": MarianConfig(
        **TEXT,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=80,
        decoder_ffn_dim=80,
        max_position_embeddings=64,
        decoder_start_token_id=0,
        scale_embedding=True,
    ),
    "vit": ViTConfig(**LAYERS, **IMAGE, num_labels=5),
    "llava": LlavaConfig(
        vision_config=CLIPVisionConfig(**LAYERS, **IMAGE, projection_dim=48),
        text_config=LlamaConfig(**SIZES, tie_word_embeddings=False),
        image_token_id=5,
        vision_feature_layer=-1,
    ),
}
CLASSES = {
    "bert": "BertModel",
    "marian": "MarianMTModel",
    "vit": "ViTForImageClassification",
    "llava": "LlavaForConditionalGeneration",
}
PIXELS: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.5, 0.6, 0.4],
}


def make(folder: Path, kind: str) -> Path:
    """A checkpoint of a kind, as its publisher gives it."""
    config = CONFIGS[kind]
    if kind in CLASSES:
        model = getattr(transformers, CLASSES[kind])(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" in name and name.endswith("weight"):  # GPT-2's norms, whose gains are about 1 as all others' are
                parameter += 1
    model.save_pretrained(folder)
    if kind != "vit":
        tiny_tokenizer().save_pretrained(folder)
    if kind in ("vit", "llava"):
        (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder
