"""The Python API of encoders, over real sockets: texts or images in, vectors or classes out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.encode import Want
from device_app.encoder import Encoder
from shared.errors import Cancelled, RefusedError, UnreachableError, UsageError
from shared.key import UserKey
from shared.wire import Array
from tests.device_app.bundles import CLASSES, CONTEXT, END_ID, LABELS, START_ID, make_bundle
from tests.device_app.honest_cloud import EMBEDDING, HIDDEN, PATCHES, image
from tests.device_app.honest_encoder import HonestEncoder, plain_result, serving
from tests.processes import eventually

TEXTS = ["the cat", "", "the dog sang in the rain", "世界"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "device", "encoder")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "device", "image-encoder")


@pytest.fixture
def url() -> Iterator[str]:
    with serving(HonestEncoder) as (address, _):
        yield address


@pytest.fixture
def encoder(folder: Path, url: str) -> Iterator[Encoder]:
    with Encoder.open(folder, url) as opened:
        yield opened


def expected(encoder: Encoder, text: str, want: Want) -> Array:
    """Of the text's ids with their begin and end, at positions from 0 on."""
    ids = [START_ID, *encoder.bundle.tokenizer.encode(text), END_ID]
    table = np.asarray(ids, np.float32)[:, None] + np.arange(HIDDEN, dtype=np.float32) / 16
    return plain_result(table + np.arange(len(ids), dtype=np.float32)[:, None] / 1024, want)


def test_hidden_states_are_those_of_each_text_with_its_begin_and_end(encoder: Encoder) -> None:
    hidden = encoder.hidden(TEXTS)
    assert len(hidden) == len(TEXTS)
    for states, text in zip(hidden, TEXTS, strict=True):
        np.testing.assert_array_equal(states, expected(encoder, text, "hidden"))


def test_pooled_vectors_are_the_models_own(encoder: Encoder) -> None:
    pooled = encoder.pooled(TEXTS)
    assert (pooled.shape, pooled.dtype) == ((len(TEXTS), HIDDEN), np.float32)
    np.testing.assert_array_equal(pooled, [expected(encoder, text, "pooled") for text in TEXTS])


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_pooled_as_the_manifest_says(tmp_path: Path, url: str, pooling: str, normalize: bool) -> None:
    folder = make_bundle(tmp_path / "device", "encoder", pooling=pooling, normalize=normalize)
    with Encoder.open(folder, url) as encoder:
        vectors = encoder.embed(TEXTS)
        assert (vectors.shape, vectors.dtype) == ((len(TEXTS), HIDDEN), np.float32)
        for vector, text in zip(vectors, TEXTS, strict=True):
            states = expected(encoder, text, "hidden").astype(np.float64)
            pooled = states.mean(0) if pooling == "mean" else states[0]
            np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled) if normalize else pooled, rtol=1e-5)


def test_a_text_has_the_same_vector_whatever_is_beside_it(encoder: Encoder) -> None:
    together = encoder.embed(TEXTS)
    assert np.array_equal(together, np.concatenate([encoder.embed([text]) for text in TEXTS]))


def test_classes_come_with_their_probabilities_the_most_probable_first(encoder: Encoder) -> None:
    for predictions, text in zip(encoder.classify(TEXTS), TEXTS, strict=True):
        logits = expected(encoder, text, "logits").astype(np.float64)
        softmax = np.exp(logits) / np.exp(logits).sum()
        assert sorted(one.label for one in predictions) == sorted(LABELS)
        for one in predictions:
            assert one.probability == pytest.approx(softmax[LABELS.index(one.label)])
        probabilities = [one.probability for one in predictions]
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)


def test_more_texts_than_go_up_at_once_keep_their_order(encoder: Encoder) -> None:
    texts = [f"the cat {number % 10}"[: 7 + number % 3] for number in range(3000)]
    vectors = encoder.embed(texts)
    assert encoder.counters.round_trips > 1
    for at in (0, 1, 2, 777, 2999):
        assert np.array_equal(vectors[at], encoder.embed([texts[at]])[0])


# --- lengths ---


def test_a_text_that_is_too_long_is_refused_and_says_by_how_much(encoder: Encoder) -> None:
    long = "the cat sat on the mat " * 9
    tokens = len(encoder.bundle.tokenizer.encode(long)) + 2
    with pytest.raises(UsageError, match=f"text 2: it takes {tokens} tokens, wanted at most {CONTEXT}") as raised:
        encoder.embed(["the", long])
    assert raised.value.hint and f"{tokens - CONTEXT} tokens would be dropped" in raised.value.hint
    assert "cat" not in str(raised.value)


def test_a_text_is_cut_where_that_is_wanted_and_its_end_stays(folder: Path, url: str) -> None:
    with Encoder.open(folder, url, truncate=True) as encoder:
        ids = encoder.bundle.tokenizer.encode("the cat sat on the mat " * 9)
        [states, short] = encoder.hidden(["the cat sat on the mat " * 9, "the"])
        assert encoder.dropped_tokens == [len(ids) + 2 - CONTEXT, 0]
        assert len(states) == CONTEXT and len(short) == 3
        kept = [START_ID, *ids[: CONTEXT - 2], END_ID]
        table = np.asarray(kept, np.float32)[:, None] + np.arange(HIDDEN, dtype=np.float32) / 16
        places = np.arange(CONTEXT, dtype=np.float32)[:, None] / 1024
        np.testing.assert_array_equal(states, plain_result(table + places, "hidden"))


@pytest.mark.parametrize("limit", [{"max_frame": 1024 + 6 * EMBEDDING}, {"context": 6}], ids=["frame", "context"])
def test_a_text_is_cut_to_what_the_cloud_takes(folder: Path, limit: dict[str, int]) -> None:
    with serving(lambda: HonestEncoder(**limit)) as (url, _):
        with Encoder.open(folder, url, truncate=True) as encoder:
            ids = encoder.bundle.tokenizer.encode("the cat sat on the mat")
            assert 6 < len(ids) + 2 <= CONTEXT
            [states, short] = encoder.hidden(["the cat sat on the mat", "the"])
            assert encoder.dropped_tokens == [len(ids) - 4, 0]
            assert len(states) == 6 and len(short) == 3
            cut = encoder.bundle.embed([START_ID, *ids[:4], END_ID])
            np.testing.assert_array_equal(states, plain_result(cut, "hidden"))
        with Encoder.open(folder, url) as encoder, pytest.raises(RefusedError) as raised:
            encoder.hidden(["the cat sat on the mat"])
    assert raised.value.code == ("too_large" if "max_frame" in limit else "context_full")


def test_a_text_of_exactly_the_context_is_taken(encoder: Encoder) -> None:
    words = "the " * 40
    fitting = next(text for end in range(len(words)) if len(encoder.bundle.tokenizer.encode(text := words[:end])) == 10)
    assert len(encoder.hidden([fitting])[0]) == CONTEXT


# --- images ---


def test_images_are_classified(image_folder: Path, url: str, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (7, 0, 0)).save(tmp_path / "seven.png")
    with Encoder.open(image_folder, url) as encoder:
        sources = [tmp_path / "seven.png", Image.new("RGB", (3, 3), (200, 9, 9))]
        for predictions, red in zip(encoder.classify_images(sources), (7, 200), strict=True):
            logits = plain_result(image(red)[:, :HIDDEN], "logits")
            assert predictions[0].label == LABELS[int(logits.argmax())]
        assert encoder.counters.vectors_up == 2 * PATCHES


def test_an_image_that_is_none_is_refused_and_the_next_is_classified(image_folder: Path, url: str) -> None:
    with Encoder.open(image_folder, url) as encoder:
        with pytest.raises(UsageError, match=r"image missing\.png: No such file"):
            encoder.classify_images(["missing.png"])
        assert encoder.classify_images([Image.new("RGB", (3, 3))])


# --- what cannot be asked ---


def test_what_the_bundle_is_not_made_for_is_refused_before_anything_is_sent(
    folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    nowhere = "ws://127.0.0.1:1"
    texts, images = Encoder.open(folder, nowhere), Encoder.open(image_folder, nowhere)
    for call in (images.embed, images.pooled, images.hidden, images.classify):
        with pytest.raises(UsageError, match=r"'image-encoder', wanted encoder|embed: seen a model"):
            call(["the cat"])
    with pytest.raises(UsageError, match="'encoder', wanted image-encoder"):
        texts.classify_images(["photo.jpg"])
    bare = Encoder.open(make_bundle(tmp_path / "bare", "encoder", pooling=None, outputs=["hidden", "logits"]), nowhere)
    with pytest.raises(UsageError, match="embed: seen a model that was not trained"):
        bare.embed(["the cat"])
    with pytest.raises(UsageError, match=r"pooled: seen a model without, wanted one of .*'hidden', 'logits'"):
        bare.pooled(["the cat"])
    with pytest.raises(UsageError, match="inputs: seen none"):
        texts.embed([])
    with pytest.raises(UsageError, match="seen one text, wanted a list"):
        texts.embed("the cat")
    chatting = make_bundle(tmp_path / "chat", "decoder")
    with pytest.raises(UsageError, match="'decoder', wanted encoder or image-encoder"):
        Encoder.open(chatting, nowhere)


def test_nothing_is_no_text_where_the_model_adds_no_tokens(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "device", "encoder", prefix_ids=[], suffix_ids=[])
    with pytest.raises(UsageError, match="text: seen nothing"):
        Encoder.open(folder, "ws://127.0.0.1:1").embed([""])


def test_an_encoder_without_classes_opens_and_embeds(tmp_path: Path) -> None:
    key = UserKey(CLASSES.key_id, CLASSES.residual, None)
    folder = make_bundle(tmp_path / "device", "encoder", key=key, labels=[], outputs=["hidden"])
    with (
        serving(lambda: HonestEncoder(key, vocab_size=0)) as (url, _),
        Encoder(Bundle.open(folder), Address(url)) as encoder,
    ):
        assert encoder.embed(["the cat"]).shape == (1, HIDDEN)


# --- the connection ---


def test_a_cloud_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(UnreachableError, match=r"ws://127\.0\.0\.1:1"):
        Encoder.open(folder, "ws://127.0.0.1:1").embed(["the cat"])


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_a_lost_connection_is_made_again_and_the_rest_is_asked(folder: Path, answers: int) -> None:
    lost: list[bool] = []

    def small() -> HonestEncoder:
        return HonestEncoder(max_frame=1024 + CONTEXT * 4 * HIDDEN)

    with serving(small, answers=answers) as (url, clouds):
        encoder = Encoder(Bundle.open(folder), Address(url), on_lost=lambda: lost.append(True))
        with encoder:
            vectors = encoder.embed(TEXTS * 3)
        assert len(clouds) == 2 and lost == [True]
    with serving(HonestEncoder) as (url, _), Encoder.open(folder, url) as whole:
        assert np.array_equal(vectors, whole.embed(TEXTS * 3))


def test_after_a_refusal_the_next_question_is_answered(folder: Path) -> None:
    cloud = HonestEncoder()
    cloud.failures = ["internal"]
    with serving(lambda: cloud) as (url, _), Encoder.open(folder, url) as encoder:
        with pytest.raises(RefusedError, match="internal: because"):
            encoder.embed(TEXTS)
        np.testing.assert_array_equal(encoder.pooled(["the"])[0], expected(encoder, "the", "pooled"))


# --- interruptions ---


class Patient(HonestEncoder):
    """Says nothing until it is told that nobody waits any more."""

    @property
    def waiting(self) -> int:
        return super().waiting if self._cancelled else 0


def test_an_interrupted_request_is_cancelled_in_the_cloud_and_the_next_is_answered(folder: Path) -> None:
    cloud = Patient()

    def interrupt() -> None:
        assert eventually(lambda: bool(cloud.encodes), 5)
        encoder.interrupt(Cancelled("enough"))

    with serving(lambda: cloud) as (url, clouds), Encoder.open(folder, url) as encoder:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(Cancelled, match="enough"):
            encoder.embed(TEXTS)
        thread.join()
        np.testing.assert_array_equal(encoder.pooled(["the"])[0], expected(encoder, "the", "pooled"))
        assert len(clouds) == 1  # on the same connection


def test_an_interruption_that_comes_between_requests_disturbs_none(encoder: Encoder) -> None:
    encoder.interrupt()
    np.testing.assert_array_equal(encoder.pooled(["the"])[0], expected(encoder, "the", "pooled"))


def test_an_interruption_ends_the_attempts_to_reach_a_cloud_that_went(folder: Path) -> None:
    with serving(HonestEncoder, answers=1) as (url, _):
        encoder = Encoder.open(folder, url, retry_seconds=600)
        encoder.embed(["the cat"])
    limit = threading.Timer(0.5, encoder.interrupt, [Cancelled("enough")])
    limit.start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        encoder.embed(["the dog"])
    assert time.monotonic() - started < 5
