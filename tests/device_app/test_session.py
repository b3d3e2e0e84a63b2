"""The device's session, without sockets: what it sends, what it makes of replies, and which replies it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_app.opening import MOST_REPLANS
from device_app.sampler import Row
from device_app.session import Session
from shared.errors import DishonestError, RefusedError
from shared.key import UserKey
from shared.wire import (
    Append,
    Array,
    Cancel,
    Encode,
    Encoded,
    Error,
    ErrorCode,
    Hidden,
    Logits,
    Message,
    Open,
    Opened,
    decode,
    encode,
)
from tests.device_app.honest_cloud import (
    BUNDLE_CONTEXT,
    EMBEDDING,
    HIDDEN,
    KEY,
    VOCAB,
    HonestCloud,
    classify,
    classifying_session,
    embed,
    hidden,
    ids_of,
    logits,
    new_session,
    opened,
    plain_hidden,
    plain_logits,
)
from tests.thorough import examples

PROMPT = [901, 917, 923, 939, 941, 955, 967, 971, 983, 997]


@pytest.fixture
def session() -> Session:
    return new_session()


def ask(session: Session, cloud: HonestCloud, ids: Sequence[int], **options: int) -> list[Append]:
    """Asks, lets the cloud answer, and gives the Appends that took."""
    before = len(cloud.appends)
    session.ask(ids, **{"top_k": 5} | options)
    cloud.settle(session)
    assert_right(session, ids, options.get("rows", 1))
    return cloud.appends[before:]


def assert_right(session: Session, ids: Sequence[int], rows: int = 1) -> None:
    """The rows are those of the ids that were asked about."""
    assert session.rows is not None and len(session.rows) == rows
    for back, row in enumerate(reversed(session.rows)):
        expected = plain_logits(ids[: len(ids) - back])
        assert np.array_equal(row.values, expected[row.ids])
        assert row.full == (len(row.ids) == VOCAB) and row.values.max() == expected.max()


def sent(session: Session) -> list[Message]:
    """What the session has to say, taken from it."""
    frames = [decode(frame) for frame in session.outbox]
    session.outbox.clear()
    return frames  # type: ignore[return-value]


# --- what it sends ---


def test_open_names_the_model_the_key_and_the_token(session: Session) -> None:
    session = Session(KEY, embed, served_name="tiny", context=BUNDLE_CONTEXT, token="secret")
    session.connected()
    assert sent(session) == [Open(model="tiny", key_id=KEY.key_id, token="secret")]


def test_nothing_is_asked_before_the_cloud_said_what_it_takes(session: Session) -> None:
    session.ask(PROMPT, top_k=5)
    session.connected()
    assert [type(message) for message in sent(session)] == [Open]


def test_embeddings_leave_the_device_permuted(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    [append] = ask(session, cloud, [3])
    assert np.array_equal(append.embeddings[0], (3 + np.arange(HIDDEN) / 16)[KEY.residual])
    assert not np.array_equal(append.embeddings[0], 3 + np.arange(HIDDEN) / 16)


@pytest.mark.parametrize("in_a_frame", [1, 2, 3, 4, 9, 10, 11])
def test_a_long_prompt_goes_up_in_pieces_of_a_frame(session: Session, in_a_frame: int) -> None:
    cloud = HonestCloud(max_frame=1024 + in_a_frame * EMBEDDING)  # the cloud asserts that no frame is longer
    cloud.connect(session)
    appends = ask(session, cloud, PROMPT)
    assert [token for append in appends for token in ids_of(append)] == PROMPT
    assert len(appends) == -(-len(PROMPT) // in_a_frame)
    assert [append.rows for append in appends] == [0] * (len(appends) - 1) + [1]
    assert [append.keep for append in appends] == list(range(0, len(PROMPT), in_a_frame))


def test_pieces_are_sent_at_once_as_far_as_the_window_goes(session: Session) -> None:
    cloud = HonestCloud(max_frame=1024 + EMBEDDING, window=1500)  # the cloud asserts that the window is kept
    session.ask(PROMPT, top_k=5)
    cloud.connect(session)
    assert 2 <= cloud.waiting < len(PROMPT)
    cloud.settle(session)
    assert_right(session, PROMPT)


def test_a_window_of_one_frame_is_enough(session: Session) -> None:
    size = 1024 + EMBEDDING
    cloud = HonestCloud(max_frame=size, window=size)
    session.ask(PROMPT, top_k=5)
    cloud.connect(session)
    assert cloud.waiting == 1
    cloud.settle(session)
    assert_right(session, PROMPT)


@pytest.mark.parametrize(
    ("then", "keep", "appended"),
    [
        ([*PROMPT, 5], 10, [5]),  # decoding
        (PROMPT, 9, PROMPT[9:]),  # the same question: its last row once more
        (PROMPT[:6], 5, PROMPT[5:6]),  # an earlier place
        ([*PROMPT[:4], 7, 8], 4, [7, 8]),  # an edit in the middle
        ([1, *PROMPT[1:]], 0, [1, *PROMPT[1:]]),  # an edit at the start
        ([*PROMPT, 5, 6, 7], 10, [5, 6, 7]),
    ],
)
def test_only_what_the_cloud_lacks_is_sent(session: Session, then: list[int], keep: int, appended: list[int]) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    ask(session, cloud, PROMPT)
    appends = ask(session, cloud, then)
    assert appends[0].keep == keep
    assert [token for append in appends for token in ids_of(append)] == appended


def test_a_full_row_is_the_last_embedding_once_more(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    ask(session, cloud, PROMPT)
    [append] = ask(session, cloud, PROMPT, top_k=0)
    assert (append.keep, ids_of(append), append.top_k) == (9, [997], 0)


@pytest.mark.parametrize("in_a_frame", [3, 4, 7])
@pytest.mark.parametrize("rows", [2, 3])
def test_several_rows_come_from_one_append(session: Session, in_a_frame: int, rows: int) -> None:
    cloud = HonestCloud(max_frame=1024 + in_a_frame * EMBEDDING)
    cloud.connect(session)
    appends = ask(session, cloud, PROMPT, rows=rows)
    assert [append.rows for append in appends][-1] == rows
    appends = ask(session, cloud, [*PROMPT, 1, 2, 3], rows=rows)
    assert sum(len(append.embeddings) for append in appends) == 3
    appends = ask(session, cloud, [*PROMPT, 1, 2, 3], rows=rows)  # held already: the last rows again
    assert sum(len(append.embeddings) for append in appends) == rows


def test_rows_and_temperature_are_asked_for_as_given(session: Session) -> None:
    session.connected()
    session.receive(encode(opened()))
    sent(session)
    session.ask(PROMPT[:3], rows=2, top_k=17, temperature=0.5)
    [append] = sent(session)
    assert isinstance(append, Append)
    assert (append.rows, append.top_k, append.temperature, append.want) == (2, 17, 0.5, "logits")
    cloud = HonestCloud()
    rows = [plain_logits(PROMPT[:2]), plain_logits(PROMPT[:3])]
    session.receive(encode(logits(append, rows, 3)))
    assert session.rows is not None and cloud.waiting == 0
    scaled = rows[1].astype(float) / 0.5
    assert session.rows[1].log_sum_exp == pytest.approx(np.log(np.exp(scaled).sum()), rel=1e-6)
    assert session.rows[1].log_sum_exp_at_one == pytest.approx(np.logaddexp.reduce(rows[1].astype(float)), rel=1e-6)


def test_a_question_beyond_the_context_is_refused_before_anything_is_sent(session: Session) -> None:
    cloud = HonestCloud(context=9)
    cloud.connect(session)
    with pytest.raises(RefusedError, match="seen 10, wanted at most 9") as raised:
        session.ask(PROMPT, top_k=5)
    assert raised.value.code == "context_full"
    assert not session.outbox


def test_the_context_in_use_is_the_smaller_of_the_clouds_and_the_bundles() -> None:
    for said, used in ((7, 7), (9, 9), (10, 9), (10**9, 9)):
        session, cloud = Session(KEY, embed, served_name="tiny", context=9), HonestCloud(context=said)
        cloud.connect(session)
        assert session.opened is not None and session.opened.context == used
        with pytest.raises(RefusedError, match=f"seen {used + 1}, wanted at most {used}"):
            session.ask(PROMPT[: used + 1], top_k=5)
        assert not session.outbox
        session.ask(PROMPT[:used], top_k=5)
        assert session.outbox


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_embeddings_go_in_the_dtype_that_the_cloud_computes_in(session: Session, dtype: str) -> None:
    session.connected()
    session.receive(encode(opened(dtype=dtype)))
    sent(session)
    session.ask([3], top_k=5)
    [append] = sent(session)
    assert isinstance(append, Append) and append.embeddings.dtype.name == dtype


def test_counters_say_what_went_over_the_wire(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    ask(session, cloud, PROMPT)
    ask(session, cloud, [*PROMPT, 1])
    ask(session, cloud, [*PROMPT, 1], top_k=0)
    assert session.counters.vectors_up == len(PROMPT) + 2
    assert session.counters.round_trips == 3
    assert set(session.counters.work_ns) == {"embed", "hide", "encode", "decode", "reveal"}


# --- what it does when the connection is lost ---


def test_everything_is_replayed_on_a_new_connection(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    ask(session, cloud, PROMPT)
    session.ask([*PROMPT, 5], top_k=5)
    session.lost()
    before = len(cloud.appends)
    cloud.connect(session)
    cloud.settle(session)
    assert_right(session, [*PROMPT, 5])
    assert [token for append in cloud.appends[before:] for token in ids_of(append)] == [*PROMPT, 5]
    assert session.counters.replays == 1


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_a_prompt_that_was_cut_between_its_pieces_is_sent_from_its_start(session: Session, answered: int) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    session.ask(PROMPT, top_k=5)
    cloud.take(session)
    for _ in range(answered):
        cloud.step(session)
    session.lost()
    cloud.connect(session)
    cloud.settle(session)
    assert_right(session, PROMPT)


def test_a_connection_that_held_nothing_is_no_replay(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    session.lost()
    cloud.connect(session)
    ask(session, cloud, PROMPT)
    assert session.counters.replays == 0


def test_an_end_after_which_nothing_is_asked_is_no_replay(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    ask(session, cloud, PROMPT)
    session.lost()
    assert session.counters.replays == 0


# --- giving a question up ---


def test_cancel_tells_the_cloud_which_requests_to_drop(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    session.ask(PROMPT, top_k=5)
    seqs = [message.seq for message in sent(session) if isinstance(message, Append)]
    session.cancel()
    assert sent(session) == [Cancel(seq=seqs[0])]


def test_cancel_with_nothing_asked_says_nothing(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    session.cancel()
    ask(session, cloud, PROMPT)
    session.cancel()
    assert not session.outbox


def test_replies_to_a_question_that_was_given_up_are_ignored(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    session.ask(PROMPT, top_k=5)
    cloud.take(session)
    reply = cloud.reply()  # on its way when the question is given up
    session.cancel()
    session.ask([*PROMPT[:2], 7], top_k=5)
    session.receive(encode(reply))
    assert session.rows is None
    cloud.settle(session)
    assert_right(session, [*PROMPT[:2], 7])


def test_what_was_cancelled_is_not_taken_for_held(session: Session) -> None:
    # PROTOCOL.md, section 5, item 9: the last request succeeds in the cloud, on other content than it was meant for.
    cloud = HonestCloud()
    cloud.connect(session)
    ask(session, cloud, [1, 2, 3, 4])
    session.ask([1, 9, 9, 9], top_k=5)
    cloud.take(session)
    session.cancel()
    session.ask([1, 9, 9, 8], top_k=5)
    cloud.settle(session)
    assert cloud.cache == [1, 9, 9, 8]
    assert_right(session, [1, 9, 9, 8])


def test_a_piece_that_failed_is_sent_again_with_those_behind_it(session: Session) -> None:
    cloud = HonestCloud(max_frame=1024 + 2 * EMBEDDING)
    cloud.connect(session)
    ask(session, cloud, [1, 2, 3, 4, 5, 6, 7, 8])
    cloud.failures = ["window_exceeded"]
    ask(session, cloud, [1, 20, 30, 40, 50, 60])
    assert cloud.cache == [1, 20, 30, 40, 50, 60]


def test_a_cloud_that_carries_out_what_rests_on_a_failure_is_refused(session: Session) -> None:
    cloud = HonestCloud(max_frame=1024 + 2 * EMBEDDING)
    cloud.connect(session)
    session.ask(PROMPT[:4], top_k=5)
    cloud.take(session)
    first, second = cloud.appends
    session.receive(encode(Error(code="window_exceeded", message="", seq=first.seq)))
    with pytest.raises(DishonestError, match="behind an Error"):
        session.receive(encode(logits(second, [plain_logits([1])], 4)))


commands = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 12), st.lists(st.integers(1, 2), min_size=1, max_size=5)),
    st.tuples(st.just("cancel")),
    st.tuples(st.just("answer")),
    st.tuples(st.just("answer")),
    st.tuples(st.just("lose")),
    st.tuples(st.just("cut"), st.integers(0, 4)),
    st.tuples(st.just("forget"), st.integers(0, 12)),
    st.tuples(st.just("fail"), st.sampled_from(["window_exceeded", "cancelled"])),
)


@settings(max_examples=examples(600), deadline=None)
@given(st.lists(commands, max_size=30), st.integers(1, 3), st.integers(1, 4))
def test_the_rows_are_of_the_ids_asked_about_whatever_happens(
    steps: list[tuple[object, ...]], in_a_frame: int, frames_in_window: int
) -> None:
    size = 1024 + in_a_frame * EMBEDDING
    cloud, session = HonestCloud(max_frame=size, window=frames_in_window * size), new_session()
    cloud.connect(session)
    ids: list[int] = [1]
    asked = False
    for name, *values in [*steps, ("ask", 12, [1])]:
        if name == "ask":
            keep, new = values
            ids = ids[:keep] + new  # type: ignore[misc, operator]
            session.ask(ids, top_k=5)
            asked = True
        elif name == "cancel":
            session.cancel()
            asked = False
        elif name == "answer" and cloud.waiting:
            cloud.step(session)
        elif name == "lose":
            session.lost()
            cloud.connect(session)
        elif name == "cut":
            cloud.cut(session, values[0])  # type: ignore[arg-type]
        elif name == "forget":
            cloud.forget(values[0])  # type: ignore[arg-type]
        elif name == "fail" and not cloud.failures:
            cloud.failures = [values[0]]  # type: ignore[list-item]
        cloud.take(session)
        if session.rows is not None:
            assert asked
            assert_right(session, ids)
    cloud.settle(session)
    assert_right(session, ids)


# --- a cloud that loses its place ---


def test_out_of_step_makes_the_session_send_what_is_missing(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    ask(session, cloud, PROMPT)
    cloud.forget(3)
    appends = ask(session, cloud, [*PROMPT, 5])
    assert [append.keep for append in appends] == [10, 3, 7]
    assert [token for append in appends[1:] for token in ids_of(append)] == [*PROMPT[3:], 5]


@pytest.mark.parametrize("code", ["out_of_step", "window_exceeded", "cancelled"])
def test_a_cloud_that_loses_its_place_again_and_again_is_given_up(session: Session, code: ErrorCode) -> None:
    session.connected()
    session.receive(encode(opened()))
    session.ask(PROMPT, top_k=5)
    answered = 0
    with pytest.raises(DishonestError, match="lost its place"):
        while answered < 1000:
            appends = [message for message in sent(session) if isinstance(message, Append)]
            assert appends
            for append in appends:
                answered += 1
                session.receive(encode(Error(code=code, message="", seq=append.seq, kv_length=0)))
    assert MOST_REPLANS < answered <= 3 * (MOST_REPLANS + 1)


# --- a cloud that lies ---


def asked_cloud(session: Session, **options: float) -> tuple[HonestCloud, Append]:
    """A session that waits for one answer, to the second Append it made."""
    cloud = HonestCloud()
    cloud.connect(session)
    ask(session, cloud, PROMPT)
    session.ask([*PROMPT, 5], **{"top_k": 5} | options)  # type: ignore[arg-type]
    cloud.take(session)
    return cloud, cloud.appends[-1]


def tensors(message: Logits, **changed: Array) -> Logits:
    names = ("values", "ids", "log_sum_exp")
    return change(message, tensors=tuple(changed.get(name, getattr(message, name)) for name in names))


def change(message: Logits, **fields: object) -> Logits:
    kept = {name: getattr(message, name) for name in message.__struct_fields__}
    return Logits(**kept | fields)  # type: ignore[arg-type]


def with_item(array: Array, at: tuple[int, ...], value: float) -> Array:
    changed = array.copy()
    changed[at] = value
    return changed


LIES: dict[str, Callable[[Logits], Message]] = {
    "an id out of range": lambda honest: tensors(honest, ids=with_item(honest.ids, (0, 2), VOCAB)),
    "the largest id": lambda honest: tensors(honest, ids=with_item(honest.ids, (0, 4), 2**32 - 1)),
    "an id twice": lambda honest: tensors(honest, ids=with_item(honest.ids, (0, 1), honest.ids[0, 0])),
    "NaN": lambda honest: tensors(honest, values=with_item(honest.values, (0, 3), np.nan)),
    "infinity": lambda honest: tensors(honest, values=with_item(honest.values, (0, 0), np.inf)),
    "minus infinity": lambda honest: tensors(honest, values=with_item(honest.values, (0, 4), -np.inf)),
    "values that are not sorted": lambda honest: tensors(
        honest, values=honest.values[:, ::-1].copy(), ids=honest.ids[:, ::-1].copy()
    ),
    "values of another dtype": lambda honest: tensors(honest, values=honest.values.astype(np.float16)),
    "NaN as log-sum-exp": lambda honest: tensors(honest, log_sum_exp=with_item(honest.log_sum_exp, (0, 0), np.nan)),
    "an infinite log-sum-exp": lambda honest: tensors(
        honest, log_sum_exp=with_item(honest.log_sum_exp, (0, 1), np.inf)
    ),
    "a log-sum-exp below the values": lambda honest: tensors(honest, log_sum_exp=honest.log_sum_exp - 5),
    "a log-sum-exp above what is unseen": lambda honest: tensors(honest, log_sum_exp=honest.log_sum_exp + 9),
    "the largest log-sum-exp": lambda honest: tensors(
        honest, log_sum_exp=np.full_like(honest.log_sum_exp, np.finfo(np.float32).max)
    ),
    "no row": lambda honest: logits(Append(seq=honest.seq, keep=0, rows=0, tensors=()), [], honest.kv_length),
    "a row too many": lambda honest: tensors(
        honest, **{name: np.repeat(getattr(honest, name), 2, 0) for name in ("values", "ids", "log_sum_exp")}
    ),
    "a value too few": lambda honest: tensors(honest, values=honest.values[:, :4].copy(), ids=honest.ids[:, :4].copy()),
    "no ids": lambda honest: tensors(honest, ids=honest.ids[:, :0].copy()),
    "a full row that was not asked for": lambda honest: logits(
        Append(seq=honest.seq, keep=0, top_k=0, tensors=()), [plain_logits([1])], honest.kv_length
    ),
    "another KV length": lambda honest: change(honest, kv_length=honest.kv_length + 1),
    "a KV length of 0": lambda honest: change(honest, kv_length=0),
    "an earlier seq": lambda honest: change(honest, seq=honest.seq - 1),
    "a later seq": lambda honest: change(honest, seq=honest.seq + 1),
    "an error of another seq": lambda honest: Error(code="internal", message="", seq=honest.seq + 7),
    "hidden states": lambda honest: Hidden(
        seq=honest.seq, kv_length=honest.kv_length, tensors=(np.zeros((1, HIDDEN), np.float32),)
    ),
    "Encoded": lambda honest: Encoded(
        seq=honest.seq, kv_length=honest.kv_length, tensors=(np.zeros((1, HIDDEN), np.float32),)
    ),
    "Opened once more": lambda honest: opened(),
    "Open": lambda honest: Open(model="tiny", key_id=KEY.key_id),
    "Append": lambda honest: Append(seq=honest.seq, keep=0, tensors=(np.zeros((1, HIDDEN), np.float32),)),
    "Encode": lambda honest: Encode(seq=honest.seq, lengths=(1,), tensors=(np.zeros((1, HIDDEN), np.float32),)),
    "Cancel": lambda honest: Cancel(seq=honest.seq),
}


def assert_says_nothing_of_the_prompt(text: str) -> None:
    numbers = {int(number) for number in re.findall(r"\d+", text)}
    assert not numbers & set(PROMPT), "the error names an id of the prompt"
    assert text.isprintable()


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_cannot_be_true_is_refused(session: Session, lie: str) -> None:
    cloud, _ = asked_cloud(session)
    honest = cloud.reply()
    assert isinstance(honest, Logits)
    with pytest.raises(DishonestError) as raised:
        session.receive(encode(LIES[lie](honest)))
    assert session.rows is None
    assert_says_nothing_of_the_prompt(str(raised.value))


@pytest.mark.parametrize("lie", [-1e30, -30.0, 30.0, 1e30])
def test_a_log_sum_exp_that_fits_at_temperature_1_alone_is_refused(session: Session, lie: float) -> None:
    cloud, _ = asked_cloud(session, temperature=0.5)
    honest = cloud.reply()
    assert isinstance(honest, Logits)
    with pytest.raises(DishonestError, match="log-sum-exp"):
        session.receive(encode(tensors(honest, log_sum_exp=with_item(honest.log_sum_exp, (0, 1), lie))))


@pytest.mark.parametrize("lie", [-1e30, -30.0, 30.0, 1e30])
def test_a_log_sum_exp_at_1_that_does_not_fit_is_refused_at_every_temperature(session: Session, lie: float) -> None:
    # Log-probabilities are told by it.
    cloud, _ = asked_cloud(session, temperature=0.5)
    honest = cloud.reply()
    assert isinstance(honest, Logits)
    with pytest.raises(DishonestError, match="log-sum-exp"):
        session.receive(encode(tensors(honest, log_sum_exp=with_item(honest.log_sum_exp, (0, 0), lie))))


@pytest.mark.parametrize("lie", [-1e30, -30.0, 30.0, 1e30])
def test_at_temperature_1_no_unchecked_log_sum_exp_is_used(session: Session, lie: float) -> None:
    cloud, _ = asked_cloud(session)
    honest = cloud.reply()
    assert isinstance(honest, Logits)
    with suppress(DishonestError):
        session.receive(encode(tensors(honest, log_sum_exp=with_item(honest.log_sum_exp, (0, 1), lie))))
    assert session.rows is None or session.rows[0].log_sum_exp == honest.log_sum_exp[0, 0]


@pytest.mark.parametrize("lie", ["NaN", "a log-sum-exp below the values", "a row too many", "ids"])
def test_a_full_row_that_cannot_be_true_is_refused(session: Session, lie: str) -> None:
    cloud, _ = asked_cloud(session, top_k=0)
    honest = cloud.reply()
    assert isinstance(honest, Logits)
    every_id = tensors(honest, ids=np.arange(VOCAB, dtype=np.uint32)[None])
    with pytest.raises(DishonestError):
        session.receive(encode(every_id if lie == "ids" else LIES[lie](honest)))
    assert session.rows is None


def test_rows_of_a_piece_that_asked_for_none_are_refused(session: Session) -> None:
    cloud = HonestCloud()
    cloud.connect(session)
    session.ask(PROMPT, top_k=5)
    cloud.take(session)
    first = cloud.appends[0]
    cloud.reply()
    with pytest.raises(DishonestError, match="wanted 0"):
        session.receive(encode(logits(first, [plain_logits([1])], 4)))


@settings(max_examples=examples(300), deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    session = new_session()
    cloud, _ = asked_cloud(session)
    with pytest.raises(DishonestError) as raised:
        session.receive(garbage)
    assert_says_nothing_of_the_prompt(str(raised.value))
    assert cloud.waiting == 1


@settings(max_examples=examples(400), deadline=None)
@given(st.data())
def test_an_answer_with_a_changed_bit_is_refused_or_an_answer(data: st.DataObject) -> None:
    session = new_session()
    cloud, _ = asked_cloud(session)
    frame = bytearray(encode(cloud.reply()))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    try:
        session.receive(bytes(frame))
    except DishonestError:
        assert session.rows is None
    else:
        assert_possible(session.rows)


def assert_possible(rows: list[Row] | None) -> None:
    assert rows is not None and len(rows) == 1
    assert np.isfinite(rows[0].values).all() and np.unique(rows[0].ids).size == 5
    assert rows[0].ids.min() >= 0 and rows[0].ids.max() < VOCAB


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": HIDDEN + 1},
        {"hidden_size": 0},
        {"vocab_size": VOCAB - 1},
        {"vocab_size": 2**32 - 1},
        {"kv_length": 3},
        {"max_frame": 0},
        {"max_frame": 1024},
    ],
    ids=str,
)
def test_an_opened_that_does_not_fit_is_refused(session: Session, fields: dict[str, int]) -> None:
    session.ask(PROMPT, top_k=5)
    session.connected()
    with pytest.raises(DishonestError, match=r"^Opened: "):
        session.receive(encode(opened(**fields)))
    assert [type(message) for message in sent(session)] == [Open]


def test_a_cloud_that_allows_nothing_in_flight_is_asked_one_piece_at_a_time(session: Session) -> None:
    session.ask(PROMPT, top_k=5)
    session.connected()
    session.receive(encode(opened(window=0)))
    assert [type(message) for message in sent(session)] == [Open, Append]


@pytest.mark.parametrize("before_opened", [True, False])
def test_an_answer_to_nothing_is_refused(session: Session, before_opened: bool) -> None:
    session.connected()
    if not before_opened:
        session.receive(encode(opened()))
    append = Append(seq=0, keep=0, top_k=5, tensors=(np.zeros((1, HIDDEN), np.float32),))
    with pytest.raises(DishonestError, match="nothing was asked"):
        session.receive(encode(logits(append, [plain_logits([1])], 1)))


# --- a cloud that refuses ---


@pytest.mark.parametrize("code", ["unauthorized", "unknown_model", "wrong_key"])
def test_a_session_that_is_refused_says_what_to_do(session: Session, code: ErrorCode) -> None:
    session.ask(PROMPT, top_k=5)
    session.connected()
    with pytest.raises(RefusedError, match=f"{code}: because") as raised:
        session.receive(encode(Error(code=code, message="because")))
    assert raised.value.code == code
    assert raised.value.hint


@pytest.mark.parametrize("code", ["bad_request", "context_full", "too_large", "not_finite", "unsupported", "internal"])
def test_a_request_that_is_refused_ends_the_question(session: Session, code: ErrorCode) -> None:
    _, append = asked_cloud(session)
    with pytest.raises(RefusedError, match=f"{code}: because") as raised:
        session.receive(encode(Error(code=code, message="because", seq=append.seq, kv_length=10)))
    assert raised.value.code == code
    assert (raised.value.hint is not None) == (code == "context_full")
    assert session.rows is None


def test_after_a_refusal_the_next_question_is_answered_rightly(session: Session) -> None:
    cloud, append = asked_cloud(session)
    cloud.reply()
    cloud.cache = list(PROMPT)
    with pytest.raises(RefusedError):
        session.receive(encode(Error(code="internal", message="", seq=append.seq, kv_length=10)))
    ask(session, cloud, [*PROMPT, 6])


@pytest.mark.parametrize("code", ["shutting_down", "idle", "too_many_sessions"])
def test_an_end_that_another_connection_can_mend_is_no_failure(session: Session, code: ErrorCode) -> None:
    cloud, _ = asked_cloud(session)
    session.receive(encode(Error(code=code, message="", retryable=True)))
    session.lost()
    cloud.connect(session)
    cloud.settle(session)
    assert_right(session, [*PROMPT, 5])


@pytest.mark.parametrize("of_the_session", [True, False])
def test_the_text_of_a_refusal_holds_no_control_characters(session: Session, of_the_session: bool) -> None:
    _, append = asked_cloud(session)
    text = "a\x1b[31mb\x9b2Jc\r\n\x07d\x7fe\u202ef" + "x" * 2000
    seq = None if of_the_session else append.seq
    with pytest.raises(RefusedError) as raised:
        session.receive(encode(Error(code="unsupported", message=text, seq=seq)))
    assert str(raised.value).isprintable()
    assert "a[31mb2Jcdef" in str(raised.value)
    assert len(str(raised.value)) < 500


def test_an_opened_that_is_honest_is_kept(session: Session) -> None:
    session.connected()
    said = opened(context=77)
    session.receive(encode(said))
    assert isinstance(session.opened, Opened) and session.opened == said


# --- the classifier on the device ---


@pytest.fixture
def classifying() -> Session:
    return classifying_session()


def classified_cloud(session: Session, **options: float) -> HonestCloud:
    """A cloud without a classifier that was asked about the prompt and has not answered."""
    cloud = HonestCloud(vocab_size=0, max_frame=1 << 20)
    cloud.connect(session)
    session.ask(PROMPT, **{"top_k": 5} | options)  # type: ignore[arg-type]
    cloud.take(session)
    return cloud


def test_hidden_states_are_asked_for_and_how_tokens_are_chosen_is_not_told(classifying: Session) -> None:
    cloud = classified_cloud(classifying, top_k=17, temperature=0.5)
    [append] = cloud.appends
    assert (append.want, append.rows) == ("hidden", 1)
    assert append == Append(seq=0, keep=0, want="hidden", tensors=append.tensors)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7, 0.01])
@pytest.mark.parametrize("rows", [1, 3])
def test_hidden_states_become_full_rows(classifying: Session, rows: int, temperature: float) -> None:
    cloud = classified_cloud(classifying, rows=rows, temperature=temperature)
    cloud.settle(classifying)
    assert classifying.rows is not None and len(classifying.rows) == rows
    for back, row in enumerate(reversed(classifying.rows)):
        expected = classify(plain_hidden(PROMPT[: len(PROMPT) - back])[None])[0]
        np.testing.assert_allclose(row.values, expected, rtol=1e-5, atol=1e-5)
        assert row.full and row.ids.tolist() == list(range(VOCAB)) and row.values.dtype == np.float32
        scaled = row.values.astype(float) / temperature
        assert row.log_sum_exp == pytest.approx(np.logaddexp.reduce(scaled), rel=1e-6)
        assert row.log_sum_exp_at_one == pytest.approx(np.logaddexp.reduce(row.values.astype(float)), rel=1e-6)


def test_hidden_states_are_revealed_by_a_matrix_too() -> None:
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(HIDDEN, HIDDEN)))[0].astype(np.float32)
    key = UserKey("k", basis, None)
    session = Session(key, embed, classify, served_name="tiny", context=BUNDLE_CONTEXT)
    session.connected()
    session.receive(encode(opened(vocab_size=0)))
    session.ask([3], top_k=5)
    plain = plain_hidden([3])[None]
    session.receive(encode(Hidden(seq=0, kv_length=1, tensors=(key.hide(plain),))))
    assert session.rows is not None
    np.testing.assert_allclose(session.rows[0].values, classify(plain)[0], rtol=1e-4, atol=1e-4)


def test_a_long_prompt_is_acknowledged_by_empty_hidden_states(classifying: Session) -> None:
    cloud = HonestCloud(vocab_size=0)
    cloud.connect(classifying)
    classifying.ask(PROMPT, top_k=5)
    cloud.settle(classifying)
    assert [append.rows for append in cloud.appends] == [0, 0, 1]
    assert {append.want for append in cloud.appends} == {"hidden"}


def test_hidden_states_of_a_piece_that_asked_for_none_are_refused(classifying: Session) -> None:
    cloud = HonestCloud(vocab_size=0)
    cloud.connect(classifying)
    classifying.ask(PROMPT, top_k=5)
    cloud.take(classifying)
    with pytest.raises(DishonestError, match="seen 1, wanted 0"):
        classifying.receive(encode(hidden(cloud.appends[0], [plain_hidden([1])], 4)))


def test_the_time_that_the_classifier_takes_is_counted(classifying: Session) -> None:
    classified_cloud(classifying).settle(classifying)
    assert set(classifying.counters.work_ns) == {"embed", "hide", "encode", "decode", "reveal", "classify"}


def test_a_cloud_that_has_a_classifier_though_the_key_reveals_no_logits_is_refused(classifying: Session) -> None:
    classifying.connected()
    with pytest.raises(DishonestError, match=r"^Opened: "):
        classifying.receive(encode(opened()))


def test_a_cloud_without_a_classifier_is_refused_by_a_key_that_reveals_logits(session: Session) -> None:
    session.connected()
    with pytest.raises(DishonestError, match=r"^Opened: "):
        session.receive(encode(opened(vocab_size=0)))


def changed(honest: Hidden, **fields: object) -> Hidden:
    kept = {name: getattr(honest, name) for name in honest.__struct_fields__}
    return Hidden(**kept | fields)  # type: ignore[arg-type]


HIDDEN_LIES: dict[str, Callable[[Hidden], Message]] = {
    "NaN": lambda honest: changed(honest, tensors=(with_item(honest.hidden, (0, 3), np.nan),)),
    "infinity": lambda honest: changed(honest, tensors=(with_item(honest.hidden, (0, 0), np.inf),)),
    "logits past the range of a float": lambda honest: changed(
        honest, tensors=(np.full_like(honest.hidden, np.finfo(np.float32).max),)
    ),
    "another dtype": lambda honest: changed(honest, tensors=(honest.hidden.astype(np.float16),)),
    "no row": lambda honest: changed(honest, tensors=(honest.hidden[:0],)),
    "a row too many": lambda honest: changed(honest, tensors=(honest.hidden.repeat(2, 0),)),
    "a feature too few": lambda honest: changed(honest, tensors=(honest.hidden[:, 1:].copy(),)),
    "a feature too many": lambda honest: changed(honest, tensors=(np.pad(honest.hidden, ((0, 0), (0, 1))),)),
    "another KV length": lambda honest: changed(honest, kv_length=honest.kv_length + 1),
    "a later seq": lambda honest: changed(honest, seq=honest.seq + 1),
    "logits": lambda honest: logits(
        Append(seq=honest.seq, keep=0, top_k=5, tensors=()), [plain_logits(PROMPT)], honest.kv_length
    ),
    "Encoded": lambda honest: Encoded(seq=honest.seq, kv_length=honest.kv_length, tensors=(honest.hidden,)),
}


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
@pytest.mark.parametrize("lie", HIDDEN_LIES)
def test_hidden_states_that_cannot_be_a_models_are_refused(classifying: Session, lie: str) -> None:
    honest = classified_cloud(classifying).reply()
    assert isinstance(honest, Hidden)
    with pytest.raises(DishonestError) as raised:
        classifying.receive(encode(HIDDEN_LIES[lie](honest)))
    assert classifying.rows is None
    assert_says_nothing_of_the_prompt(str(raised.value))
