"""Assistants whose model sees images, reads a source text, or has its positions on the device, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from device_app.assistant import Assistant
from device_app.sampler import Sampling
from shared.errors import BundleError, RefusedError, UsageError
from tests.checkpoints import LOOKING_TEMPLATE, PLACEHOLDER
from tests.device_app.bundles import END_ID, PLACEHOLDER_ID, make_bundle
from tests.device_app.honest_cloud import (
    IMAGE_TOKENS,
    IMAGES,
    LONGEST_SOURCE,
    PATCHES,
    SOURCES,
    VOCAB,
    HonestCloud,
    of_widths,
    plain_logits,
)
from tests.device_app.honest_encoder import serving

NOWHERE = "ws://127.0.0.1:1"


def red(number: int) -> Image.Image:
    """What becomes image `number` of the honest cloud."""
    return Image.new("RGB", (20, 10), (number, 50, 60))


def looking_cloud() -> HonestCloud:
    return HonestCloud(max_frame=1 << 20, **of_widths(IMAGES) | {"context": 200})


def reading_cloud() -> HonestCloud:
    return HonestCloud(max_frame=1 << 20, **of_widths(SOURCES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "device", "vision-decoder", context=200)


@pytest.fixture(scope="module")
def reading_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "device", "encoder-decoder")


@pytest.fixture
def looking(folder: Path) -> Iterator[tuple[Assistant, list[Any]]]:
    with serving(looking_cloud) as (url, clouds), Assistant.open(folder, url) as assistant:
        yield assistant, clouds


@pytest.fixture
def reading(reading_folder: Path) -> Iterator[tuple[Assistant, list[Any]]]:
    with serving(reading_cloud) as (url, clouds), Assistant.open(reading_folder, url) as assistant:
        yield assistant, clouds


def greedy(ids: list[int], source: list[int] | None, tokens: int, banned: tuple[int, ...] = ()) -> list[int]:
    """What the honest cloud's model says after `ids`, with full rows."""
    said: list[int] = []
    while len(said) < tokens and (not said or said[-1] != END_ID):
        logits = plain_logits([*ids, *said], source)
        logits[list(banned)] = -np.inf
        said.append(int(logits.argmax()))
    return said


def question(text: str, *numbers: int) -> dict[str, Any]:
    parts = [{"type": "image", "image": red(number)} for number in numbers]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def cached(assistant: Assistant, text: str, numbers: list[int]) -> list[int]:
    """The cloud's cache after a prompt's text, in which placeholders stand for these images."""
    images = iter(numbers)
    ids: list[int] = []
    for token in assistant.bundle.tokenizer.encode(text):
        ids += [-1 - next(images)] * IMAGE_TOKENS if token == PLACEHOLDER_ID else [token]
    return ids


# --- images ---


@pytest.mark.parametrize("as_", ["image", "path", "text path", "bytes"])
def test_an_image_is_seen_where_the_message_has_it(
    looking: tuple[Assistant, list[Any]], as_: str, tmp_path: Path
) -> None:
    assistant, clouds = looking
    path = tmp_path / "photo.png"
    red(7).save(path)
    source = {"image": red(7), "path": path, "text path": str(path), "bytes": path.read_bytes()}[as_]
    parts = [{"type": "text", "text": "the "}, {"type": "image", "image": source}, {"type": "text", "text": " cat"}]
    answer = assistant.chat([{"role": "user", "content": parts}], max_tokens=6).finish()
    text = f"<|start|>user\nthe {PLACEHOLDER} cat<|end|>\n<|start|>assistant\n"
    ids = cached(assistant, text, [7])
    assert answer.ids == greedy(ids, None, 6)
    assert clouds[0].cache[: len(ids)] == ids
    assert answer.stats.prompt_tokens == len(ids)
    counters = answer.stats.counters
    in_vain = counters.drafted - counters.accepted
    assert counters.vectors_up == len(ids) - IMAGE_TOKENS + PATCHES + len(answer.ids) - 1 + in_vain


def test_images_of_all_messages_keep_their_order(looking: tuple[Assistant, list[Any]]) -> None:
    assistant, _ = looking
    messages = [question("one", 3, 4), {"role": "assistant", "content": "two"}, question("three", 5, 3)]
    answer = assistant.chat(messages, max_tokens=4).finish()
    p = PLACEHOLDER
    text = (
        f"<|start|>user\n{p}{p}one<|end|>\n<|start|>assistant\ntwo<|end|>\n"
        f"<|start|>user\n{p}{p}three<|end|>\n<|start|>assistant\n"
    )
    assert answer.ids == greedy(cached(assistant, text, [3, 4, 5, 3]), None, 4)


def test_an_image_that_the_cloud_has_is_not_sent_again(looking: tuple[Assistant, list[Any]]) -> None:
    assistant, clouds = looking
    first = assistant.chat([question("the cat", 9)], max_tokens=3).finish()
    messages = [question("the cat", 9), {"role": "assistant", "content": "x"}, question("and?")]
    assistant.chat(messages, max_tokens=3).finish()
    assert [append.kind for append in clouds[0].appends].count("image") == 1
    assert first.stats.counters.bytes_up > PATCHES * 12 * 4


def test_text_alone_is_answered_too_and_given_to_the_template_in_parts(looking: tuple[Assistant, list[Any]]) -> None:
    assistant, _ = looking
    for content in ("the cat", [{"type": "text", "text": "the cat"}]):
        answer = assistant.chat([{"role": "user", "content": content}], max_tokens=4).finish()
        text = "<|start|>user\nthe cat<|end|>\n<|start|>assistant\n"
        assert answer.ids == greedy(assistant.bundle.tokenizer.encode(text), None, 4)


def test_turns_that_no_longer_fit_go_with_their_images(looking: tuple[Assistant, list[Any]]) -> None:
    assistant, clouds = looking
    messages = [question("the cat sat on the mat", number) for number in range(15)]
    answer = assistant.chat(messages, max_tokens=4).finish()
    dropped = answer.stats.dropped_turns
    assert 1 <= dropped < 14
    assert answer.ids == assistant.chat(messages[dropped:], max_tokens=4).finish().ids
    assert -1 not in clouds[0].cache and -1 - 14 in clouds[0].cache


def test_images_do_not_disturb_a_repetition_penalty(looking: tuple[Assistant, list[Any]]) -> None:
    assistant, _ = looking
    text = f"<|start|>user\n{PLACEHOLDER}the cat<|end|>\n<|start|>assistant\n"
    ids = cached(assistant, text, [7])
    answer = assistant.chat([question("the cat", 7)], sampling=Sampling(repetition_penalty=1.7), max_tokens=4).finish()
    for at, token in enumerate(answer.ids):
        logits = plain_logits([*ids, *answer.ids[:at]])
        known = [one for one in {*ids, *answer.ids[:at]} if one >= 0]
        logits[known] = np.where(logits[known] > 0, logits[known] / 1.7, logits[known] * 1.7)
        assert token == logits.argmax()


def test_describe_gives_one_line(looking: tuple[Assistant, list[Any]]) -> None:
    assistant, _ = looking
    text = assistant.describe(red(7), "the cat?", max_tokens=40)
    answer = assistant.chat([question("the cat?", 7)], max_tokens=40).finish()
    assert text == " ".join(answer.text.split()) and text.isprintable()
    assert assistant.describe(red(8), max_tokens=5) != assistant.describe(red(9), max_tokens=5)


def test_an_answer_goes_on_after_a_lost_connection_and_the_image_with_it(folder: Path) -> None:
    with serving(looking_cloud, answers=6) as (url, clouds), Assistant.open(folder, url) as assistant:
        answer = assistant.chat([question("the cat", 7)], max_tokens=8).finish()
        assert len(clouds) == 2
    text = f"<|start|>user\n{PLACEHOLDER}the cat<|end|>\n<|start|>assistant\n"
    assert answer.ids == greedy(cached(assistant, text, [7]), None, 8)
    assert answer.stats.counters.replays == 1


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([{"type": "image", "image": "missing.png"}], r"image missing\.png: No such file"),
        ([{"type": "image", "image": b"no image"}], "image: it is no image"),
        (None, "seen content of the type NoneType"),
        (["text"], "seen content of the type list, wanted text or a list of parts"),
        ([{"type": "image"}], r"seen a part of the type 'image' with \['type'\]"),
        ([{"type": "text"}], "seen a part of the type 'text'"),
        ([{"type": "audio", "audio": b""}], "seen a part of the type 'audio'"),
        ([{"type": "text", "text": f"a {PLACEHOLDER} of mine"}], "seen 1 places for images, wanted 0"),
        (f"a {PLACEHOLDER} of mine", "seen 1 places for images, wanted 0"),
    ],
)
def test_a_message_that_cannot_be_shown_is_refused_before_anything_is_sent(
    folder: Path, content: Any, error: str
) -> None:
    assistant = Assistant.open(folder, NOWHERE)
    with pytest.raises(UsageError, match=error) as raised:
        assistant.chat([{"role": "user", "content": content}]).finish()
    assert "of mine" not in str(raised.value)


def test_a_placeholder_beside_an_image_is_refused(folder: Path) -> None:
    assistant = Assistant.open(folder, NOWHERE)
    with pytest.raises(UsageError, match="seen 2 places for images, wanted 1") as raised:
        assistant.chat([question(f"what is {PLACEHOLDER}?", 3)]).finish()
    assert raised.value.hint
    with pytest.raises(UsageError, match="seen 1 places for images, wanted 0"):
        assistant.complete(f"the {PLACEHOLDER}")


def test_a_template_that_forgets_an_image_is_noticed(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "device", "vision-decoder", template=LOOKING_TEMPLATE.replace(PLACEHOLDER, ""))
    with pytest.raises(UsageError, match="seen 0 places for images, wanted 1"):
        Assistant.open(folder, NOWHERE).chat([question("the cat", 3)]).finish()


# --- translations ---


def test_a_translation_is_what_the_decoder_says_greedily_of_the_source(reading: tuple[Assistant, list[Any]]) -> None:
    assistant, clouds = reading
    for text in ("the", "the cat", "the"):
        answer = assistant.translate(text, max_tokens=6)
        assert "".join(answer) == answer.text
        source = [*assistant.bundle.tokenizer.encode(text), END_ID]
        assert answer.ids == greedy([PLACEHOLDER_ID], source, 6, banned=(PLACEHOLDER_ID,))
        assert answer.stats.prompt_tokens == len(source)
        assert clouds[0].source == source
    assert len(clouds[0].stores) == 3


def test_banned_ids_are_never_chosen(reading_folder: Path, tmp_path: Path) -> None:
    with serving(reading_cloud) as (url, _):
        for bans in (5, 400):
            with Assistant.open(reading_folder, url) as free:
                source = [*free.bundle.tokenizer.encode("the"), END_ID]
            logits = plain_logits([PLACEHOLDER_ID], source)
            banned = np.argsort(-logits)[:bans].tolist()  # all of the top rows, where they are 400
            folder = make_bundle(tmp_path / str(bans), "encoder-decoder", banned_ids=banned)
            with Assistant.open(folder, url) as assistant:
                answer = assistant.translate("the", max_tokens=5).finish()
            assert answer.ids == greedy([PLACEHOLDER_ID], source, 5, tuple(banned))
            assert answer.stats.counters.full_rows >= (bans == 400)


def test_bans_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "device", "encoder-decoder", banned_ids=list(range(VOCAB)))
    with (
        serving(reading_cloud) as (url, _),
        Assistant.open(folder, url) as assistant,
        pytest.raises(BundleError, match="banned_ids: they leave no token"),
    ):
        assistant.translate("the").finish()


@pytest.mark.parametrize("answers", range(5))
def test_a_translation_goes_on_after_a_lost_connection(reading_folder: Path, answers: int) -> None:
    with serving(reading_cloud, answers=answers) as (url, clouds), Assistant.open(reading_folder, url) as assistant:
        answer = assistant.translate("the cat", max_tokens=6).finish()
        assert len(clouds) == 2
    source = [*assistant.bundle.tokenizer.encode("the cat"), END_ID]
    assert answer.ids == greedy([PLACEHOLDER_ID], source, 6, banned=(PLACEHOLDER_ID,))


def test_a_source_that_is_too_long_is_refused_and_the_next_is_translated(reading: tuple[Assistant, list[Any]]) -> None:
    assistant, _ = reading
    with pytest.raises(RefusedError, match=f"source: it takes .* wanted at most {LONGEST_SOURCE}") as raised:
        assistant.translate("secret " * 9).finish()
    assert raised.value.code == "context_full" and "secret" not in str(raised.value)
    assert assistant.translate("the", max_tokens=3).finish().ids


def test_a_decoder_without_a_beginning_is_a_damaged_bundle(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "device", "encoder-decoder", start_ids=[])
    with pytest.raises(BundleError, match="start_ids: seen none"):
        Assistant.open(folder, NOWHERE).translate("the")


def test_nothing_cannot_be_translated(reading_folder: Path) -> None:
    with pytest.raises(UsageError, match="text: seen nothing"):
        Assistant.open(reading_folder, NOWHERE).translate("")


# --- positions on the device ---


@pytest.mark.parametrize("said", [65, 512, 10**9])
def test_an_answer_ends_with_the_table_of_positions_whatever_context_the_cloud_says(tmp_path: Path, said: int) -> None:
    folder = make_bundle(tmp_path / "device", "decoder", step=0.0)  # of 64 positions
    lying = HonestCloud(max_frame=1 << 20, context=said)
    with serving(lambda: lying) as (url, _), Assistant.open(folder, url) as assistant:
        answer = assistant.complete("the cat", max_tokens=500).finish()
        prompt = assistant.bundle.tokenizer.encode("the cat")
        assert answer.finish_reason == "length"
        assert answer.ids == greedy(prompt, None, 65 - len(prompt))  # the last token needs no position
        with pytest.raises(RefusedError, match="wanted at most 64") as raised:
            assistant.complete("the cat " * 60).finish()
        assert raised.value.code == "context_full"


# --- what a kind does not do ---


def test_every_kind_says_what_it_is_not_made_for(folder: Path, reading_folder: Path, tmp_path: Path) -> None:
    looking, reading = Assistant.open(folder, NOWHERE), Assistant.open(reading_folder, NOWHERE)
    plain = Assistant.open(make_bundle(tmp_path / "plain", "decoder"), NOWHERE)
    for assistant, call, kinds in (
        (looking, lambda one: one.translate("x"), "'vision-decoder', wanted encoder-decoder"),
        (plain, lambda one: one.translate("x"), "'decoder', wanted encoder-decoder"),
        (plain, lambda one: one.describe(red(1)), "'decoder', wanted vision-decoder"),
        (plain, lambda one: one.chat([question("x", 1)]).finish(), "'decoder' takes no images"),
        (reading, lambda one: one.chat([question("x")]), "'encoder-decoder', wanted decoder or vision-decoder"),
        (reading, lambda one: one.complete("x"), "'encoder-decoder', wanted decoder or vision-decoder"),
        (reading, lambda one: one.describe(red(1)), "'encoder-decoder', wanted vision-decoder"),
    ):
        with pytest.raises(UsageError, match=kinds):
            call(assistant)
    for kind in ("encoder", "image-encoder"):
        with pytest.raises(UsageError, match=f"assistant: seen a bundle of the kind '{kind}'"):
            Assistant.open(make_bundle(tmp_path / kind, kind), NOWHERE)  # type: ignore[arg-type]
