"""What the manifest tells a device of its model, where the stock model's config says it in other words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, Phi3Config, PretrainedConfig, RobertaConfig

from export.bundle import export_model
from shared.errors import FamilyError
from shared.manifest import DeviceManifest, read_manifest
from tests.checkpoints import ENCODER, ROBERTA, SIZES, make_checkpoint, write_sentence_settings

CLASSIFIER = {"architectures": ["BertForSequenceClassification"]}


def manifest_of(checkpoint: Path) -> DeviceManifest:
    export_model(str(checkpoint), checkpoint.parent / "out")
    return read_manifest(checkpoint.parent / "out" / "device", DeviceManifest)


def made(folder: Path, config: PretrainedConfig) -> Path:
    return make_checkpoint(folder / "checkpoint", config)


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({}, "softmax"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 1}, "sigmoid"),
        ({"problem_type": "regression", "num_labels": 1}, "none"),
    ],
)
def test_class_logits_become_what_the_stock_pipelines_make_of_them(
    settings: dict[str, Any], activation: str, tmp_path: Path
) -> None:
    assert manifest_of(made(tmp_path, BertConfig(**ENCODER | CLASSIFIER | settings))).activation == activation


@pytest.mark.parametrize("cls", [True, False])
def test_vectors_of_sentences_are_pooled_as_the_model_was_trained(cls: bool, tmp_path: Path) -> None:
    checkpoint = made(tmp_path, BertConfig(**ENCODER, architectures=["BertModel"]))
    write_sentence_settings(checkpoint, cls=cls)
    (checkpoint / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 33}))
    manifest = manifest_of(checkpoint)
    assert (manifest.pooling, manifest.normalize, manifest.context) == ("first" if cls else "mean", True, 33)


def test_a_model_that_was_not_trained_for_sentences_has_no_pooling(tmp_path: Path) -> None:
    manifest = manifest_of(made(tmp_path, BertConfig(**ENCODER, architectures=["BertModel"])))
    assert manifest.pooling is None and manifest.outputs == ["hidden", "pooled"]


def test_tensors_that_the_stock_class_has_no_place_for_are_not_in_the_cloud(tmp_path: Path) -> None:
    # Some classifiers were saved with the pooler of the model they were trained from.
    checkpoint = made(tmp_path, RobertaConfig(**ROBERTA, architectures=["RobertaForSequenceClassification"]))
    [file] = checkpoint.glob("*00001*.safetensors")
    more = {f"roberta.pooler.dense.{name}": torch.randn(shape) for name, shape in (("weight", (48, 48)), ("bias", 48))}
    save_file(load_file(file) | more, file, {"format": "pt"})
    assert manifest_of(checkpoint).outputs == ["hidden", "logits"]
    stored = {name for path in (tmp_path / "out" / "cloud").glob("*.safetensors") for name in load_file(path)}
    assert stored and not [name for name in stored if "pooler" in name]


def test_nothing_that_is_no_setting_of_the_architecture_is_in_the_cloud_s_config(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, head_dim=12)
    checkpoint = made(tmp_path, config)
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_llama_config": True, "made_by": "us", "run": 7}))
    manifest_of(checkpoint)
    stored = json.loads((tmp_path / "out" / "cloud" / "config.json").read_text())
    assert stored["head_dim"] == 12 and not {"is_llama_config", "made_by", "run"} & stored.keys()


LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def test_a_longrope_model_has_its_original_context(tmp_path: Path) -> None:
    # Beyond it the stock model takes other frequencies for all positions, those in a KV cache included.
    config = Phi3Config(**SIZES, rope_parameters=LONG, original_max_position_embeddings=40)
    assert manifest_of(made(tmp_path, config)).context == 40


def test_frequencies_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(FamilyError, match="rope_type: seen 'dynamic', whose frequencies depend on the length so far"):
        manifest_of(made(tmp_path, LlamaConfig(**SIZES, rope_parameters=dynamic)))


def test_llama_3_s_scaling_goes_to_the_cloud(tmp_path: Path) -> None:
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    assert manifest_of(made(tmp_path, LlamaConfig(**SIZES, rope_parameters=scaled))).context == 256
    stored = json.loads((tmp_path / "out" / "cloud" / "config.json").read_text())
    assert stored["rope_parameters"] == scaled
