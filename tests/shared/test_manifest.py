"""Manifests: every way in which a copied folder goes wrong is found, and said with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from shared.errors import BundleError
from shared.manifest import (
    CLOUD_MANIFEST,
    DEVICE_MANIFEST,
    CloudManifest,
    DeviceManifest,
    FileEntry,
    check_files,
    file_entry,
    read_manifest,
    shard_header_digest,
    write_manifest,
)

COMMON: dict[str, Any] = {"key_id": "k" * 32, "served_name": "tiny", "scheme": "permutation", "dtype": "float32"}
DEVICE: dict[str, Any] = {
    "family": "llama",
    "hidden_size": 8,
    "vocab_size": 16,
    "context": 64,
    "tokenizer": "json",
    "tokenizer_proof": "18 strings",
    "prefix_ids": [1],
    "end_ids": [2],
    "hidden_ids": [1, 2],
    "special_tokens": {"eos_token": "</s>"},
    "check": {"prompts": 8, "largest difference": 9e-5},
}


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    """A cloud folder of two shards and a config."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    for shard in ("one", "two"):
        tensor = np.arange(6, dtype=np.float32) + len(shard)
        save_file({"weight": tensor}, folder / f"{shard}.safetensors", metadata={"file": shard})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    write_manifest(CloudManifest(**COMMON, files=files, absent=["model.embed_tokens.weight"]), folder)
    return folder


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A device folder of one file."""
    folder = tmp_path / "device"
    folder.mkdir()
    (folder / "embedding.onnx").write_bytes(b"onnx")
    files = {"embedding.onnx": file_entry(folder / "embedding.onnx")}
    write_manifest(DeviceManifest(**COMMON, **DEVICE, files=files), folder)
    return folder


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def check_cloud(folder: Path, *, contents: bool = False) -> None:
    check_files(folder, read_manifest(folder, CloudManifest), contents=contents)


# --- the manifest ---


def test_a_cloud_manifest_reads_back(cloud: Path) -> None:
    assert read_manifest(cloud, CloudManifest).absent == ["model.embed_tokens.weight"]


def test_a_device_manifest_reads_back(device: Path) -> None:
    manifest = read_manifest(device, DeviceManifest)
    assert {name: getattr(manifest, name) for name in DEVICE} == DEVICE


def test_a_manifest_is_indented_json_for_people(cloud: Path) -> None:
    assert (cloud / CLOUD_MANIFEST).read_text().startswith('{\n  "format": "stip-cloud-1",\n')


@pytest.mark.parametrize(
    "name", [name for name in DeviceManifest.__struct_fields__ if name not in ("digest", "protocol")]
)
def test_an_edited_field_is_found(device: Path, name: str) -> None:
    path = device / DEVICE_MANIFEST
    values: dict[type, Any] = {str: "json", int: 9, bool: True, list: [9], dict: {}, type(None): "seeded"}
    value = json.loads(path.read_text()).get(name)
    image = {"height": 8, "width": 8, "resize": 8, "resample": 3, "patches": 4}
    choices: dict[str, Any] = {"dtype": "float16", "tokenizer": "onnx", "head": "device", "kind": "encoder"}
    choices |= {"labels": ["cat"], "outputs": ["hidden"], "pooling": "mean", "image": image}
    choices |= {"streams": {"residual": "rotation"}, "activation": "sigmoid"}
    edit(path, **{name: choices.get(name, values[type(value)])})
    with pytest.raises(BundleError, match="does not fit its digest, so it was edited"):
        read_manifest(device, DeviceManifest)


def test_an_edited_digest_is_found(cloud: Path) -> None:
    edit(cloud / CLOUD_MANIFEST, digest="0" * 64)
    with pytest.raises(BundleError, match="edited"):
        read_manifest(cloud, CloudManifest)


def test_spaces_and_the_order_of_fields_are_no_edit(device: Path) -> None:
    path = device / DEVICE_MANIFEST
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert read_manifest(device, DeviceManifest).family == "llama"


@pytest.mark.parametrize("field", ["protocol", "format"])
def test_another_version_is_refused_with_what_to_do(cloud: Path, field: str) -> None:
    edit(cloud / CLOUD_MANIFEST, **{field: "stip.v2"})
    with pytest.raises(BundleError, match=r"stip\.v2") as caught:
        read_manifest(cloud, CloudManifest)
    assert "export again" in str(caught.value.hint)


def test_a_missing_manifest_hints_at_the_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=CLOUD_MANIFEST) as caught:
        read_manifest(tmp_path, CloudManifest)
    assert caught.value.hint == "give the export's cloud folder, for example OUT/cloud"


@pytest.mark.parametrize("kind", [CloudManifest, DeviceManifest])
def test_the_other_half_is_recognised(cloud: Path, device: Path, kind: Any) -> None:
    with pytest.raises(BundleError) as caught:
        read_manifest(device if kind is CloudManifest else cloud, kind)
    assert str(caught.value.hint).startswith("this is the other half; give the export's ")


def test_a_device_manifest_under_the_cloud_manifests_name_is_refused(cloud: Path, device: Path) -> None:
    (cloud / CLOUD_MANIFEST).write_bytes((device / DEVICE_MANIFEST).read_bytes())
    with pytest.raises(BundleError, match="stip-device-1"):
        read_manifest(cloud, CloudManifest)


UNREADABLE = {
    "empty": b"",
    "truncated": b'{"format": "stip-cloud-1", "key',
    "not JSON": b"\x00\x01",
    "an array": b"[]",
    "bad UTF-8": b'{"format":"stip-cloud-1","key_id":"\xff"}',
    "deep": b'{"x":' + b"[" * 100_000,
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_manifest_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / CLOUD_MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match=CLOUD_MANIFEST):
        read_manifest(tmp_path, CloudManifest)


def test_the_cloud_half_has_no_field_to_hold_anything_of_the_devices() -> None:
    shared = {"protocol", "key_id", "served_name", "scheme", "dtype", "warning", "files", "digest"}
    assert set(CloudManifest.__struct_fields__) == shared | {"kind", "absent", "weights", "quantisation"}


# --- the files ---


@pytest.mark.parametrize("contents", [False, True])
def test_a_whole_folder_passes(cloud: Path, contents: bool) -> None:
    check_cloud(cloud, contents=contents)


@pytest.mark.parametrize("contents", [False, True])
def test_a_missing_file_is_named(cloud: Path, contents: bool) -> None:
    (cloud / "config.json").unlink()
    with pytest.raises(BundleError, match=r"config\.json: missing"):
        check_cloud(cloud, contents=contents)


def test_a_folder_in_a_files_place_is_missing(cloud: Path) -> None:
    (cloud / "config.json").unlink()
    (cloud / "config.json").mkdir()
    with pytest.raises(BundleError, match=r"config\.json: missing"):
        check_cloud(cloud)


def test_a_truncated_file_is_named_with_both_lengths(cloud: Path) -> None:
    path = cloud / "one.safetensors"
    length = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"one\.safetensors: seen {length - 1} bytes, wanted {length}") as caught:
        check_cloud(cloud)
    assert str(caught.value.hint).startswith("truncated?")


def test_swapped_shards_are_found_by_their_headers(cloud: Path) -> None:
    one, two = cloud / "one.safetensors", cloud / "two.safetensors"
    assert one.stat().st_size == two.stat().st_size
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(BundleError, match=r"\.safetensors: its header is not the one this export wrote"):
        check_cloud(cloud)


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("name", ["one.safetensors", "config.json"])
def test_a_flipped_byte_is_found_when_contents_are_checked(cloud: Path, name: str) -> None:
    flip_last_byte(cloud / name)
    with pytest.raises(BundleError, match=f"{name}: its SHA-256 is not the one in the manifest"):
        check_cloud(cloud, contents=True)


def test_a_flipped_weight_is_not_looked_for_otherwise(cloud: Path) -> None:
    flip_last_byte(cloud / "one.safetensors")
    check_cloud(cloud, contents=False)


@pytest.mark.parametrize("name", ["../config.json", "sub/config.json", "{cloud}/config.json"])
def test_a_manifest_cannot_name_a_file_elsewhere(cloud: Path, name: str) -> None:
    # The file that it names is there and is the one that it describes, so that nothing else is wrong with it.
    name = name.format(cloud=cloud)
    (cloud / "sub").mkdir()
    (cloud / name).write_bytes((cloud / "config.json").read_bytes())
    manifest = CloudManifest(**COMMON, absent=[], files={name: file_entry(cloud / "config.json")})
    with pytest.raises(BundleError, match="wanted a plain file name"):
        check_files(cloud, manifest, contents=True)


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_manifest_cannot_name_a_folder(cloud: Path, name: str) -> None:
    manifest = CloudManifest(**COMMON, absent=[], files={name: file_entry(cloud / "config.json")})
    with pytest.raises(BundleError, match=r"wanted a plain file name|: missing"):
        check_files(cloud, manifest, contents=True)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that no user can read")
def test_a_file_that_cannot_be_read_is_named(cloud: Path) -> None:
    (cloud / "config.json").unlink()
    (cloud / "config.json").symlink_to("/proc/self/mem")  # its first bytes are an I/O error, for root too
    manifest = CloudManifest(**COMMON, absent=[], files={"config.json": FileEntry(bytes=0, sha256="")})
    with pytest.raises(BundleError, match=r"config\.json: Input/output error") as caught:
        check_files(cloud, manifest, contents=True)
    assert caught.value.hint == "may this user read it?"


def test_an_entry_holds_length_and_sha_256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's example
    assert file_entry(tmp_path / "abc") == FileEntry(bytes=3, sha256=digest)


def test_a_shards_entry_covers_its_header(cloud: Path) -> None:
    path = cloud / "one.safetensors"
    assert file_entry(path).header_sha256 == shard_header_digest(path)


def test_a_gguf_files_header_is_its_first_mebibyte(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(2**20))
    header = file_entry(path).header_sha256
    flip_last_byte(path)
    assert file_entry(path).header_sha256 == shard_header_digest(path) == header
    path.write_bytes(b"GGUX" + bytes(2**20))
    assert shard_header_digest(path) != header


def test_an_export_from_before_gguf_still_opens(cloud: Path) -> None:
    manifest = json.loads((cloud / CLOUD_MANIFEST).read_text())
    del manifest["weights"], manifest["quantisation"]
    (cloud / CLOUD_MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(cloud, CloudManifest).weights == "safetensors"
    manifest["weights"] = "gguf"
    (cloud / CLOUD_MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="edited"):
        read_manifest(cloud, CloudManifest)


def test_an_unknown_field_of_an_entry_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"bytes": 1, "sha256": "", "mode": 1}', type=FileEntry)
