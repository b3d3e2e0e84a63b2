"""What an export leaves behind, and what it does not."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from export import bundle
from export.bundle import export_model
from export.embedding import export_embedding
from export.shards import Shards
from shared.errors import EquivalenceError, ExportError, FamilyError, SourceError
from shared.manifest import CloudManifest, DeviceManifest, read_manifest
from tests.checkpoints import TINY, make_checkpoint


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_the_cloud_folder_holds_weights_config_and_manifest_alone(tiny: Path) -> None:
    names = {path.name for path in (tiny / "cloud").iterdir()}
    assert {"config.json", "stip.json"} <= names
    assert all(
        name.endswith(".safetensors") or name.endswith(".index.json") for name in names - {"config.json", "stip.json"}
    )
    assert "model.embed_tokens.weight" not in Shards(tiny / "cloud").shapes


def test_plain_transformers_loads_the_cloud_folder_and_misses_the_embedding_alone(tiny: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(tiny / "cloud", output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.embed_tokens.weight"}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]


def test_the_cloud_learns_no_token_id_no_path_and_no_model_name(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "secret-model-name", "llama")
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"_name_or_path": "secret-model-name", "finetuned_from": "secret-model-name"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    export_model(str(checkpoint), tmp_path / "out")
    for path in (tmp_path / "out" / "cloud").iterdir():
        assert b"secret" not in path.read_bytes()
    cloud = AutoConfig.from_pretrained(tmp_path / "out" / "cloud")
    assert cloud.bos_token_id is None and cloud.eos_token_id is None and cloud.pad_token_id is None


def test_the_cloud_manifest_has_no_digest_of_a_device_file(tiny: Path) -> None:
    cloud = (tiny / "cloud" / "stip.json").read_text()
    for entry in read_manifest(tiny / "device", DeviceManifest).files.values():
        assert entry.sha256 not in cloud


def test_both_halves_carry_the_same_key_id_name_and_protocol(tiny: Path) -> None:
    cloud, device = read_manifest(tiny / "cloud", CloudManifest), read_manifest(tiny / "device", DeviceManifest)
    assert (cloud.key_id, cloud.served_name, cloud.protocol) == (device.key_id, device.served_name, device.protocol)


def test_every_shard_says_whose_it_is(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    export_model(str(tiny_checkpoints("llama")), tmp_path / "out", shard_bytes=60_000)
    shards = sorted((tmp_path / "out" / "cloud").glob("*.safetensors"))
    assert len(shards) > 2
    key_id = read_manifest(tmp_path / "out" / "cloud", CloudManifest).key_id
    for path in shards:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "key_id": key_id, "file": path.name}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "cloud")


def test_the_key_is_readable_by_its_owner_alone(tiny: Path) -> None:
    assert stat.S_IMODE((tiny / "device" / "key.safetensors").stat().st_mode) == 0o600
    assert stat.S_IMODE((tiny / "device").stat().st_mode) == 0o700


def test_a_seeded_export_says_that_it_is_not_for_use(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    report = export_model(str(tiny_checkpoints("llama")), tmp_path / "out", seed=1)
    assert report.warning == "seeded: not for use"
    assert read_manifest(tmp_path / "out" / "device", DeviceManifest).warning == report.warning
    assert read_manifest(tmp_path / "out" / "cloud", CloudManifest).warning == report.warning


def test_figures_of_the_check_are_stored(tiny: Path) -> None:
    check = read_manifest(tiny / "device", DeviceManifest).check
    assert check["positions"] == 128 and check["same_top_token"] + check["near_ties"] == 128
    assert 0 < check["max_difference"] < 1e-4 * check["largest_logit"]


def test_an_output_that_exists_is_left_alone(tiny: Path, tiny_checkpoints: Callable[[str], Path]) -> None:
    before = sorted(path.stat().st_mtime_ns for path in tiny.rglob("*"))
    with pytest.raises(ExportError, match="it exists already"):
        export_model(str(tiny_checkpoints("llama")), tiny)
    assert sorted(path.stat().st_mtime_ns for path in tiny.rglob("*")) == before


def test_an_unknown_tensor_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama", shards="1GB")
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {"model.layers.0.extra.weight": torch.zeros(3)}, checkpoint / "model.safetensors")
    (tmp_path / "outputs").mkdir()
    with pytest.raises(FamilyError, match=r"'model\.layers\.0\.extra\.weight' is named by no row"):
        export_model(str(checkpoint), tmp_path / "outputs" / "out")
    assert left_over(tmp_path / "outputs") == []


def test_a_transformation_that_changes_the_function_is_caught(
    tiny_checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The paper's printed SwiGLU rule leaves W₁ where it was.
    from dataclasses import replace

    from export.families import LLAMA
    from export.spaces import Fixed

    wrong = LLAMA.tensors | {"model.layers.{i}.mlp.gate_proj.weight": (Fixed("as printed"), "residual")}
    monkeypatch.setattr(bundle, "family_of", lambda config: replace(LLAMA, tensors=wrong))
    with pytest.raises(EquivalenceError, match="logits differ"):
        export_model(str(tiny_checkpoints("llama")), tmp_path / "outputs" / "out")
    assert left_over(tmp_path / "outputs") == []


def test_forgotten_norm_weights_are_caught(
    tiny_checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The authors' public code forgets them and passes, because its weights are all ones.
    from dataclasses import replace

    from export.families import LLAMA
    from export.spaces import Fixed

    wrong = LLAMA.tensors | {"model.norm.weight": (Fixed("forgotten"),)}
    monkeypatch.setattr(bundle, "family_of", lambda config: replace(LLAMA, tensors=wrong))
    with pytest.raises(EquivalenceError):
        export_model(str(tiny_checkpoints("llama")), tmp_path / "out")


def test_ctrl_c_leaves_nothing_behind(
    tiny_checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "check_equivalence", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(str(tiny_checkpoints("llama")), tmp_path / "outputs" / "out")
    assert left_over(tmp_path / "outputs") == []


def test_a_truncated_source_shard_is_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SourceError, match=shard.name):
        export_model(str(checkpoint), tmp_path / "out")


def test_a_missing_source_shard_is_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SourceError, match=f"{shard.name}: missing"):
        export_model(str(checkpoint), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_onnx_gives_the_rows_of_the_table(dtype: torch.dtype, tmp_path: Path) -> None:
    table = torch.randn(50, 8).to(dtype)
    export_embedding(table, tmp_path)
    session = ort.InferenceSession(tmp_path / "embedding.onnx")
    (rows,) = session.run(None, {"ids": [3, 49, 3]})
    assert (rows == table[[3, 49, 3]].float().numpy()).all()


def test_all_tiny_kinds_are_covered_by_one_table() -> None:
    assert {config.model_type for config in TINY.values()} == {"llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_disk_is_said_to_be_full_only_where_it_is(number: int, hint: bool, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="out: ") as caught, bundle._appearing_whole(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert (caught.value.hint is not None) is hint
    assert left_over(tmp_path) == []
