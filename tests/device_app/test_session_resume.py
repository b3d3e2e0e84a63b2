"""A session whose line breaks, or whose KV cache is evicted: what it relies on afterwards, and what it sends again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_app.opening import MOST_REPLANS
from device_app.session import Session
from shared.errors import DishonestError
from shared.wire import Append, Error, Open, decode, encode
from tests.device_app.honest_cloud import (
    EMBEDDING,
    IMAGE_TOKENS,
    IMAGES,
    PATCH_SIZE,
    PATCHES,
    SOURCES,
    HonestCloud,
    ids_of,
    image,
    looking_session,
    new_session,
    of_widths,
    opened,
    plain_logits,
    reading_session,
)
from tests.thorough import examples

PROMPT = [901, 917, 923, 939, 941, 955, 967, 971, 983, 997]  # in three frames
ROOM = 1024 + 4 * PATCHES * PATCH_SIZE  # a frame of one image, or of a few embeddings


@pytest.fixture
def session() -> Session:
    return new_session()


@pytest.fixture
def cloud(session: Session) -> HonestCloud:
    cloud = HonestCloud()
    cloud.connect(session)
    return cloud


def ask(session: Session, cloud: HonestCloud, ids: Sequence[int], **options: Any) -> list[int]:
    """Asks, lets the cloud answer rightly, and gives the ids that were sent for it."""
    before = len(cloud.appends)
    session.ask(ids, **{"top_k": 5} | options)
    cloud.settle(session)
    assert_right(session, cloud.cache, options.get("source"))
    return [token for append in cloud.appends[before:] if append.kind == "text" for token in ids_of(append)]


def assert_right(session: Session, ids: Sequence[int], source: Sequence[int] | None = None) -> None:
    assert session.rows is not None and len(session.rows) == 1
    expected = plain_logits(ids, source)
    assert (session.rows[0].values == expected[session.rows[0].ids]).all()
    assert session.rows[0].values.max() == expected.max()


def start(session: Session, cloud: HonestCloud, ids: Sequence[int], **options: Any) -> None:
    """Asks, and lets the cloud take the requests without answering one."""
    session.ask(ids, **{"top_k": 5} | options)
    cloud.take(session)


def said_open(session: Session) -> Open:
    """What the session opens a fresh connection with."""
    session.lost()
    session.connected()
    opening = decode(session.outbox.popleft())
    assert isinstance(opening, Open)
    return opening


# --- taking a session over ---


def test_a_lost_connection_is_resumed_with_the_secret_of_the_last_opened(session: Session) -> None:
    assert said_open(session).resume is None
    session.receive(encode(opened(resume="first")))
    assert said_open(session).resume == "first"
    assert said_open(session).resume == "first"  # the line broke before Opened came
    session.receive(encode(opened(resume="second")))
    assert said_open(session).resume == "second"


def test_a_session_that_was_ended_is_not_resumed(session: Session, cloud: HonestCloud) -> None:
    ask(session, cloud, PROMPT)
    session.end()
    assert said_open(session).resume is None
    with pytest.raises(DishonestError, match="KV length of 1, wanted at most 0"):
        session.receive(encode(opened(kv_length=1)))


@pytest.mark.parametrize("arrived", [0, 1])
def test_in_the_middle_of_an_answer_nothing_but_the_last_token_is_sent_again(
    session: Session, cloud: HonestCloud, arrived: int
) -> None:
    ask(session, cloud, PROMPT)
    start(session, cloud, [*PROMPT, 5])
    before = len(cloud.appends)
    cloud.cut(session, arrived)
    cloud.settle(session)
    assert_right(session, [*PROMPT, 5])
    assert [(append.keep, ids_of(append), append.after) for append in cloud.appends[before:]] == [(10, [5], None)]
    assert (session.counters.resumes, session.counters.replays) == (1, 0)


@pytest.mark.parametrize("arrived", range(4))
def test_an_edit_that_was_cut_keeps_what_both_have_in_common(
    session: Session, cloud: HonestCloud, arrived: int
) -> None:
    ask(session, cloud, PROMPT)
    edited = [*PROMPT[:2], *range(1, 9)]
    start(session, cloud, edited)
    before = len(cloud.appends)
    cloud.cut(session, arrived)
    cloud.settle(session)
    assert_right(session, edited)
    assert cloud.appends[before].keep == 2
    assert (session.counters.resumes, session.counters.replays) == (1, 0)


@pytest.mark.parametrize(("left", "replays"), [(0, 1), (3, 1), (9, 1), (10, 0)])
def test_what_the_cloud_lost_meanwhile_is_sent_again(
    session: Session, cloud: HonestCloud, left: int, replays: int
) -> None:
    ask(session, cloud, PROMPT)
    cloud.forget(left)
    cloud.cut(session, 0)
    assert ask(session, cloud, [*PROMPT, 5]) == [*PROMPT[left:], 5]
    assert (session.counters.replays, session.counters.resumes) == (replays, 1 - replays)


def test_a_line_that_breaks_twice_is_resumed_twice(session: Session, cloud: HonestCloud) -> None:
    # After the first cut the cloud may hold more than the device can rely on. That is no lie, then or later.
    ask(session, cloud, PROMPT)
    start(session, cloud, [*PROMPT[:2], 7])
    for _ in range(3):
        session.lost()
        cloud.take_over(session)
        assert len(cloud.cache) == len(PROMPT)
    assert cloud.appends[-1].keep == 2
    cloud.settle(session)
    assert_right(session, [*PROMPT[:2], 7])
    assert session.counters.resumes == 3


def test_what_failed_before_the_line_broke_is_not_relied_on(session: Session, cloud: HonestCloud) -> None:
    ask(session, cloud, PROMPT)
    cloud.failures = ["window_exceeded"]
    start(session, cloud, [*range(1, 10)])
    cloud.step(session)  # the first of three; the others are in the air
    cloud.cut(session, 2)
    assert cloud.cache == PROMPT
    cloud.settle(session)
    assert_right(session, [*range(1, 10)])


@pytest.mark.parametrize("arrived", range(4))
def test_a_question_that_was_given_up_before_the_line_broke_leaves_no_trace(
    session: Session, cloud: HonestCloud, arrived: int
) -> None:
    ask(session, cloud, PROMPT)
    start(session, cloud, [901, *range(1, 9)])
    session.cancel()
    cloud.cut(session, arrived)
    ask(session, cloud, [901, 1, 2, 9])
    assert cloud.cache == [901, 1, 2, 9]


@pytest.mark.parametrize("flights", [0, 3])
def test_a_kv_cache_longer_than_any_that_was_asked_for_is_refused(
    session: Session, cloud: HonestCloud, flights: int
) -> None:
    ask(session, cloud, PROMPT)
    longest = len(PROMPT)
    if flights:
        start(session, cloud, [*PROMPT[:3], *range(1, 9)])
        longest = 11
    said_open(session)
    with pytest.raises(DishonestError, match=f"KV length of {longest + 1}, wanted at most {longest}"):
        session.receive(encode(opened(kv_length=longest + 1)))
    said_open(session)
    session.receive(encode(opened(kv_length=longest)))


def test_behind_a_failure_the_cloud_cannot_hold_what_was_to_come(session: Session, cloud: HonestCloud) -> None:
    ask(session, cloud, PROMPT[:2])
    cloud.failures = ["window_exceeded"]
    start(session, cloud, PROMPT)
    cloud.step(session)
    said_open(session)
    with pytest.raises(DishonestError, match="KV length of 3, wanted at most 2"):
        session.receive(encode(opened(kv_length=3)))


def test_an_image_that_was_there_is_not_sent_again() -> None:
    session, cloud = looking_session(), HonestCloud(max_frame=ROOM, **of_widths(IMAGES))
    cloud.connect(session)
    ids = [1, *[session.add_image(image(0))] * IMAGE_TOKENS, 2]
    ask(session, cloud, ids)
    cloud.cut(session, 0)
    before = len(cloud.appends)
    ask(session, cloud, [*ids, 3])
    assert [append.kind for append in cloud.appends[before:]] == ["text"]
    cloud.forget(3)  # in the middle of the image, of which the cloud may keep a part and the device none
    cloud.cut(session, 0)
    session.ask(ids, top_k=5)
    [first] = [decode(frame) for frame in list(session.outbox)[:1]]
    assert isinstance(first, Append) and (first.kind, first.keep) == ("image", 1)


@pytest.mark.parametrize(
    ("arrived", "source", "stores"),
    [(0, [7, 8], 0), (1, [7, 8], 0), (0, [9], 1), (1, [9], 1), (2, [9], 1)],
)
def test_a_source_is_stored_again_where_it_is_not_sure_which_one_is_there(
    arrived: int, source: list[int], stores: int
) -> None:
    session, cloud = reading_session(), HonestCloud(max_frame=ROOM, **of_widths(SOURCES))
    cloud.connect(session)
    ask(session, cloud, [1, 2], source=[7, 8])
    start(session, cloud, [1, 2, 3], source=source)
    before = len(cloud.stores)
    cloud.cut(session, arrived)
    cloud.settle(session)
    assert (cloud.cache, cloud.source) == ([1, 2, 3], source)
    assert_right(session, [1, 2, 3], source)
    assert len(cloud.stores) - before == stores


def test_a_source_beside_an_empty_cache_is_stored_again() -> None:
    session, cloud = reading_session(), HonestCloud(max_frame=ROOM, **of_widths(SOURCES))
    cloud.connect(session)
    ask(session, cloud, [1, 2], source=[7, 8])
    cloud.forget(0)
    cloud.source = None
    cloud.cut(session, 0)
    ask(session, cloud, [1, 2, 3], source=[7, 8])
    assert len(cloud.stores) == 2 and cloud.source == [7, 8]
    assert session.counters.replays == 1


pieces = st.integers(1, 4)
several_ids = st.lists(st.integers(1, 2), min_size=1, max_size=8)


@settings(max_examples=examples(400), deadline=None)
@given(data=st.data(), in_a_frame=pieces, held=several_ids, asked=several_ids, then=several_ids)
def test_what_a_session_relies_on_is_there_whatever_the_cloud_had_done_when_the_line_broke(
    data: st.DataObject, in_a_frame: int, held: list[int], asked: list[int], then: list[int]
) -> None:
    session, cloud = new_session(), HonestCloud(max_frame=1024 + in_a_frame * EMBEDDING)
    cloud.connect(session)
    ask(session, cloud, held)
    failure = data.draw(st.sampled_from([None, "window_exceeded", "cancelled"]), "failure")
    start(session, cloud, asked)
    arrived = data.draw(st.integers(0, cloud.waiting), "requests that the cloud had carried out")
    answers = data.draw(st.integers(0, arrived), "answers that the device got")
    fails = data.draw(st.integers(0, arrived), "the one that failed")
    given_up = data.draw(st.sampled_from([arrived + 1, *range(arrived + 1)]), "when it was given up")
    replies = []
    for at in range(arrived):
        if at == given_up:
            session.cancel()
            cloud.take(session)
        if at == fails and failure is not None:
            cloud.failures = [failure]
        replies.append(encode(cloud.reply()))
        if at < answers:
            session.receive(replies[at])
    for _ in range(data.draw(st.integers(1, 2), "times that the line broke")):
        cloud.forget(data.draw(st.sampled_from([len(cloud.cache), *range(len(cloud.cache))]), "positions left"))
        session.cancel()
        session.lost()
        cloud.take_over(session)
    new = data.draw(st.sampled_from([held + then, asked + then, then, asked, held]), "what is asked then")
    session.ask(new, top_k=5)
    first = decode(session.outbox[0])
    assert isinstance(first, Append)
    assert cloud.cache[: first.keep] == new[: first.keep] and first.keep <= len(cloud.cache)
    cloud.settle(session)
    assert cloud.cache == new
    assert_right(session, new)


# --- an interrupt between any two lines ---


class _Interrupted(BaseException):
    """What Ctrl-C raises in a program, told apart from one of the person who runs the tests."""


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Raises where the given number of lines of the session have run; gives how many ran."""
    ran = [0]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(("device_app/session.py", "device_app/opening.py")):
            return None
        if event == "line":
            ran[0] += 1
            if ran[0] == line:
                raise _Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield ran
    finally:
        sys.settrace(before)


def fail_and_replay(session: Session, cloud: HonestCloud) -> None:
    """An edit that fails and is sent again. The cache has the same length with and without it."""
    cloud.failures = ["window_exceeded"]
    session.ask([1, 5, 6, 7], top_k=5)
    cloud.settle(session)


def asked_and_interrupted(line: int) -> int:
    """Whether an answer is right after an interrupt at that line; gives how many lines there were."""
    session, cloud = new_session(), HonestCloud(max_frame=1024 + 2 * EMBEDDING)
    cloud.connect(session)
    ask(session, cloud, [1, 2, 3, 4])
    with interrupted_at(line) as ran:
        try:
            fail_and_replay(session, cloud)
        except _Interrupted:
            sys.settrace(None)
            cloud.failures = []
            session.lost()
            cloud.take_over(session)
    for ids in ([1, 5, 6, 8], [1, 2, 3, 4]):
        ask(session, cloud, ids)
        assert cloud.cache == ids, f"line {line}"
    return ran[0]


def test_an_interrupt_anywhere_leaves_nothing_relied_on_that_is_not_there() -> None:
    lines = asked_and_interrupted(0)
    assert lines > 100
    for line in range(1, lines + 1):
        asked_and_interrupted(line)


# --- eviction ---


@pytest.mark.parametrize("done", range(4))
def test_an_eviction_in_the_middle_of_a_prompt_is_mended_unseen(
    session: Session, cloud: HonestCloud, done: int
) -> None:
    ask(session, cloud, PROMPT[:2])
    start(session, cloud, [*PROMPT, 1, 2, 3])
    for _ in range(done):
        cloud.step(session)
    cloud.forget(0)
    cloud.settle(session)
    assert_right(session, [*PROMPT, 1, 2, 3])
    assert session.counters.replays == (done < 3)


def test_an_eviction_before_every_token_does_not_end_an_answer(session: Session, cloud: HonestCloud) -> None:
    for length in range(1, 3 * MOST_REPLANS):
        cloud.forget(0)
        ask(session, cloud, range(length))
    assert session.counters.replays == 3 * MOST_REPLANS - 2


def test_evictions_do_not_end_a_question_of_which_more_is_done_each_time(session: Session, cloud: HonestCloud) -> None:
    prompt = list(range(60))  # in frames of 4
    start(session, cloud, prompt)
    for further in range(4, 60, 4):
        while len(cloud.cache) < further:
            cloud.step(session)
        cloud.forget(0)
    assert session.counters.replays > MOST_REPLANS
    cloud.settle(session)
    assert_right(session, prompt)


def test_evictions_of_a_question_that_gets_no_further_end_it(session: Session, cloud: HonestCloud) -> None:
    start(session, cloud, PROMPT)
    with pytest.raises(DishonestError, match="lost its place"):
        for _ in range(3 * MOST_REPLANS):
            cloud.step(session)
            cloud.forget(0)
            cloud.step(session)
            cloud.step(session)


def test_an_evicted_session_with_an_image_sends_all_of_it_again() -> None:
    session, cloud = looking_session(), HonestCloud(max_frame=ROOM, **of_widths(IMAGES))
    cloud.connect(session)
    ids = [1, *[session.add_image(image(0))] * IMAGE_TOKENS, 2]
    ask(session, cloud, ids)
    cloud.forget(0)
    before = len(cloud.appends)
    ask(session, cloud, [*ids, 3])
    assert [append.kind for append in cloud.appends[before:]] == ["text", "text", "image", "text"]
    assert session.counters.replays == 1


@pytest.mark.parametrize("with_its_source", [True, False])
def test_an_evicted_session_with_a_source_sends_both_again(with_its_source: bool) -> None:
    session, cloud = reading_session(), HonestCloud(max_frame=ROOM, **of_widths(SOURCES))
    cloud.connect(session)
    ask(session, cloud, [1, 2], source=[7, 8])
    cloud.forget(0)
    cloud.source = None if with_its_source else cloud.source
    ask(session, cloud, [1, 2, 3], source=[7, 8])
    assert (cloud.cache, cloud.source) == ([1, 2, 3], [7, 8])
    assert session.counters.replays == 1


# --- a request that is dropped while it runs ---


def test_a_request_that_was_dropped_halfway_leaves_what_it_kept(session: Session, cloud: HonestCloud) -> None:
    ask(session, cloud, PROMPT)
    start(session, cloud, [*PROMPT[:3], *range(1, 9)])
    session.cancel()
    cloud.failures = ["cancelled"]  # the first of two had begun; the other had not
    cloud.take(session)
    while cloud.waiting:
        cloud.step(session)
    assert cloud.cache == PROMPT[:3]
    assert ask(session, cloud, [*PROMPT[:5], 5]) == [*PROMPT[3:5], 5]


def test_the_kv_length_after_a_dropped_request_is_believed(session: Session, cloud: HonestCloud) -> None:
    ask(session, cloud, PROMPT)
    start(session, cloud, [*PROMPT[:3], 5])
    session.cancel()
    session.receive(encode(Error(code="cancelled", message="", seq=cloud.appends[-1].seq, kv_length=3)))
    session.outbox.clear()
    session.ask([*PROMPT, 5], top_k=5)
    append = decode(session.outbox[0])
    assert isinstance(append, Append) and (append.keep, ids_of(append)[:2]) == (3, PROMPT[3:5])
