"""Device bundles: whole, of one export, and readable by nobody else, or a BundleError that says what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from device_app.bundle import Bundle
from device_app.opening import NO_ENCODER
from shared.errors import BundleError, UsageError
from shared.manifest import DeviceManifest, Kind, file_entry, read_manifest, write_manifest
from tests.device_app.bundles import IMAGE, make_bundle
from tests.device_app.honest_cloud import IMAGES, KEY, LOOKING, SOURCES, image
from tests.thorough import examples


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the device half of an export, to be damaged."""
    return Path(shutil.copytree(tiny / "device", tmp_path / "device"))


def refused(folder: Path, *, names: str, hint: str) -> str:
    """The error of opening a damaged bundle, which names the file and what to do."""
    with pytest.raises(BundleError) as raised:
        Bundle.open(folder)
    assert names in str(raised.value)
    assert re.search(hint, raised.value.hint or ""), raised.value.hint
    return str(raised.value)


def sealed(folder: Path, **fields: object) -> None:
    """Writes the manifest anew, with honest digests of what is there."""
    manifest = read_manifest(folder, DeviceManifest)
    files = {name: file_entry(folder / name) for name in manifest.files}
    write_manifest(msgspec.structs.replace(manifest, files=files, **fields), folder)


def test_a_whole_bundle_embeds_hides_and_reveals(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.embed([1, 2, 319]).shape == (3, bundle.manifest.hidden_size)
    assert bundle.embed([1, 2, 319]).dtype == np.float32
    assert bundle.key.key_id == bundle.manifest.key_id
    assert bundle.tokenizer.encode("the cat")
    assert bundle.template is not None


def test_the_manifest_lists_every_file(folder: Path) -> None:
    listed = set(read_manifest(folder, DeviceManifest).files)
    assert {path.name for path in folder.iterdir()} == listed | {"manifest.json"}


@pytest.mark.parametrize(
    ("damage", "seen", "hint"),
    [
        (lambda path: path.unlink(), "missing", "copy the whole folder"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, wanted", "truncated"),
        (lambda path: path.write_bytes(b""), "seen 0 bytes, wanted", "truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "bytes, wanted", ""),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xfe"), "SHA-256", "damaged"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "SHA-256", "damaged"),
    ],
    ids=["missing", "truncated", "empty", "longer", "edited at its end", "zeros"],
)
def test_a_damaged_file_is_named(folder: Path, damage: Callable[[Path], object], seen: str, hint: str) -> None:
    for name in read_manifest(folder, DeviceManifest).files:
        path = folder / name
        whole = path.read_bytes()
        damage(path)
        assert seen in refused(folder, names=str(path), hint=hint)
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(whole)
    Bundle.open(folder)


def test_two_files_that_changed_places_are_noticed(folder: Path) -> None:
    one, other = folder / "chat_template.jinja", folder / "embedding.onnx"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    refused(folder, names=str(folder), hint="copy it again")


def test_a_manifest_that_was_edited_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    original = path.read_text()
    for field, value in json.loads(original).items():
        if field in ("format", "digest"):
            continue
        edited = json.loads(original)
        other = {str: "x", int: 7, bool: True, list: [7], dict: {"x": "y"}, type(None): "seeded"}[type(value)]
        edited[field] = other if field not in ("dtype", "tokenizer", "protocol") else value
        if edited[field] == value:
            edited[field] = {"dtype": "float16", "tokenizer": "json", "protocol": "stip.v2"}[field]
        if edited[field] == value:
            edited[field] = "onnx"
        path.write_text(json.dumps(edited))
        refused(folder, names=str(path), hint="export again")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", '{"format": "stip-device-2"}', "\ufeff{}"])
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    refused(folder, names="manifest.json", hint="export again")


@settings(max_examples=examples(300), deadline=None)
@given(st.data())
def test_a_manifest_with_a_changed_byte_is_refused_or_the_same(tiny: Path, tmp_path_factory, data) -> None:  # type: ignore[no-untyped-def]
    original = (tiny / "device" / "manifest.json").read_bytes()
    at, value = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("edited")
    (folder / "manifest.json").write_bytes(original[:at] + bytes([value]) + original[at + 1 :])
    try:
        seen = read_manifest(folder, DeviceManifest)
    except BundleError:
        return
    assert seen == read_manifest(tiny / "device", DeviceManifest)  # white space


def test_no_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", names="nowhere", hint="OUT/device")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", names="file", hint="OUT/device")


def test_the_cloud_half_given_by_mistake_is_recognised(tiny: Path) -> None:
    refused(tiny / "cloud", names=str(tiny / "cloud" / "manifest.json"), hint="this is the other half.*OUT/device")


def test_the_folder_above_given_by_mistake_is_refused(tiny: Path) -> None:
    refused(tiny, names=str(tiny / "manifest.json"), hint="OUT/device")


# --- the key ---


def put_in_key(folder: Path, other: Path) -> None:
    (folder / "key.safetensors").unlink()
    shutil.copy(other / "device" / "key.safetensors", folder / "key.safetensors")


def test_the_key_of_another_export_is_refused(folder: Path, tiny_exports: Callable[[str], Path]) -> None:
    put_in_key(folder, tiny_exports("llama-tied"))  # of the same widths
    refused(folder, names="key.safetensors", hint="copy it again")


def test_the_key_of_another_export_is_refused_though_the_manifest_was_sealed_again(
    folder: Path, tiny_exports: Callable[[str], Path]
) -> None:
    put_in_key(folder, tiny_exports("llama-tied"))
    sealed(folder)
    refused(folder, names="key.safetensors", hint="the key is another export's")


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_a_key_of_other_widths_is_refused(folder: Path, field: str) -> None:
    sealed(folder, **{field: 7})
    refused(folder, names="key.safetensors", hint="another export's")


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(100), b"\xff" * 100])
def test_a_key_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / "key.safetensors").write_bytes(content)
    sealed(folder)
    refused(folder, names="key.safetensors", hint=".")


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o666, 0o777])
def test_a_key_that_others_can_read_is_refused(folder: Path, mode: int) -> None:
    (folder / "key.safetensors").chmod(mode)
    error = refused(folder, names="key.safetensors", hint="chmod 600")
    assert f"{mode:04o}" in error


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_an_export_lets_nobody_else_read_the_device_half(tiny: Path) -> None:
    assert (tiny / "device").stat().st_mode & 0o077 == 0
    assert (tiny / "device" / "key.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("scheme", ["permutation", "rotation"])
def test_a_bundle_with_the_classifier_classifies(tiny_exports: Callable[..., Path], scheme: str) -> None:
    bundle = Bundle.open(tiny_exports("llama-tied", scheme, "device") / "device")
    assert bundle.key.vocab is None and bundle.classify is not None
    logits = bundle.classify(np.ones((2, bundle.manifest.hidden_size), np.float32))
    assert (logits.shape, logits.dtype) == ((2, bundle.manifest.vocab_size), np.float32)


def test_a_bundle_without_the_classifier_has_none(tiny: Path) -> None:
    assert Bundle.open(tiny / "device").classify is None


def test_a_rows_logits_do_not_depend_on_the_rows_beside_it(tiny_exports: Callable[..., Path]) -> None:
    classify = Bundle.open(tiny_exports("llama-tied", "rotation", "device") / "device").classify
    assert classify is not None
    hidden = np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)
    assert np.array_equal(classify(hidden), np.concatenate([classify(row[None]) for row in hidden]))


def test_a_key_that_reveals_logits_is_refused_where_the_classifier_is_on_the_device(folder: Path) -> None:
    sealed(folder, head="device")
    error = refused(folder, names="key.safetensors", hint="the key is another export's")
    assert "seen a key with an order of the vocabulary, but the classifier is on the device" in error


def test_a_key_that_reveals_no_logits_is_refused_where_the_classifier_is_in_the_cloud(
    tiny_exports: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_exports("llama-tied", head="device") / "device", tmp_path / "device")
    sealed(folder, head="cloud")
    error = refused(folder, names="key.safetensors", hint="the key is another export's")
    assert "seen a key with no order of the vocabulary, but the classifier is in the cloud" in error


# --- the models inside ---


@pytest.mark.parametrize("content", [None, b"not a model"], ids=["missing", "not a model"])
def test_a_classifier_that_cannot_be_loaded_is_named(
    tiny_exports: Callable[..., Path], tmp_path: Path, content: bytes | None
) -> None:
    folder = shutil.copytree(tiny_exports("llama-tied", head="device") / "device", tmp_path / "device")
    if content is None:
        (folder / "classifier.onnx").unlink()
        manifest = read_manifest(folder, DeviceManifest)
        files = {name: entry for name, entry in manifest.files.items() if name != "classifier.onnx"}
        write_manifest(msgspec.structs.replace(manifest, files=files), folder)
    else:
        (folder / "classifier.onnx").write_bytes(content)
        sealed(folder)
    refused(folder, names="classifier.onnx", hint="export")


@pytest.mark.parametrize("name", ["embedding.onnx", "tokenizer.onnx", "detokenizer.onnx"])
def test_a_model_that_cannot_be_loaded_is_named_though_its_digest_fits(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        pytest.skip("this export took the other tokenizer")
    (folder / name).write_bytes(b"not a model")
    sealed(folder)
    refused(folder, names=name, hint="export")


def test_a_fallback_that_cannot_be_read_is_named_by_the_first_text_that_needs_it(folder: Path) -> None:
    assert read_manifest(folder, DeviceManifest).tokenizer == "onnx"
    (folder / "tokenizer.json").write_bytes(b"not a tokenizer")
    sealed(folder)
    tokenizer = Bundle.open(folder).tokenizer
    assert tokenizer.encode("the cat")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        tokenizer.encode("the\0cat")


def test_a_damaged_table_is_named_even_where_something_else_fails_for_it(folder: Path) -> None:
    (folder / "embedding.onnx").write_bytes(b"not a model")
    sealed(folder)
    table = folder / "embedding.onnx.data"
    table.write_bytes(bytes(table.stat().st_size))
    assert "SHA-256" in refused(folder, names=str(table), hint="damaged")


def test_a_template_that_is_none_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% if %}")
    sealed(folder)
    with pytest.raises(BundleError, match="chat template"):
        Bundle.open(folder)


def test_a_bundle_without_a_template_opens(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    manifest = read_manifest(folder, DeviceManifest)
    files = {name: entry for name, entry in manifest.files.items() if name != "chat_template.jinja"}
    write_manifest(msgspec.structs.replace(manifest, files=files), folder)
    assert Bundle.open(folder).template is None


# --- bundles of every kind ---


def test_a_bundle_of_every_kind_opens_with_what_its_model_needs(tmp_path: Path) -> None:
    for kind in get_args(Kind):
        bundle = Bundle.open(make_bundle(tmp_path / kind, kind))
        manifest = bundle.manifest
        assert (bundle.patches is not None) == (kind in ("image-encoder", "vision-decoder"))
        assert (bundle.template is not None) == (kind in ("decoder", "vision-decoder"))
        wanted = {"vision-decoder": IMAGES, "encoder-decoder": SOURCES}.get(kind, NO_ENCODER)
        assert bundle.widths == wanted
        if kind != "image-encoder":
            assert bundle.embed([5, 6]).shape == (2, manifest.hidden_size) and bundle.tokenizer.encode("the cat")


def test_positions_are_counted_from_the_first_id_on_where_the_graph_takes_any(tmp_path: Path) -> None:
    placed = Bundle.open(make_bundle(tmp_path / "encoder", "encoder")).embed
    assert np.array_equal(placed([5, 6, 7])[1:], placed([6, 7], 1))
    assert not np.array_equal(placed([6, 7]), placed([6, 7], 1))
    plain = Bundle.open(make_bundle(tmp_path / "decoder", "decoder")).embed
    assert np.array_equal(plain([6, 7]), plain([6, 7], 1))


def test_an_image_becomes_patches(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "device", "vision-decoder"))
    assert np.array_equal(bundle.look(Image.new("RGB", (30, 20), (7, 1, 2))), image(7))
    with pytest.raises(UsageError, match="image: seen one, wanted none"):
        Bundle.open(make_bundle(tmp_path / "decoder", "decoder")).look("photo.png")


def test_a_model_of_images_alone_takes_no_text(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "device", "image-encoder"))
    for use in (lambda: bundle.tokenizer.encode("x"), lambda: bundle.embed([1]), bundle.tokenizer.detokenizer):
        with pytest.raises(UsageError, match="text: seen some, wanted none"):
            use()


@pytest.mark.parametrize(
    ("kind", "fields", "error"),
    [
        ("vision-decoder", {"key": KEY}, "wanted .*, 12"),  # a key without the encoder's secret
        ("vision-decoder", {"encoder_size": 11}, "wanted .*, 11"),
        ("decoder", {"key": LOOKING}, "seen the key .*, 12"),
        ("encoder", {"labels": ["one"]}, "wanted .*, 1, 0"),
        ("encoder", {"labels": []}, "seen logits of no class"),
        ("encoder", {"outputs": ["hidden"]}, "wanted .*, 0, 0"),
        ("image-encoder", {"hidden_size": 9}, "wanted .*, 9, 4"),
        ("vision-decoder", {"image": msgspec.structs.replace(IMAGE, height=5)}, "seen inputs .*, wanted pixels"),
        ("vision-decoder", {"image": msgspec.structs.replace(IMAGE, resize=0)}, "lengths above 0"),
        ("vision-decoder", {"image": msgspec.structs.replace(IMAGE, resample=6)}, "by the filter 6"),
    ],
)
def test_a_bundle_whose_parts_do_not_fit_is_refused(tmp_path: Path, kind: Kind, fields: Any, error: str) -> None:
    with pytest.raises(BundleError, match=error) as raised:
        Bundle.open(make_bundle(tmp_path / "device", kind, **fields))
    assert raised.value.hint
