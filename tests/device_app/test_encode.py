"""The session of an encoder, without sockets: what it sends, what it makes of replies, and which it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_app import encode as module
from device_app.encode import EncoderSession, Want
from device_app.opening import MOST_REPLANS
from shared.errors import DishonestError, RefusedError
from shared.key import UserKey
from shared.wire import (
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
    decode,
    encode,
)
from tests.device_app.bundles import CLASSES, CONTEXT
from tests.device_app.honest_cloud import EMBEDDING, HIDDEN, embed, opened
from tests.device_app.honest_encoder import COUNT, HonestEncoder, plain_result
from tests.thorough import examples

WANTS: list[Want] = ["hidden", "pooled", "logits"]
SEQUENCES = [embed([1, 2, 3]), embed([4]), embed([5, 6])]


def new_session(key: UserKey = CLASSES) -> EncoderSession:
    return EncoderSession(key, served_name="tiny", context=CONTEXT)


def asked(sequences: Sequence[Array], want: Want, cloud: HonestEncoder | None = None) -> list[Encode]:
    """Asks, checks the results, and gives the requests that took."""
    cloud, session = cloud or HonestEncoder(), new_session()
    cloud.connect(session)
    session.ask(sequences, want)
    cloud.settle(session)
    assert_right(session, sequences, want)
    return cloud.encodes


def assert_right(session: EncoderSession, sequences: Sequence[Array], want: Want) -> None:
    assert session.results is not None and len(session.results) == len(sequences)
    for result, sequence in zip(session.results, sequences, strict=True):
        assert np.array_equal(result, plain_result(sequence, want))
        assert result.dtype == np.float32


@pytest.mark.parametrize("want", WANTS)
def test_sequences_go_up_together_and_each_has_its_own_result(want: Want) -> None:
    [request] = asked(SEQUENCES, want)
    assert (request.lengths, request.want) == ((3, 1, 2), want)


def test_embeddings_leave_the_device_permuted() -> None:
    [request] = asked([embed([3])], "hidden")
    assert np.array_equal(request.embeddings, embed([3])[:, CLASSES.residual])
    assert not np.array_equal(request.embeddings, embed([3]))


@pytest.mark.parametrize("in_a_frame", [3, 4, 5, 6])
def test_requests_fit_a_frame(in_a_frame: int) -> None:
    cloud = HonestEncoder(max_frame=1024 + in_a_frame * EMBEDDING + 15)  # the cloud asserts that none is longer
    requests = asked(SEQUENCES, "hidden", cloud)
    assert [request.lengths for request in requests] == {
        3: [(3,), (1, 2)],
        4: [(3, 1), (2,)],
        5: [(3, 1), (2,)],
        6: [(3, 1, 2)],
    }[in_a_frame]


def test_requests_are_sent_at_once_as_far_as_the_window_goes() -> None:
    size = 1024 + 3 * EMBEDDING
    for frames, expected in ((1, 1), (2, 2), (9, 5)):
        cloud, session = HonestEncoder(max_frame=size, window=frames * size), new_session()
        cloud.connect(session)
        session.ask([embed([1, 2, 3])] * 5, "pooled")
        cloud.take(session)
        assert (cloud.waiting >= expected) if frames < 9 else (cloud.waiting == expected)
        cloud.settle(session)


@pytest.mark.parametrize("room", [40, 1000, 5000])
def test_the_lengths_of_many_short_sequences_fit_the_frame_too(room: int) -> None:
    # The cloud asserts that no frame is longer than this, nor more in flight than two of them.
    size = 1024 + room * EMBEDDING
    cloud = HonestEncoder(max_frame=size, window=2 * size, dtype="float16")
    session = new_session()
    cloud.connect(session)
    session.ask([embed([at % 9]) for at in range(9000)], "pooled")
    cloud.settle(session)
    assert sum(len(request.lengths) for request in cloud.encodes) == 9000
    assert max(len(request.embeddings) for request in cloud.encodes) <= module.MOST_VECTORS


@pytest.mark.parametrize("want", WANTS)
def test_a_reply_is_never_longer_than_the_socket_takes(want: Want, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_VECTORS", 20)
    monkeypatch.setattr("device_app.opening.REPLY_HEADER", 0)
    sequences = [embed(range(1, 2 + at % CONTEXT)) for at in range(200)]
    session, cloud = new_session(), HonestEncoder()
    cloud.connect(session)
    session.ask(sequences, want)
    cloud.take(session)
    longest = 0
    while cloud.waiting:
        reply = encode(cloud.reply())
        longest = max(longest, len(reply))
        session.receive(reply)
        cloud.take(session)
    assert_right(session, sequences, want)
    assert longest - 200 < session.longest_reply - 2**16 <= 4 * 20 * HIDDEN


def test_a_class_count_beyond_all_bounds_is_asked_about_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_VECTORS", 1)
    key = UserKey("k", CLASSES.residual, np.random.default_rng(0).permutation(5000))
    session = EncoderSession(key, served_name="tiny", context=1)
    session.connected()
    session.receive(encode(opened(vocab_size=5000)))
    session.outbox.clear()
    session.ask([embed([1]), embed([2])], "logits")
    assert [decode(frame).lengths for frame in session.outbox] == [(1,), (1,)]  # type: ignore[union-attr]
    assert session.longest_reply >= 4 * 5000


@pytest.mark.parametrize(
    ("want", "dtype", "lengths"),
    [("logits", "float32", [3, 3, 2]), ("logits", "float16", [7, 1]), ("pooled", "float32", [8])],
)
def test_the_class_logits_of_a_request_fit_a_frame_too(want: Want, dtype: str, lengths: list[int]) -> None:
    classes = 512
    key = UserKey("k", CLASSES.residual, np.random.default_rng(0).permutation(classes))
    session = EncoderSession(key, served_name="tiny", context=CONTEXT)
    session.connected()
    session.receive(encode(opened(vocab_size=classes, max_frame=15 * classes, dtype=dtype)))
    session.outbox.clear()
    session.ask([embed([at]) for at in range(8)], want)
    assert [len(decode(frame).lengths) for frame in session.outbox] == lengths  # type: ignore[union-attr]


def test_the_context_in_use_is_the_smaller_of_the_clouds_and_the_bundles() -> None:
    for said, used in ((5, 5), (CONTEXT, CONTEXT), (10**9, CONTEXT)):
        cloud, session = HonestEncoder(context=said), new_session()
        cloud.connect(session)
        with pytest.raises(RefusedError, match=f"it takes {used + 1} positions, wanted at most {used}"):
            session.ask([embed(range(used + 1))], "hidden")
        assert not session.outbox and session.longest_sequence == used


@pytest.mark.parametrize(("dtype", "longest"), [("float32", 3), ("float16", 7)])
def test_the_longest_sequence_fits_a_frame(dtype: str, longest: int) -> None:
    cloud, session = HonestEncoder(max_frame=1024 + 4 * EMBEDDING - 2 * HIDDEN, dtype=dtype), new_session()
    cloud.connect(session)
    assert session.longest_sequence == longest
    session.ask([embed(range(longest))], "pooled")
    cloud.settle(session)
    with pytest.raises(RefusedError) as raised:
        session.ask([embed(range(longest + 1))], "pooled")
    assert raised.value.code == "too_large"
    assert raised.value.hint and "stip-cloud serve --max-frame " in raised.value.hint
    enough = int(raised.value.hint.split()[-1])
    cloud, session = HonestEncoder(max_frame=enough, dtype=dtype), new_session()
    cloud.connect(session)
    session.ask([embed(range(longest + 1))], "pooled")
    cloud.settle(session)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_come_in_the_dtype_that_the_cloud_computes_in(dtype: str) -> None:
    cloud, session = HonestEncoder(dtype=dtype), new_session()
    cloud.connect(session)
    session.ask(SEQUENCES, "hidden")
    cloud.settle(session)
    assert session.results is not None
    for result, sequence in zip(session.results, SEQUENCES, strict=True):
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, plain_result(sequence, "hidden"), rtol=0.1, atol=0.3)


def test_a_sequence_that_does_not_fit_is_refused_before_anything_is_sent() -> None:
    for fields, sequence, code in (
        ({}, embed(range(CONTEXT + 1)), "context_full"),
        ({"max_frame": 1024 + 3 * EMBEDDING}, embed(range(4)), "too_large"),
    ):
        cloud, session = HonestEncoder(**fields), new_session()
        cloud.connect(session)
        with pytest.raises(RefusedError) as raised:
            session.ask([embed([1]), sequence], "hidden")
        assert raised.value.code == code
        assert not session.outbox


def test_counters_say_what_went_over_the_wire() -> None:
    cloud, session = HonestEncoder(max_frame=1024 + 3 * EMBEDDING + 10), new_session()
    cloud.connect(session)
    session.ask(SEQUENCES, "hidden")
    cloud.settle(session)
    assert (session.counters.vectors_up, session.counters.round_trips, session.counters.compute_us) == (6, 2, 6)
    assert set(session.counters.work_ns) == {"hide", "encode", "decode", "reveal"}


# --- losses and failures ---


def test_what_was_answered_is_not_asked_again_after_a_lost_connection() -> None:
    cloud, session = HonestEncoder(max_frame=1024 + 3 * EMBEDDING + 10), new_session()
    cloud.connect(session)
    session.ask(SEQUENCES, "hidden")
    cloud.take(session)
    cloud.step(session)
    session.lost()
    before = len(cloud.encodes)
    cloud.connect(session)
    cloud.settle(session)
    assert_right(session, SEQUENCES, "hidden")
    assert [request.lengths for request in cloud.encodes[before:]] == [(1, 2)]
    assert session.counters.replays == 1


def test_an_encoders_session_is_not_resumed_as_it_holds_nothing() -> None:
    cloud, session = HonestEncoder(), new_session()
    cloud.connect(session)
    session.ask(SEQUENCES, "hidden")
    cloud.take(session)
    session.lost()
    session.connected()
    assert decode(session.outbox.popleft()) == Open(model="tiny", key_id=CLASSES.key_id)
    with pytest.raises(DishonestError, match="KV length of 1, wanted at most 0"):
        session.receive(encode(HonestEncoder(kv_length=1).opened))


def test_failures_do_not_end_a_question_of_which_more_is_done_each_time() -> None:
    size = 1024 + 3 * EMBEDDING + 10
    cloud, session = HonestEncoder(max_frame=size, window=size), new_session()
    cloud.connect(session)
    sequences = [embed([number] * 3) for number in range(3 * MOST_REPLANS)]
    session.ask(sequences, "hidden")
    cloud.take(session)
    for _ in sequences:
        cloud.failures = ["window_exceeded"]
        cloud.step(session)
        cloud.step(session)
    assert_right(session, sequences, "hidden")


@pytest.mark.parametrize("code", ["window_exceeded", "cancelled", "out_of_step"])
def test_a_cloud_that_loses_its_place_again_and_again_is_given_up(code: ErrorCode) -> None:
    cloud, session = HonestEncoder(), new_session()
    cloud.connect(session)
    cloud.failures = [code] * 100
    with pytest.raises(DishonestError, match="lost its place"):
        session.ask(SEQUENCES, "hidden")
        cloud.settle(session)
    assert len(cloud.encodes) == MOST_REPLANS + 1


@pytest.mark.parametrize("code", ["bad_request", "context_full", "too_large", "not_finite", "unsupported", "internal"])
def test_a_refusal_ends_the_question_and_the_next_one_is_answered(code: ErrorCode) -> None:
    cloud, session = HonestEncoder(max_frame=1024 + 3 * EMBEDDING), new_session()
    cloud.connect(session)
    cloud.failures = [code]
    session.ask(SEQUENCES, "hidden")
    with pytest.raises(RefusedError, match=f"{code}: because"):
        cloud.settle(session)
    session.ask(SEQUENCES[::-1], "pooled")
    cloud.settle(session)
    assert_right(session, SEQUENCES[::-1], "pooled")


def test_cancel_tells_the_cloud_and_late_answers_are_ignored() -> None:
    cloud, session = HonestEncoder(), new_session()
    cloud.connect(session)
    session.ask(SEQUENCES, "hidden")
    cloud.take(session)
    late = cloud.reply()
    session.cancel()
    assert [decode(frame) for frame in session.outbox] == [Cancel(seq=0)]
    session.ask([embed([9])], "pooled")
    session.receive(encode(late))
    assert session.results is None
    cloud.settle(session)
    assert_right(session, [embed([9])], "pooled")


commands = st.one_of(
    st.tuples(
        st.just("ask"),
        st.sampled_from(WANTS),
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1),
    ),
    st.tuples(st.just("cancel")),
    st.tuples(st.just("answer")),
    st.tuples(st.just("answer")),
    st.tuples(st.just("lose")),
    st.tuples(st.just("fail"), st.sampled_from(["window_exceeded", "cancelled"])),
)


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(commands, max_size=20), st.integers(3, 6), st.integers(1, 4))
def test_the_results_are_of_what_was_asked_about_whatever_happens(
    steps: list[tuple[object, ...]], in_a_frame: int, frames_in_window: int
) -> None:
    size = 1024 + in_a_frame * EMBEDDING
    cloud, session = HonestEncoder(max_frame=size, window=frames_in_window * size), new_session()
    cloud.connect(session)
    sequences: list[Array] = []
    want: Want = "hidden"
    for name, *values in [*steps, ("ask", "hidden", [[1, 2, 3], [4], [5, 6]])]:
        if name == "ask":
            want = values[0]  # type: ignore[assignment]
            sequences = [embed(ids) for ids in values[1]]  # type: ignore[attr-defined]
            session.ask(sequences, want)
        elif name == "cancel":
            session.cancel()
        elif name == "answer" and cloud.waiting:
            cloud.step(session)
        elif name == "lose":
            session.lost()
            cloud.connect(session)
        elif name == "fail" and not cloud.failures:
            cloud.failures = [values[0]]  # type: ignore[list-item]
        cloud.take(session)
        if session.results is not None:
            assert_right(session, sequences, want)
    cloud.settle(session)
    assert_right(session, sequences, want)


# --- a cloud that lies ---


def waiting(want: Want = "hidden") -> tuple[EncoderSession, Encoded]:
    """A session that waits for one answer, and the honest one."""
    cloud, session = HonestEncoder(), new_session()
    cloud.connect(session)
    session.ask(SEQUENCES, want)
    cloud.take(session)
    honest = cloud.reply()
    assert isinstance(honest, Encoded)
    return session, honest


def changed(honest: Encoded, **fields: object) -> Encoded:
    kept = {name: getattr(honest, name) for name in honest.__struct_fields__}
    return Encoded(**kept | fields)  # type: ignore[arg-type]


def with_value(values: Array, value: float) -> Array:
    copy = values.copy()
    copy[-1, -1] = value
    return copy


LIES: dict[str, Callable[[Encoded], Message]] = {
    "NaN": lambda honest: changed(honest, tensors=(with_value(honest.result, np.nan),)),
    "infinity": lambda honest: changed(honest, tensors=(with_value(honest.result, -np.inf),)),
    "another dtype": lambda honest: changed(honest, tensors=(honest.result.astype(np.float16),)),
    "no row": lambda honest: changed(honest, tensors=(honest.result[:0],)),
    "a row too few": lambda honest: changed(honest, tensors=(honest.result[:-1],)),
    "a row too many": lambda honest: changed(honest, tensors=(np.pad(honest.result, ((0, 1), (0, 0))),)),
    "a column too few": lambda honest: changed(honest, tensors=(honest.result[:, 1:].copy(),)),
    "a column too many": lambda honest: changed(honest, tensors=(np.pad(honest.result, ((0, 0), (0, 1))),)),
    "the other way round": lambda honest: changed(honest, tensors=(honest.result.T.copy(),)),
    "a KV length": lambda honest: changed(honest, kv_length=6),
    "a later seq": lambda honest: changed(honest, seq=honest.seq + 1),
    "hidden states": lambda honest: Hidden(seq=honest.seq, kv_length=0, tensors=honest.tensors),
    "logits": lambda honest: Logits(
        seq=honest.seq,
        kv_length=0,
        tensors=(honest.result, np.zeros((len(honest.result), 0), np.uint32), np.zeros((len(honest.result), 2), "f4")),
    ),
    "Encode": lambda honest: Encode(seq=honest.seq, lengths=(1,), tensors=(embed([1]),)),
    "Opened once more": lambda honest: HonestEncoder().opened,
    "Open": lambda honest: Open(model="tiny", key_id="k"),
    "an error of another seq": lambda honest: Error(code="internal", message="", seq=7),
}


@pytest.mark.parametrize("want", WANTS)
@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_cannot_be_true_is_refused(lie: str, want: Want) -> None:
    session, honest = waiting(want)
    with pytest.raises(DishonestError) as raised:
        session.receive(encode(LIES[lie](honest)))
    assert session.results is None
    assert str(raised.value).isprintable()


@settings(max_examples=examples(300), deadline=None)
@given(st.data())
def test_an_answer_with_a_changed_bit_is_refused_or_finite(data: st.DataObject) -> None:
    session, honest = waiting()
    frame = bytearray(encode(honest))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    try:
        session.receive(bytes(frame))
    except DishonestError:
        assert session.results is None
    else:
        assert session.results is not None and all(np.isfinite(result).all() for result in session.results)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": HIDDEN + 1},
        {"vocab_size": 0},
        {"vocab_size": COUNT + 1},
        {"kv_length": 1},
        {"encoder_size": HIDDEN},
        {"encoder_context": 5},
        {"image_tokens": 1},
        {"max_frame": 1024},
    ],
    ids=str,
)
def test_an_opened_that_does_not_fit_is_refused(fields: dict[str, int]) -> None:
    session = new_session()
    session.ask(SEQUENCES, "hidden")
    session.connected()
    with pytest.raises(DishonestError, match=r"^Opened: "):
        session.receive(encode(HonestEncoder(**fields).opened))
    assert len(session.outbox) == 1  # Open alone


def test_an_answer_to_nothing_is_refused() -> None:
    session = new_session()
    HonestEncoder().connect(session)
    with pytest.raises(DishonestError, match="nothing was asked"):
        session.receive(encode(Encoded(seq=0, kv_length=0, tensors=(embed([1]),))))


@pytest.mark.parametrize("code", ["unauthorized", "unknown_model", "wrong_key"])
def test_a_session_that_is_refused_says_what_to_do(code: ErrorCode) -> None:
    session = new_session()
    session.connected()
    with pytest.raises(RefusedError, match=f"{code}: because") as raised:
        session.receive(encode(Error(code=code, message="because")))
    assert raised.value.hint
