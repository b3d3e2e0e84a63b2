"""`stip-device embed`, `classify`, `describe` and `translate` as people and scripts meet them, over real sockets."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from device_app.assistant import Assistant
from device_app.encoder import Encoder
from shared.key import UserKey
from shared.levels import limit
from shared.wire import ErrorCode
from tests.checkpoints import PLACEHOLDER
from tests.device_app.bundles import CLASSES, LABELS, make_bundle
from tests.device_app.honest_cloud import IMAGES, SOURCES, HonestCloud, of_widths
from tests.device_app.honest_encoder import HonestEncoder, serving
from tests.device_app.test_cli import assert_failed, called, device

NOWHERE = "ws://127.0.0.1:1"
WORTH = f"stip-device: {limit('permutation')}"
LONG = "the secret cat sat on the mat " * 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    kinds = ("decoder", "encoder", "image-encoder", "vision-decoder", "encoder-decoder")
    return {kind: make_bundle(root / kind, kind) for kind in kinds}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoders() -> Iterator[str]:
    with serving(HonestEncoder) as (url, _):
        yield url


@pytest.fixture(scope="module")
def lookers() -> Iterator[str]:
    with serving(lambda: HonestCloud(max_frame=1 << 20, **of_widths(IMAGES))) as (url, _):
        yield url


@pytest.fixture(scope="module")
def readers() -> Iterator[str]:
    with serving(lambda: HonestCloud(max_frame=1 << 20, **of_widths(SOURCES))) as (url, _):
        yield url


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Two images and, between them, two files that are none."""
    paths = [tmp_path / name for name in ("seven.png", "text.jpg", "missing.png", "two\nlines.webp")]
    Image.new("RGB", (30, 20), (7, 0, 0)).save(paths[0])
    paths[1].write_text("no image")
    Image.new("RGB", (30, 20), (200, 0, 0)).save(paths[3], lossless=True)
    return paths


def with_stdin(content: bytes, *arguments: object) -> subprocess.CompletedProcess[str]:
    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(content))):
        return called(*arguments)


# --- embed ---


def test_each_text_becomes_a_line_of_json(folders: dict[str, Path], encoders: str) -> None:
    result = called("embed", folders["encoder"], "--url", encoders, "the cat", "the dog")
    assert (result.returncode, result.stderr.splitlines()) == (0, [WORTH])
    with Encoder.open(folders["encoder"], encoders) as encoder:
        expected = encoder.embed(["the cat", "the dog"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert np.array_equal(np.array(lines, np.float32), expected)
    assert max(len(part) for part in re.split(r"[\[\], \n]+", result.stdout)) < 16  # no more digits than float32 has


def test_texts_come_from_stdin_a_line_each(folders: dict[str, Path], encoders: str) -> None:
    lines = [f"the cat {number}"[:8] for number in range(50)]
    content = "\r\n".join(lines).encode() + b"\nca\xff\xfe\n\nend"
    result = with_stdin(content, "embed", folders["encoder"], "--url", encoders, "-")
    assert result.returncode == 0, result.stderr
    with Encoder.open(folders["encoder"], encoders) as encoder:
        expected = encoder.embed([*lines, "ca��", "", "end"])
    seen = np.array([json.loads(line) for line in result.stdout.splitlines()], np.float32)
    assert np.array_equal(seen, expected)


def test_a_process_reads_stdin_too(folders: dict[str, Path], encoders: str) -> None:
    command = [sys.executable, "-m", "device_app", "embed", str(folders["encoder"]), "--url", encoders, "-"]
    result = subprocess.run(command, input=b"the cat\nthe dog\n", capture_output=True, timeout=60)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2


def test_a_text_that_is_too_long_keeps_its_line_and_the_others_go_on(folders: dict[str, Path], encoders: str) -> None:
    result = called("embed", folders["encoder"], "--url", encoders, "the cat", LONG, "the dog")
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    assert lines[1] == "null" and len(lines) == 3 and json.loads(lines[2])
    errors = result.stderr.splitlines()
    assert errors[0].startswith("stip-device: error: input 2: text: it takes") and errors[1].startswith("hint: ")
    assert errors[2:] == [WORTH] and "secret" not in result.stderr


def test_truncate_cuts_and_says_how_much(folders: dict[str, Path], encoders: str) -> None:
    result = called("embed", folders["encoder"], "--url", encoders, "--truncate", "the cat", LONG)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2
    assert "stip-device: 1 of 2 texts were too long: " in result.stderr and "tokens were dropped" in result.stderr


def test_json_is_one_object_with_the_figures(folders: dict[str, Path], encoders: str) -> None:
    result = called("embed", folders["encoder"], "--url", encoders, "--json", "the cat", LONG, "the dog")
    assert result.returncode == 1 and result.stdout.count("\n") == 1
    fields = json.loads(result.stdout)
    assert fields.keys() == {"results", "bytes_up", "bytes_down", "round_trips"}
    assert [set(one) for one in fields["results"]] == [{"embedding"}, {"error"}, {"embedding"}]
    assert fields["bytes_up"] > 0 and fields["bytes_down"] > 0 and fields["round_trips"] == 2


# --- classify ---


def test_a_text_is_classified(folders: dict[str, Path], encoders: str) -> None:
    result = called("classify", folders["encoder"], "--url", encoders, "--top", 3, "the cat", "the dog")
    assert result.returncode == 0, result.stderr
    with Encoder.open(folders["encoder"], encoders) as encoder:
        expected = encoder.classify(["the cat", "the dog"])
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert len(lines) == 6
    for (label, probability), one in zip(lines, [*expected[0][:3], *expected[1][:3]], strict=True):
        assert label == ("a[31m bird" if "bird" in one.label else one.label)
        assert float(probability) == pytest.approx(one.probability, abs=1e-6)
    assert result.stdout.replace("\t", "").replace("\n", "").isprintable()


def test_images_are_classified_and_one_that_is_none_does_not_stop_them(
    folders: dict[str, Path], encoders: str, photos: list[Path]
) -> None:
    result = called("classify", folders["image-encoder"], "--url", encoders, *photos)
    assert result.returncode == 1
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(photos[0]), str(photos[3]).replace("\n", "?")]
    assert all(0.25 <= float(line[2]) <= 1 for line in lines)
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert errors[0].startswith(f"stip-device: error: image {photos[1]}: it is no image") and len(errors) == 2
    assert errors[1] == f"stip-device: error: image {photos[2]}: No such file or directory"


def test_one_image_is_classified_without_its_name(folders: dict[str, Path], encoders: str, photos: list[Path]) -> None:
    result = called("classify", folders["image-encoder"], "--url", encoders, photos[0])
    [(label, probability)] = [line.split("\t") for line in result.stdout.splitlines()]
    assert label in [*LABELS, "a[31m bird"] and 0.25 <= float(probability) <= 1


def test_json_of_classes(folders: dict[str, Path], encoders: str, photos: list[Path]) -> None:
    result = called("classify", folders["image-encoder"], "--url", encoders, "--json", "--top", 9, *photos[:2])
    fields = json.loads(result.stdout)
    good, bad = fields["results"]
    assert good["file"] == str(photos[0]) and sum(one["probability"] for one in good["labels"]) == pytest.approx(1)
    assert {one["label"] for one in good["labels"]} == set(LABELS)
    assert bad["file"] == str(photos[1]) and "no image" in bad["error"]


# --- describe ---


def test_each_image_is_described_in_a_line(folders: dict[str, Path], lookers: str, photos: list[Path]) -> None:
    options = ("-p", "the cat?", "--max-tokens", 20)
    result = called("describe", folders["vision-decoder"], "--url", lookers, *photos, *options)
    assert result.returncode == 1
    with Assistant.open(folders["vision-decoder"], lookers) as assistant:
        texts = [assistant.describe(path, "the cat?", max_tokens=20) for path in (photos[0], photos[3])]
    names = [str(photos[0]), str(photos[3]).replace("\n", "?")]
    assert result.stdout == "".join(f"{name}\t{text}\n" for name, text in zip(names, texts, strict=True))
    assert result.stderr.count("stip-device: error: ") == 2 and "the cat" not in result.stderr


def test_json_of_descriptions(folders: dict[str, Path], lookers: str, photos: list[Path]) -> None:
    options = ("--json", "--max-tokens", 5)
    result = called("describe", folders["vision-decoder"], "--url", lookers, photos[0], photos[0], *options)
    fields = json.loads(result.stdout)
    assert result.returncode == 0 and len(fields["results"]) == 2
    assert fields["results"][0] == fields["results"][1] and fields["results"][0].keys() == {"file", "text"}
    assert fields["round_trips"] >= 2 and fields["bytes_up"] > 0


# --- translate ---


def test_each_text_is_translated_in_a_line_and_an_empty_one_stays_empty(folders: dict[str, Path], readers: str) -> None:
    content = b"the cat\n\n  \nthe dog\n"
    arguments = ("translate", folders["encoder-decoder"], "--url", readers, "--max-tokens", 8)
    result = with_stdin(content, *arguments, "the", "-")
    assert (result.returncode, result.stderr.splitlines()) == (0, [WORTH])
    with Assistant.open(folders["encoder-decoder"], readers) as assistant:
        texts = [assistant.translate(text, max_tokens=8).finish().text for text in ("the", "the cat", "the dog")]
    expected = [" ".join(text.split()) for text in texts]
    assert result.stdout.splitlines() == [expected[0], expected[1], "", "", expected[2]]


def test_a_text_that_is_too_long_to_translate_does_not_stop_the_others(folders: dict[str, Path], readers: str) -> None:
    arguments = ("translate", folders["encoder-decoder"], "--url", readers, "--max-tokens", 4)
    result = called(*arguments, "the", LONG, "the")
    lines = result.stdout.splitlines()
    assert result.returncode == 1 and len(lines) == 3
    assert lines[1] == "" and lines[0] == lines[2]
    assert "input 2: source: it takes" in result.stderr and "secret" not in result.stderr
    fields = json.loads(called(*arguments, "--json", "the", LONG).stdout)
    assert [set(one) for one in fields["results"]] == [{"text", "finish_reason", "tokens"}, {"error"}]


# --- chat with images ---


def test_an_image_is_asked_about(folders: dict[str, Path], lookers: str, photos: list[Path]) -> None:
    images = ("--image", photos[0], "--image", photos[3])
    options = ("-p", "the cat?", "--max-tokens", 6, "--json")
    result = called("chat", folders["vision-decoder"], "--url", lookers, *images, *options)
    assert result.returncode == 0, result.stderr
    parts = [{"type": "image", "image": path} for path in (photos[0], photos[3])]
    content = [*parts, {"type": "text", "text": "the cat?"}]
    with Assistant.open(folders["vision-decoder"], lookers) as assistant:
        expected = assistant.chat([{"role": "user", "content": content}], max_tokens=6).finish()
    assert json.loads(result.stdout)["ids"] == expected.ids


def test_in_a_talk_images_go_with_the_first_question_that_is_answered(
    folders: dict[str, Path], lookers: str, photos: list[Path]
) -> None:
    arguments = ("chat", folders["vision-decoder"], "--url", lookers, "--image", photos[0], "--max-tokens", 4)
    said = io.StringIO(f"what is {PLACEHOLDER}?\nthe cat?\nand?\n")
    with mock.patch.object(sys, "stdin", said):
        result = called(*arguments)
    with Assistant.open(folders["vision-decoder"], lookers) as assistant:
        content = [{"type": "image", "image": photos[0]}, {"type": "text", "text": "the cat?"}]
        messages = [{"role": "user", "content": content}]
        first = assistant.chat(messages, max_tokens=4).finish()
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and?"}]
        second = assistant.chat(messages, max_tokens=4).finish()
    assert "seen 2 places for images, wanted 1" in result.stderr
    assert result.stdout == f"{first.text}\n{second.text}\n"


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("command", "kind", "wanted"),
    [
        (("embed", "x"), "decoder", "embed: seen a bundle of the kind 'decoder', wanted encoder"),
        (("embed", "x"), "image-encoder", "wanted encoder"),
        (("classify", "x"), "vision-decoder", "wanted encoder or image-encoder"),
        (("describe", "x"), "decoder", "describe: seen a bundle of the kind 'decoder', wanted vision-decoder"),
        (("translate", "x"), "decoder", "wanted encoder-decoder"),
        (("chat", "-p", "x"), "encoder", "seen a bundle of the kind 'encoder', wanted decoder"),
        (("chat", "-p", "x"), "encoder-decoder", "chat: seen a bundle of the kind 'encoder-decoder'"),
        (("chat", "-p", "x", "--image", "y.png"), "decoder", "--image: seen a bundle of the kind 'decoder'"),
        (("chat", "-p", "x", "--image", "y.png"), "vision-decoder", r"image y\.png: No such file"),
        (("classify", "x", "--top", "0"), "encoder", "--top: seen 0, wanted at least 1"),
        (("describe", "x", "--max-tokens", "0"), "vision-decoder", "--max-tokens: seen 0, wanted at least 1"),
        (("translate", "x", "--max-tokens", "-1"), "encoder-decoder", "--max-tokens: seen -1"),
        (("embed", "x", "--token-file", "/nowhere/token"), "encoder", "--token-file /nowhere/token"),
        (("embed", "x", "--url", "ws://10.0.0.1:1"), "encoder", "ws://10.0.0.1:1"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line_before_anything_is_sent(
    folders: dict[str, Path], command: tuple[str, ...], kind: str, wanted: str
) -> None:
    name, *rest = command
    result = called(name, folders[kind], "--url", NOWHERE, *rest)
    assert_failed(result, 2, wanted, None if "10.0.0.1" not in wanted else ".")


@pytest.mark.parametrize(
    ("command", "kind"),
    [("embed", "encoder"), ("classify", "encoder"), ("translate", "encoder-decoder")],
)
def test_a_cloud_that_is_not_there_is_named_once(folders: dict[str, Path], command: str, kind: str) -> None:
    assert_failed(called(command, folders[kind], "--url", NOWHERE, "a", "b"), 1, f"cloud {NOWHERE}: ", "stip-cloud")


@pytest.mark.parametrize("code", ["internal", "unsupported"])
def test_a_refusal_that_is_no_inputs_fault_ends_it_at_once(folders: dict[str, Path], code: ErrorCode) -> None:
    def failing() -> HonestEncoder:
        cloud = HonestEncoder()
        cloud.failures = [code] * 9
        return cloud

    with serving(failing) as (url, clouds):
        assert_failed(called("embed", folders["encoder"], "--url", url, "a", "b"), 1, f"{code}: because", None)
        assert len(clouds) == 1
        photo = folders["encoder"].parent / "photo.png"
        Image.new("RGB", (6, 4)).save(photo)
        result = called("classify", folders["image-encoder"], "--url", url, photo, photo)
        assert_failed(result, 1, f"{code}: because", None)


@pytest.mark.parametrize("command", ["embed", "classify", "describe", "translate"])
def test_a_command_without_inputs_exits_with_2(folders: dict[str, Path], command: str) -> None:
    result = called(command, folders["encoder"], "--url", NOWHERE)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"usage: stip-device {command}" in result.stderr


def test_what_the_model_was_not_made_for_is_said_once(tmp_path: Path) -> None:
    key = UserKey(CLASSES.key_id, CLASSES.residual, None)
    folder = make_bundle(tmp_path / "device", "encoder", key=key, pooling=None, outputs=["hidden", "pooled"])
    assert_failed(called("embed", folder, "--url", NOWHERE, "a", "b"), 2, "embed: seen a model that was not trained")
    assert_failed(called("classify", folder, "--url", NOWHERE, "a", "b"), 2, "logits: seen a model without", None)


def test_a_process_needs_pillow_only_where_there_are_images(folders: dict[str, Path], encoders: str) -> None:
    code = (
        "import sys; sys.modules['PIL'] = None; sys.argv = ['stip-device', *sys.argv[1:]]\n"
        "from device_app.cli import main; main()"
    )

    def without_pillow(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    result = without_pillow("embed", str(folders["encoder"]), "--url", encoders, "the cat")
    assert result.returncode == 0, result.stderr
    result = without_pillow("classify", str(folders["image-encoder"]), "--url", encoders, "photo.png")
    assert_failed(result, 1, "the package 'PIL", "pip install")


def test_help_names_every_command() -> None:
    shown = device("--help").stdout
    assert all(command in shown for command in ("chat", "embed", "classify", "describe", "translate"))
