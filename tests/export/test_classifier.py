"""The classifier on the device: what an export with `--head device` writes, and what it keeps from the cloud."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from export.bundle import export_model
from export.classifier import export_classifier
from export.embedding import export_embedding
from export.scheme import SchemeName
from export.shards import Shards
from shared.errors import EquivalenceError, ExportError
from shared.key import UserKey
from shared.manifest import CloudManifest, DeviceManifest, read_manifest

TIED = ["llama-tied", "qwen2-tied", "qwen3-tied"]
SCHEMES: list[SchemeName] = ["permutation", "rotation"]
Exports = Callable[..., Path]


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    vocab_size=st.integers(1, 70),
    hidden_size=st.integers(1, 40),
    rows=st.integers(1, 5),
    gained=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_its_logits_are_those_of_a_plain_product_with_the_table(
    dtype: torch.dtype, vocab_size: int, hidden_size: int, rows: int, gained: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    gain = 1 + torch.randn(hidden_size, generator=generator).to(dtype) if gained else None
    expected = (hidden if gain is None else hidden * gain.float()) @ table.float().T
    with tempfile.TemporaryDirectory() as name:
        export_embedding(table, Path(name))
        export_classifier(dtype, tuple(table.shape), Path(name), gain=gain)
        session = ort.InferenceSession(Path(name) / "classifier.onnx", providers=["CPUExecutionProvider"])
        [logits] = session.run(None, {"hidden": hidden.numpy()})
    assert logits.shape == (rows, vocab_size) and logits.dtype == np.float32
    assert np.abs(logits - expected.numpy()).max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_shares_the_bytes_of_the_embedding(tiny_exports: Exports, scheme: SchemeName) -> None:
    device = tiny_exports("llama-tied", scheme, "device") / "device"
    places = []
    for name in ("embedding.onnx", "classifier.onnx"):
        [table] = [
            tensor
            for tensor in onnx.load(device / name, load_external_data=False).graph.initializer
            if tensor.name == "table"
        ]
        places.append({entry.key: entry.value for entry in table.external_data})
    assert places[0] == places[1] == {"location": "embedding.onnx.data", "offset": "0", "length": str(320 * 48 * 4)}
    assert (device / "classifier.onnx").stat().st_size < 1024 + 4 * 48
    assert [path.name for path in device.glob("*.data")] == ["embedding.onnx.data"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_check_holds_both_schemes_to_the_function(tiny_exports: Exports, scheme: SchemeName) -> None:
    check = read_manifest(tiny_exports("qwen3-tied", scheme, "device") / "device", DeviceManifest).check
    assert check["same_top_token"] + check["near_ties"] == check["positions"] == 128
    assert 0 < check["max_difference"] < 1e-4 * check["largest_logit"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", TIED)
def test_the_cloud_has_no_classifier_and_is_told_no_vocabulary(
    tiny_exports: Exports, kind: str, scheme: SchemeName
) -> None:
    cloud = tiny_exports(kind, scheme, "device") / "cloud"
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(Shards(cloud).shapes)
    assert read_manifest(cloud, CloudManifest).absent == ["lm_head.weight", "model.embed_tokens.weight"]
    assert json.loads((cloud / "config.json").read_text())["vocab_size"] == 1
    assert "320" not in (cloud / "config.json").read_text()


@pytest.mark.parametrize("kind", TIED)
def test_plain_transformers_loads_the_cloud_folder_and_misses_the_two_tables_alone(
    tiny_exports: Exports, kind: str
) -> None:
    folder = tiny_exports(kind, "rotation", "device") / "cloud"
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_device_knows_where_the_classifier_is_and_gets_no_order_of_the_vocabulary(
    tiny_exports: Exports, scheme: SchemeName
) -> None:
    out = tiny_exports("llama-tied", scheme, "device")
    manifest = read_manifest(out / "device", DeviceManifest)
    assert (manifest.head, manifest.vocab_size) == ("device", 320)
    assert "classifier.onnx" in manifest.files
    assert UserKey.load(out / "device" / "key.safetensors").vocab is None
    assert json.loads((out / "export.json").read_text())["head"] == "device"


def test_an_order_that_hides_nothing_does_not_count_as_key_space(tiny_exports: Exports) -> None:
    keys = {
        head: json.loads((tiny_exports("llama-tied", head=head) / "export.json").read_text())["log2_keys"]
        for head in ("cloud", "device")
    }
    assert keys["cloud"] - keys["device"] == pytest.approx(torch.lgamma(torch.tensor(321.0)).item() / np.log(2), abs=1)


def test_a_model_with_a_classifier_of_its_own_is_refused_before_anything_is_written(
    tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"matrix of its own \(lm_head\.weight\), wanted a tied one") as raised:
        export_model(str(tiny_checkpoints("llama")), tmp_path / "outputs" / "out", head="device")
    assert raised.value.hint == "--head cloud"
    assert not (tmp_path / "outputs").exists()


def test_a_forgotten_gain_is_caught(
    tiny_checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.rotation import Rotation

    monkeypatch.setattr(Rotation, "folded", lambda self, axes: None)
    with pytest.raises(EquivalenceError, match="logits differ"):
        export_model(str(tiny_checkpoints("llama-tied")), tmp_path / "out", scheme="rotation", head="device")
