"""What an export refuses: a clear line for each, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    OPTConfig,
    SiglipVisionConfig,
)

from export.bundle import export_model
from shared.errors import ExportError, FamilyError
from tests.checkpoints import ENCODER, OPT, SIZES, make_checkpoint

Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    """Exports a checkpoint, and gives the one line of the error it must end with."""

    def export(checkpoint: Path, kind: type[ExportError]) -> str:
        out = tmp_path / "outputs" / "out"
        with pytest.raises(kind) as caught:
            export_model(str(checkpoint), out)
        assert not out.parent.exists() or list(out.parent.iterdir()) == []
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return export


# --- architectures ---


def test_an_architecture_without_a_table(refusal: Refusal, tmp_path: Path) -> None:
    MambaConfig().save_pretrained(tmp_path / "mamba")
    line = refusal(tmp_path / "mamba", FamilyError)
    assert line.startswith(
        "architecture 'mamba' is in no table; supported: llama, mistral, qwen2, qwen3, smollm3, gemma"
    )
    assert "marian" in line


def test_a_head_without_a_row(refusal: Refusal, tmp_path: Path) -> None:
    BertConfig(**ENCODER, architectures=["BertForTokenClassification"]).save_pretrained(tmp_path / "bert")
    assert refusal(tmp_path / "bert", FamilyError) == (
        "architecture 'bert': seen the class 'BertForTokenClassification', wanted one of: BertModel, "
        "BertForSequenceClassification, BertForMaskedLM, BertForPreTraining"
    )


def test_a_class_that_is_not_the_familys_causal_model(refusal: Refusal, tmp_path: Path) -> None:
    GPT2Config(architectures=["GPT2ForSequenceClassification"]).save_pretrained(tmp_path / "gpt2")
    assert refusal(tmp_path / "gpt2", FamilyError) == (
        "architecture 'gpt2': seen the class 'GPT2ForSequenceClassification', wanted one of: GPT2LMHeadModel"
    )


def test_an_opt_whose_embeddings_are_narrower_than_its_stream(refusal: Refusal, tmp_path: Path) -> None:
    OPTConfig(**OPT | {"word_embed_proj_dim": 24}).save_pretrained(tmp_path / "opt")
    assert refusal(tmp_path / "opt", FamilyError) == (
        "architecture 'opt': word_embed_proj_dim: seen 24, wanted the hidden size, 48"
    )


def test_a_bert_that_is_a_decoder(refusal: Refusal, tmp_path: Path) -> None:
    BertConfig(**ENCODER, is_decoder=True, architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    assert refusal(tmp_path / "bert", FamilyError) == ("architecture 'bert': is_decoder: seen true, wanted an encoder")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"vision_config": SiglipVisionConfig()},
            "architecture 'llava': vision tower: seen 'siglip_vision_model', wanted 'clip_vision_model'",
        ),
        (
            {"text_config": OPTConfig(**OPT)},
            "architecture 'llava': language model: seen 'opt', wanted 'llama', 'mistral' or 'qwen2'",
        ),
        (
            {"vision_feature_layer": [-2, -1]},
            "architecture 'llava': vision_feature_layer: seen several layers, wanted one",
        ),
    ],
    ids=["tower", "language", "layers"],
)
def test_a_llava_of_other_parts(changes: dict[str, Any], line: str, refusal: Refusal, tmp_path: Path) -> None:
    parts = {"text_config": LlamaConfig(**SIZES), "vision_config": CLIPVisionConfig()}
    LlavaConfig(**parts | changes, architectures=["LlavaForConditionalGeneration"]).save_pretrained(tmp_path / "llava")
    assert refusal(tmp_path / "llava", FamilyError) == line


# --- tensors ---


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "bert-classifier", "distilbert", "vit", "llava", "marian"])
def test_a_tensor_that_no_row_names(kind: str, refusal: Refusal, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / kind, kind, shards="10GB")
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {"adapter.weight": torch.ones(48, 48)}, checkpoint / "model.safetensors", {"format": "pt"})
    line = refusal(checkpoint, FamilyError)
    assert line.startswith("tensor 'adapter.weight' is named by no row of the ")
    assert line.endswith(" table; nothing is passed through untransformed")


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "bert-classifier", "distilbert", "vit", "llava", "marian"])
def test_a_tensor_that_is_missing(kind: str, refusal: Refusal, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / kind, kind, shards="10GB")
    weights = load_file(checkpoint / "model.safetensors")
    lost = next(name for name in sorted(weights, reverse=True) if "norm" in name.lower() or ".ln_" in name)
    del weights[lost]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    line = refusal(checkpoint, FamilyError)
    assert line.startswith("tensors missing from the source: ")
    assert lost.rpartition(".")[2] in line


# --- images ---


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llava", {"do_pad": True}, "seen do_pad, wanted resizing and cropping alone"),
        ("llava", {"crop_size": {"height": 20, "width": 20}}, "it crops to {'height': 20, 'width': 20}, wanted"),
        ("llava", {"do_center_crop": False}, "it resizes to {'shortest_edge': 24}, which does not give the model's"),
        ("llava", {"size": {"shortest_edge": 16}}, "it resizes to {'shortest_edge': 16}, which does not give"),
        ("vit", {"do_resize": False}, "seen do_resize false, wanted one that resizes"),
        (
            "vit",
            {"size": {"height": 24, "width": 32}},
            "it resizes to {'height': 24, 'width': 32}, which does not give",
        ),
    ],
)
def test_an_image_processor_that_devices_could_not_follow(
    kind: str, changes: dict[str, Any], reason: str, refusal: Refusal, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / kind, kind)
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(settings | changes))
    assert refusal(checkpoint, ExportError).startswith(f"image processor: {reason}")
