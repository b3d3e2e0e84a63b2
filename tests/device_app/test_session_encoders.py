"""Sessions whose decoder reads an encoder: images among the ids, or a source text beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_app import session as module
from device_app.session import Session
from shared.errors import BundleError, DishonestError, RefusedError, UsageError
from shared.wire import Encoded, Hidden, Message, decode, encode
from tests.device_app.honest_cloud import (
    BUNDLE_CONTEXT,
    EMBEDDING,
    HIDDEN,
    IMAGE_TOKENS,
    IMAGES,
    LONGEST_SOURCE,
    LOOKING,
    PATCH_SIZE,
    PATCHES,
    READING,
    SOURCES,
    HonestCloud,
    embed,
    image,
    logits,
    looking_session,
    new_session,
    of_widths,
    opened,
    plain_logits,
    reading_session,
    stored,
)
from tests.thorough import examples

ROOM = 1024 + 4 * PATCHES * PATCH_SIZE  # a frame of one image, or of a few embeddings


def looking_cloud(**fields: object) -> HonestCloud:
    return HonestCloud(**{"max_frame": ROOM, **of_widths(IMAGES)} | fields)


def reading_cloud(**fields: object) -> HonestCloud:
    return HonestCloud(**{"max_frame": ROOM, **of_widths(SOURCES)} | fields)


def shown(ids: Sequence[int], numbers: Sequence[int]) -> list[int]:
    """`ids` as the cloud's cache says them: -1 - n for image n."""
    return [token if token >= 0 else -1 - numbers.index(token) for token in ids]


def assert_right(session: Session, ids: Sequence[int], source: Sequence[int] | None = None) -> None:
    assert session.rows is not None and len(session.rows) == 1
    expected = plain_logits(ids, source)
    assert np.array_equal(session.rows[0].values, expected[session.rows[0].ids])
    assert session.rows[0].values.max() == expected.max()


class Looking:
    """A session with a few images, and its cloud."""

    def __init__(self, images: int = 3, **fields: object) -> None:
        self.session, self.cloud = looking_session(), looking_cloud(**fields)
        self.numbers = [self.session.add_image(image(number)) for number in range(images)]
        self.cloud.connect(self.session)

    def image(self, number: int) -> list[int]:
        return [self.numbers[number]] * IMAGE_TOKENS

    def ask(self, ids: Sequence[int], **options: int) -> list[tuple[str, int, int]]:
        """Asks, and gives kind, keep and length of each Append that took."""
        before = len(self.cloud.appends)
        self.session.ask(ids, **{"top_k": 5} | options)
        self.cloud.settle(self.session)
        assert self.cloud.cache == shown(ids, self.numbers)
        if options.get("rows", 1) == 1:
            assert_right(self.session, self.cloud.cache)
        return [(append.kind, append.keep, len(append.embeddings)) for append in self.cloud.appends[before:]]


@pytest.fixture
def looking() -> Looking:
    return Looking()


# --- images ---


def test_an_image_goes_up_whole_between_the_texts(looking: Looking) -> None:
    appends = looking.ask([1, 2, *looking.image(0), 3])
    assert appends == [("text", 0, 2), ("image", 2, PATCHES), ("text", 2 + IMAGE_TOKENS, 1)]


def test_an_image_leaves_the_device_in_the_encoders_order(looking: Looking) -> None:
    looking.ask([*looking.image(1), 3])
    [sent, _] = looking.cloud.appends
    assert np.array_equal(sent.embeddings, image(1)[:, LOOKING.encoder])
    assert not np.array_equal(sent.embeddings, image(1))


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        ("1 A 2", "1 A 2 3", [("text", 5, 1)]),  # decoding
        ("1 A 2", "1 A 2", [("text", 4, 1)]),  # the same question
        ("1 A 2", "1 A 3", [("text", 4, 1)]),  # an edit after the image
        ("1 A 2", "1 B 2", [("image", 1, 5), ("text", 4, 1)]),  # another image
        ("1 A 2", "4 A 2", [("text", 0, 1), ("image", 1, 5), ("text", 4, 1)]),  # an edit before it
        ("1 A 2", "1 2", [("text", 1, 1)]),  # the image taken out
        ("1 2", "1 A 2", [("image", 1, 5), ("text", 4, 1)]),  # and put in
        ("A 2", "A A 2", [("image", 3, 5), ("text", 6, 1)]),  # the same image twice
        ("A A A 2", "A A 2", [("text", 6, 1)]),
        ("A B 2", "A A 2", [("image", 3, 5), ("text", 6, 1)]),
        ("A 1 B 2", "A 1 C 2 3", [("image", 4, 5), ("text", 7, 2)]),
    ],
)
def test_only_what_the_cloud_lacks_is_sent(
    looking: Looking, first: str, then: str, expected: list[tuple[str, int, int]]
) -> None:
    def ids(text: str) -> list[int]:
        words = [looking.image("ABC".index(word)) if word in "ABC" else [int(word)] for word in text.split()]
        return [token for word in words for token in word]

    looking.ask(ids(first))
    assert looking.ask(ids(then)) == expected


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_come_from_the_text_behind_an_image(looking: Looking, rows: int) -> None:
    ids = [1, *looking.image(0), 2, 3, 4]
    looking.ask(ids, rows=rows)
    assert looking.cloud.appends[-1].rows == rows
    looking.ask(ids, rows=rows)  # held already: the last rows again
    assert looking.cloud.appends[-1].keep == len(ids) - rows


def test_rows_may_not_reach_into_an_image(looking: Looking) -> None:
    for ids, rows in (([1, *looking.image(0)], 1), ([*looking.image(0), 1], 2)):
        with pytest.raises(UsageError, match="wanted text at the last"):
            looking.session.ask(ids, rows=rows, top_k=5)
    assert not looking.session.outbox


def test_the_same_image_has_the_same_number_and_another_another(looking: Looking) -> None:
    assert looking.session.add_image(image(1).copy()) == looking.numbers[1]
    assert len({*looking.numbers}) == 3 and max(looking.numbers) < 0


def test_an_image_that_is_not_whole_or_not_there_is_refused(looking: Looking) -> None:
    cut, unknown = looking.image(0)[1:], [-7] * IMAGE_TOKENS
    for ids in ([1, *cut, 2], [1, *unknown, 2], [*looking.image(0), *cut, 2], [1, *cut, *looking.image(1), 2]):
        with pytest.raises(UsageError, match=f"not of {IMAGE_TOKENS} positions"):
            looking.session.ask(ids, top_k=5)
    assert not looking.session.outbox


def test_a_model_without_images_takes_none() -> None:
    with pytest.raises(UsageError, match="this model takes none"):
        new_session().ask([1, -1, 2], top_k=5)
    with pytest.raises(BundleError, match="no images"):
        new_session().add_image(image(0))


@pytest.mark.parametrize("shape", [(PATCHES - 1, PATCH_SIZE), (PATCHES, PATCH_SIZE + 1), (PATCHES * PATCH_SIZE,)])
def test_embeddings_that_are_no_image_of_the_models_are_refused(looking: Looking, shape: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match="seen embeddings of shape"):
        looking.session.add_image(np.zeros(shape, np.float32))


def test_the_store_is_bounded_and_drops_the_oldest_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IMAGE_BYTES", 2 * image(0).nbytes)
    looking = Looking(images=4, context=1000)
    looking.ask([*looking.image(0), 1])  # the first two unused ones, 1 and 2, go; 3 stays beside the used one
    looking.ask([*looking.image(3), 1])
    for gone in (1, 2):
        with pytest.raises(UsageError, match="dropped since"):
            looking.session.ask([*looking.image(gone), 1], top_k=5)
    assert looking.session.add_image(image(1)) == looking.numbers[1]
    looking.ask([*looking.image(1), 1])
    every = [looking.session.add_image(image(number)) for number in range(4)]
    looking.ask([*(token for number in every for token in [number] * IMAGE_TOKENS), 1])  # all at once, beyond it


def test_after_a_lost_connection_images_are_sent_again(looking: Looking) -> None:
    ids = [1, *looking.image(0), 2]
    looking.ask(ids)
    looking.session.lost()
    looking.cloud.connect(looking.session)
    appends = looking.ask([*ids, 3])
    assert [kind for kind, _, _ in appends] == ["text", "image", "text"]
    assert looking.session.counters.replays == 1


@pytest.mark.parametrize("length", range(9))
def test_a_cloud_that_forgot_within_an_image_is_sent_it_whole(looking: Looking, length: int) -> None:
    ids = [1, *looking.image(0), *looking.image(0), 2, 3]
    looking.ask(ids)
    # Evicted in the middle of an image: the device keeps none of it. The cloud asserts that none is cut.
    looking.cloud.forget(length)
    whole = length - (length - 1) % IMAGE_TOKENS if 1 < length < 1 + 2 * IMAGE_TOKENS else length
    looking.cloud.forget(whole)
    looking.ask([*ids, 4])


def test_out_of_step_within_an_image_keeps_nothing_of_it(looking: Looking) -> None:
    from shared.wire import Error

    ids = [1, *looking.image(0), 2]
    looking.ask(ids)
    looking.session.ask([*ids, 3], top_k=5)
    [append] = [decode(frame) for frame in looking.session.outbox]
    looking.session.outbox.clear()
    looking.session.receive(encode(Error(code="out_of_step", message="", seq=append.seq, kv_length=2)))  # type: ignore[union-attr]
    looking.cloud.forget(1)
    looking.cloud.settle(looking.session)
    assert [append.keep for append in looking.cloud.appends[3:]] == [1, 1 + IMAGE_TOKENS]
    assert_right(looking.session, looking.cloud.cache)


def test_an_image_that_a_frame_cannot_hold_is_refused_before_anything_is_sent() -> None:
    looking = Looking(max_frame=ROOM - 1)
    with pytest.raises(RefusedError, match="image: it takes a frame of") as raised:
        looking.session.ask([1, *looking.image(0), 2], top_k=5)
    assert raised.value.code == "too_large"
    assert not looking.session.outbox


def test_an_answer_to_an_image_must_have_its_length(looking: Looking) -> None:
    looking.session.ask([*looking.image(0), 2], top_k=5)
    looking.cloud.take(looking.session)
    with pytest.raises(DishonestError, match=f"KV length: seen {PATCHES}, wanted {IMAGE_TOKENS}"):
        looking.session.receive(encode(logits(looking.cloud.appends[0], [], PATCHES)))


# --- source sequences ---


def ask(session: Session, cloud: HonestCloud, source: Sequence[int], ids: Sequence[int]) -> tuple[int, list[int]]:
    """Asks, and gives how many stores and which keeps that took."""
    stores, appends = len(cloud.stores), len(cloud.appends)
    session.ask(ids, source=source, top_k=5)
    cloud.settle(session)
    assert (cloud.cache, cloud.source) == (list(ids), list(source))
    assert_right(session, ids, source)
    return len(cloud.stores) - stores, [append.keep for append in cloud.appends[appends:]]


@pytest.fixture
def reading() -> tuple[Session, HonestCloud]:
    session, cloud = reading_session(), reading_cloud()
    cloud.connect(session)
    return session, cloud


def test_a_source_is_stored_once_and_then_decoded_from(reading: tuple[Session, HonestCloud]) -> None:
    assert ask(*reading, [7, 8, 9], [1]) == (1, [0])
    assert ask(*reading, [7, 8, 9], [1, 2]) == (0, [1])
    assert ask(*reading, [7, 8, 9], [1, 2, 3]) == (0, [2])


def test_another_source_empties_what_is_held(reading: tuple[Session, HonestCloud]) -> None:
    ask(*reading, [7, 8, 9], [1, 2])
    assert ask(*reading, [7, 8], [1, 2]) == (1, [0])
    assert ask(*reading, [7, 8, 9], [1, 2]) == (1, [0])


def test_a_source_leaves_the_device_in_the_encoders_order(reading: tuple[Session, HonestCloud]) -> None:
    ask(*reading, [7, 8], [1])
    [store] = reading[1].stores
    assert np.array_equal(store.embeddings, embed([7, 8])[:, READING.encoder])
    assert (store.want, store.lengths) == ("store", (2,))


def test_a_source_and_what_rests_on_it_are_pipelined(reading: tuple[Session, HonestCloud]) -> None:
    session, cloud = reading
    session.ask([1], source=[7, 8], top_k=5)
    cloud.take(session)
    assert cloud.waiting == 2
    assert cloud.appends[0].after == cloud.stores[0].seq


def test_after_a_lost_connection_the_source_is_sent_again(reading: tuple[Session, HonestCloud]) -> None:
    session, cloud = reading
    ask(session, cloud, [7, 8, 9], [1, 2])
    session.lost()
    cloud.connect(session)
    assert ask(session, cloud, [7, 8, 9], [1, 2, 3]) == (1, [0])
    assert session.counters.replays == 1


def test_a_cloud_that_lost_the_source_alone_is_sent_it_again(reading: tuple[Session, HonestCloud]) -> None:
    session, cloud = reading
    ask(session, cloud, [7, 8, 9], [1, 2])
    cloud.source = None
    cloud.forget(0)
    assert ask(session, cloud, [7, 8, 9], [1, 2, 3])[0] == 1


@pytest.mark.parametrize("failures", [["window_exceeded"], ["cancelled", "window_exceeded"]])
def test_a_source_that_failed_is_sent_again_with_what_rests_on_it(
    reading: tuple[Session, HonestCloud], failures: list[str]
) -> None:
    session, cloud = reading
    ask(session, cloud, [7], [1, 2])
    cloud.failures = failures  # type: ignore[assignment]
    ask(session, cloud, [7, 8], [1, 2, 3])


def test_a_source_longer_than_the_model_reads_is_refused_before_anything_is_sent(
    reading: tuple[Session, HonestCloud],
) -> None:
    session, _ = reading
    with pytest.raises(RefusedError, match=f"source: it takes 7 tokens, wanted at most {LONGEST_SOURCE}") as raised:
        session.ask([1], source=range(7), top_k=5)
    assert raised.value.code == "context_full"
    assert not session.outbox


def test_a_source_goes_with_models_that_read_one_and_only_with_those() -> None:
    with pytest.raises(UsageError, match="source sequence: seen none, wanted one"):
        reading_session().ask([1], top_k=5)
    for session in (new_session(), looking_session()):
        with pytest.raises(UsageError, match="source sequence: seen one, wanted none"):
            session.ask([1], source=[7], top_k=5)


STORE_LIES: dict[str, Callable[[Encoded], Message]] = {
    "a KV length": lambda honest: changed(honest, kv_length=1),
    "a later seq": lambda honest: changed(honest, seq=honest.seq + 1),
    "another dtype": lambda honest: changed(honest, tensors=(honest.result.astype(np.float16),)),
    "a row": lambda honest: changed(honest, tensors=(np.zeros((1, HIDDEN), np.float32),)),
    "another width": lambda honest: changed(honest, tensors=(np.zeros((0, HIDDEN + 1), np.float32),)),
    "hidden states": lambda honest: Hidden(seq=honest.seq, kv_length=0, tensors=honest.tensors),
}


def changed(honest: Encoded, **fields: object) -> Encoded:
    kept = {name: getattr(honest, name) for name in honest.__struct_fields__}
    return Encoded(**kept | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("lie", STORE_LIES)
def test_an_answer_to_a_source_that_cannot_be_true_is_refused(reading: tuple[Session, HonestCloud], lie: str) -> None:
    session, cloud = reading
    session.ask([1], source=[7, 8], top_k=5)
    cloud.take(session)
    with pytest.raises(DishonestError):
        session.receive(encode(STORE_LIES[lie](stored(cloud.stores[0]))))


def test_an_encoded_in_place_of_logits_is_refused(reading: tuple[Session, HonestCloud]) -> None:
    session, cloud = reading
    ask(session, cloud, [7], [1])
    session.ask([1, 2], source=[7], top_k=5)
    cloud.take(session)
    lie = Encoded(seq=cloud.appends[-1].seq, kv_length=2, tensors=(np.zeros((0, HIDDEN), np.float32),))
    with pytest.raises(DishonestError, match="seen Encoded, wanted Logits"):
        session.receive(encode(lie))


# --- both ---


def test_every_embedding_is_of_its_place_in_the_sequence() -> None:
    placed: list[tuple[list[int], int]] = []

    def record(ids: Sequence[int], start: int) -> np.ndarray:
        placed.append((list(ids), start))
        return embed(ids)

    looking = Session(LOOKING, record, served_name="tiny", context=BUNDLE_CONTEXT, widths=IMAGES)
    cloud = looking_cloud(max_frame=ROOM)
    number = looking.add_image(image(0))
    ids = [*range(1, 13), *[number] * IMAGE_TOKENS, 13, 14]
    cloud.connect(looking)
    for length in (len(ids) - 1, len(ids)):
        looking.ask(ids[:length], top_k=5)
        cloud.settle(looking)
    assert placed == [
        (list(range(1, 8)), 0),
        (list(range(8, 13)), 7),
        ([13], 12 + IMAGE_TOKENS),
        ([14], 13 + IMAGE_TOKENS),
    ]
    placed.clear()
    reading = Session(READING, record, served_name="tiny", context=BUNDLE_CONTEXT, widths=SOURCES)
    cloud = reading_cloud()
    cloud.connect(reading)
    for length in (2, 3):
        reading.ask([1, 2, 3][:length], source=[7, 8], top_k=5)
        cloud.settle(reading)
    assert placed == [([7, 8], 0), ([1, 2], 0), ([3], 2)]


@pytest.mark.parametrize("field", ["encoder_size", "encoder_context", "image_tokens"])
@pytest.mark.parametrize("open_", [new_session, looking_session, reading_session])
def test_an_opened_with_another_encoder_is_refused(open_: Callable[[], Session], field: str) -> None:
    widths = of_widths({new_session: None, looking_session: IMAGES, reading_session: SOURCES}[open_] or NONE)
    session = open_()
    session.connected()
    with pytest.raises(DishonestError, match=r"^Opened: seen an encoder of"):
        session.receive(encode(opened(**widths | {field: widths[field] + 1})))
    session.connected()
    session.receive(encode(opened(**widths)))
    assert session.opened is not None


NONE = new_session()._widths

A, B = "A", "B"
words = st.lists(st.sampled_from([1, 2, A, B]), max_size=6)
commands = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 5), words),
    st.tuples(st.just("cancel")),
    st.tuples(st.just("answer")),
    st.tuples(st.just("answer")),
    st.tuples(st.just("lose")),
    st.tuples(st.just("cut"), st.integers(0, 4)),
    st.tuples(st.just("forget"), st.integers(0, 5)),
    st.tuples(st.just("fail"), st.sampled_from(["window_exceeded", "cancelled"])),
)


@settings(max_examples=examples(600), deadline=None)
@given(st.lists(commands, max_size=25), st.integers(1, 4))
def test_the_cloud_ends_with_exactly_what_was_asked_about_images_included(
    steps: list[tuple[object, ...]], frames_in_window: int
) -> None:
    looking = Looking(images=2, context=200, window=frames_in_window * ROOM)
    session, cloud = looking.session, looking.cloud
    said: list[object] = [1]  # words, an image being one
    ids: list[int] = [1]
    for name, *values in [*steps, ("ask", 6, [])]:
        if name == "ask":
            keep, new = values
            said = [*said[:keep], *new, 2]  # type: ignore[misc, index]
            ids = [token for word in said for token in (looking.image("AB".index(word)) if word in (A, B) else [word])]  # type: ignore[misc, list-item]
            session.ask(ids, top_k=5)
        elif name == "cancel":
            session.cancel()
        elif name == "answer" and cloud.waiting:
            cloud.step(session)
        elif name == "lose":
            session.lost()
            cloud.connect(session)
        elif name == "cut":
            cloud.cut(session, values[0])  # type: ignore[arg-type]
        elif name == "forget":
            cloud.forget(boundary(cloud.cache, values[0]))  # type: ignore[arg-type]
        elif name == "fail" and not cloud.failures:
            cloud.failures = [values[0]]  # type: ignore[list-item]
        cloud.take(session)
        if session.rows is not None:
            assert_right(session, shown(ids, looking.numbers))
    cloud.settle(session)
    assert cloud.cache == shown(ids, looking.numbers)
    assert_right(session, cloud.cache)


def boundary(cache: Sequence[int], words_: int) -> int:
    """Positions of the first so many words of a cache."""
    at = 0
    for _ in range(words_):
        if at < len(cache):
            at += 1 if cache[at] >= 0 else IMAGE_TOKENS
    return at


sources = st.lists(st.integers(1, 2), min_size=1, max_size=3)
reading_commands = st.one_of(
    st.tuples(st.just("ask"), sources, st.integers(0, 6), st.lists(st.integers(1, 2), min_size=1, max_size=4)),
    st.tuples(st.just("cancel")),
    st.tuples(st.just("answer")),
    st.tuples(st.just("answer")),
    st.tuples(st.just("lose")),
    st.tuples(st.just("cut"), st.integers(0, 4)),
    st.tuples(st.just("forget"), st.integers(0, 5)),
    st.tuples(st.just("fail"), st.sampled_from(["window_exceeded", "cancelled"])),
)


@settings(max_examples=examples(600), deadline=None)
@given(st.lists(reading_commands, max_size=25), st.integers(1, 3), st.integers(1, 4))
def test_the_cloud_ends_with_exactly_what_was_asked_about_its_source_included(
    steps: list[tuple[object, ...]], in_a_frame: int, frames_in_window: int
) -> None:
    size = max(1024 + in_a_frame * EMBEDDING, 1024 + 3 * EMBEDDING)
    session, cloud = reading_session(), reading_cloud(max_frame=size, window=frames_in_window * size)
    cloud.connect(session)
    ids, source = [1], [1]
    for name, *values in [*steps, ("ask", [2, 1], 6, [1])]:
        if name == "ask":
            source, keep, new = values  # type: ignore[assignment]
            ids = ids[:keep] + new  # type: ignore[misc, operator, index]
            session.ask(ids, source=source, top_k=5)
        elif name == "cancel":
            session.cancel()
        elif name == "answer" and cloud.waiting:
            cloud.step(session)
        elif name == "lose":
            session.lost()
            cloud.connect(session)
        elif name == "cut":
            cloud.cut(session, values[0])  # type: ignore[arg-type]
        elif name == "forget":
            cloud.forget(values[0])  # type: ignore[arg-type]
            cloud.source = cloud.source if cloud.cache else None
        elif name == "fail" and not cloud.failures:
            cloud.failures = [values[0]]  # type: ignore[list-item]
        cloud.take(session)
        if session.rows is not None:
            assert_right(session, ids, source)
    cloud.settle(session)
    assert (cloud.cache, cloud.source) == (ids, source)
    assert_right(session, ids, source)
