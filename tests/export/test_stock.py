"""Checkpoints as they lie on disks: whatever the names, the tensors are those that transformers loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, DistilBertConfig, PretrainedConfig, RobertaConfig, XLMRobertaConfig

from export.bundle import export_model
from export.families import family_of
from export.original import original, stored_name
from export.source import Source, open_source
from export.spaces import Dropped
from shared.errors import SourceError
from tests.checkpoints import ALL, DISTILBERT, ENCODER, ROBERTA, make_checkpoint

Rename = Callable[[str], str]


def assert_reads_as_transformers_does(checkpoint: Path) -> Source:
    """Every tensor of the served class, shared and computed ones too, is what from_pretrained() loads."""
    source = open_source(str(checkpoint))
    family = family_of(source.config)
    read = original(source, family, torch.float32)
    model = getattr(transformers, source.config.architectures[0]).from_pretrained(checkpoint, dtype=torch.float32)
    compared = 0
    for name, values in model.state_dict().items():
        if isinstance(family.axes(name), Dropped) and stored_name(source, family, name) is None:
            continue
        assert torch.equal(read(name), values), name
        compared += 1
    assert compared > 10
    return source


def rewritten(checkpoint: Path, rename: Rename, more: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    """A checkpoint under other tensor names, with more tensors and other settings."""
    weights = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in checkpoint.glob("model*"):
        file.unlink()
    renamed = {rename(name): tensor for name, tensor in weights.items()}
    assert len(renamed) == len(weights)
    save_file(renamed | (more or {}), checkpoint / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text()) | settings
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


@pytest.mark.parametrize("kind", ALL)
def test_what_save_pretrained_writes(kind: str, tiny_checkpoints: Callable[[str], Path]) -> None:
    assert_reads_as_transformers_does(tiny_checkpoints(kind))


# --- the hub's layouts ---


def test_gpt2_without_its_prefix_and_with_its_masks(tmp_path: Path) -> None:
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
    checkpoint = rewritten(
        make_checkpoint(tmp_path / "gpt2", "gpt2"), lambda name: name.removeprefix("transformer."), masks
    )
    source = assert_reads_as_transformers_does(checkpoint)
    assert "transformer.h.0.ln_1.weight" in source.shapes
    assert export_model(str(checkpoint), tmp_path / "out").check.positions == 128


@pytest.mark.parametrize("named", ["BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("old", [False, True], ids=["weight-bias", "gamma-beta"])
def test_bert_from_its_pretraining(named: str, old: bool, tmp_path: Path) -> None:
    # As the first BERTs lie on the hub: both heads, names of TensorFlow's norms, a buffer of integers.
    config = BertConfig(**ENCODER, architectures=["BertForPreTraining"])

    def rename(name: str) -> str:
        norm, _, own = name.rpartition("LayerNorm.")
        return f"{norm}LayerNorm.{'gamma' if own == 'weight' else 'beta'}" if norm and old else name

    ids = {"bert.embeddings.position_ids": torch.arange(66)[None]}
    checkpoint = rewritten(make_checkpoint(tmp_path / "bert", config), rename, ids, architectures=[named])
    source = assert_reads_as_transformers_does(checkpoint)
    assert source.config.architectures == ["BertModel"]
    assert source.dtype == torch.float32
    assert any(name.startswith("cls.") for name in load_file(checkpoint / "model.safetensors"))
    check = export_model(str(checkpoint), tmp_path / "out").check
    assert check.max_difference <= 1e-4 * check.largest_logit


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (RobertaConfig(**ROBERTA, architectures=["RobertaForMaskedLM"]), "roberta."),
        (XLMRobertaConfig(**ROBERTA, architectures=["XLMRobertaForMaskedLM"]), "roberta."),
        (DistilBertConfig(**DISTILBERT, architectures=["DistilBertForMaskedLM"]), ""),
    ],
    ids=["roberta", "xlm-roberta", "distilbert"],
)
def test_encoders_with_a_head_that_is_not_served(config: PretrainedConfig, prefix: str, tmp_path: Path) -> None:
    pooler = {f"{prefix}pooler.dense.weight": torch.randn(48, 48), f"{prefix}pooler.dense.bias": torch.randn(48)}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    rewritten(checkpoint, lambda name: name, pooler if prefix else None)
    source = assert_reads_as_transformers_does(checkpoint)
    assert source.config.architectures == [config.architectures[0].replace("ForMaskedLM", "Model")]
    export_model(str(checkpoint), tmp_path / "out")


def test_a_llava_with_the_hubs_older_names(tmp_path: Path) -> None:
    older = {
        r"^model\.language_model\.": "language_model.model.",
        r"^language_model\.(?!model\.|lm_head)": "language_model.model.",
        r"^lm_head\.": "language_model.lm_head.",
        r"^model\.vision_tower\.(?!vision_model)": "vision_tower.vision_model.",
        r"^vision_tower\.(?!vision_model)": "vision_tower.vision_model.",
        r"^model\.multi_modal_projector\.": "multi_modal_projector.",
    }

    def rename(name: str) -> str:
        for pattern, replacement in older.items():
            name = re.sub(pattern, replacement, name)
        return name

    ids = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None]}
    checkpoint = rewritten(make_checkpoint(tmp_path / "llava", "llava"), rename, ids)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in load_file(checkpoint / "model.safetensors")
    assert_reads_as_transformers_does(checkpoint)
    export_model(str(checkpoint), tmp_path / "out")


@pytest.mark.parametrize("kind", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_lie_one_by_one_and_are_read_as_a_stack(kind: str, tiny_checkpoints: Callable[[str], Path]) -> None:
    checkpoint = tiny_checkpoints(kind)
    stored = [name for file in checkpoint.glob("*.safetensors") for name in load_file(file)]
    assert any(".experts.3." in name for name in stored)
    source = open_source(str(checkpoint))
    stack = next(name for name in source.shapes if name.endswith("experts.gate_up_proj"))
    assert source.shapes[stack][0] == 4
    assert source.read(stack).shape == source.shapes[stack]


def test_a_tensor_that_is_stored_twice(tmp_path: Path) -> None:
    again = {"bert.pooler.dense.bias": torch.zeros(48)}
    checkpoint = rewritten(make_checkpoint(tmp_path / "bert", "bert"), lambda name: name, again)
    with pytest.raises(
        SourceError, match=r"tensor 'pooler\.dense\.bias': stored twice, as 'bert\.pooler\.dense\.bias'"
    ):
        open_source(str(checkpoint))
