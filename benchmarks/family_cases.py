"""The models that `make families` measures: real ones, and random weights at the shapes of the paper's models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import (
    BertConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MarianConfig,
    MixtralConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from benchmarks.random_weights import write_random
from examples.minilm import minilm_folder
from examples.smollm2 import smollm2_gguf
from export.source import open_source

VOCABULARY = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # of SmolLM2's tokenizer
WORDS = {"vocab_size": 30522, "architectures": ["BertModel"]}  # of MiniLM's


@dataclass(frozen=True)
class Case:
    """One row of the table. model: what gives a real one's path, or a config for random weights at its shape."""

    family: str
    size: str
    model: Any
    paper: str | None = None  # the Σ|diff| in the paper's table 5 at this size; in brackets at another
    results: int = 10_000  # at least; fewer where it would take too long

    @property
    def name(self) -> str:
        return f"{self.family}-{self.size}".lower()

    @property
    def real(self) -> bool:
        return callable(self.model)

    def checkpoint(self, folder: Path) -> Path:
        """The model's path; random weights are written to `folder`, with the tokenizer or the image processor that
        the config's sizes are made for."""
        if self.real:
            path: Path = self.model()
            return path
        write_random(self.model, folder)
        kind = self.model.model_type
        if kind == "vit":
            ViTImageProcessorPil().save_pretrained(folder)
            return folder
        _tokenizer(minilm_folder() if kind == "bert" else smollm2_gguf()).save_pretrained(folder)
        if kind == "llava":
            CLIPImageProcessorPil().save_pretrained(folder)
        return folder


@cache
def _tokenizer(model: Path) -> Any:
    return open_source(str(model)).tokenizer()


CASES = (
    Case("GPT-2", "124m", GPT2Config(architectures=["GPT2LMHeadModel"]), "0.021"),
    Case(
        "GPT-2",
        "355m",
        GPT2Config(n_embd=1024, n_layer=24, n_head=16, architectures=["GPT2LMHeadModel"]),
        "0.033",
    ),
    Case("SmolLM2", "135m", smollm2_gguf, "(LLaMA2 7b: 0.009)"),
    Case(
        "LLaMA",
        "1.2b",
        LlamaConfig(
            **VOCABULARY,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            architectures=["LlamaForCausalLM"],
        ),
        "(LLaMA2 7b: 0.009)",
        1_000,
    ),
    Case("ViT", "86m", ViTConfig(num_labels=1000, architectures=["ViTForImageClassification"]), "3e-4", 1_000),
    Case(
        "BERT",
        "4m",
        BertConfig(**WORDS, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512),
        "5e-3",
    ),
    Case("MiniLM", "23m", minilm_folder, "(BERT 41m: 8e-3)"),
    Case(
        "BERT",
        "41m",
        BertConfig(**WORDS, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048),
        "8e-3",
    ),
    Case("BERT", "110m", BertConfig(**WORDS), "9e-3"),
    Case(
        "BERT",
        "336m",
        BertConfig(**WORDS, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        "9e-3",
    ),
    Case(
        "LLaVA",
        "173m",
        LlavaConfig(
            text_config=LlamaConfig(
                **VOCABULARY,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=16,
                num_attention_heads=9,
                num_key_value_heads=3,
            ),
            vision_config=CLIPVisionConfig(num_hidden_layers=8),
            image_token_id=7,
            architectures=["LlavaForConditionalGeneration"],
        ),
        "(13b: 0.016)",
    ),
    Case(
        "Mixtral",
        "156m",
        MixtralConfig(
            **VOCABULARY,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            architectures=["MixtralForCausalLM"],
        ),
        "(47b: 0.008)",
    ),
    Case(
        "Marian",
        "74m",
        MarianConfig(
            d_model=512,
            encoder_layers=6,
            decoder_layers=6,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            encoder_ffn_dim=2048,
            decoder_ffn_dim=2048,
            architectures=["MarianMTModel"],
        ),
    ),
)
