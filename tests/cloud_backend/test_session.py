"""One session without a socket: what each message is answered with, in which order, and what the cache then holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_backend.engine import Work
from cloud_backend.limits import Limits
from cloud_backend.session import MOST_PENDING
from shared import wire
from shared.errors import RequestError
from tests.cloud_backend.list_cloud import (
    CONTEXT,
    HIDDEN,
    LIMITS,
    OPEN,
    READING,
    SECRET_VALUE,
    TOKEN,
    VOCAB,
    Cloud,
    append,
    codes,
    encoding,
    numbered,
    opened,
    with_embeddings,
)
from tests.thorough import examples

# --- opening ---


def test_open_is_answered_with_the_widths_and_limits() -> None:
    (reply,) = Cloud().receive(OPEN)
    limits = {name: getattr(LIMITS, name) for name in ("max_frame", "max_rows", "max_full_rows", "max_top_k", "window")}
    widths = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "context": CONTEXT, "kv_length": 0, "dtype": "float32"}
    assert {name: getattr(reply, name) for name in limits | widths} == limits | widths


def test_the_resume_secret_has_128_bits_and_is_new_each_time() -> None:
    secrets = {Cloud().receive(OPEN)[0].resume for _ in range(8)}
    assert len(secrets) == 8 and min(map(len, secrets)) >= 22  # base64


def test_two_resumes_during_one_step_do_not_count_what_that_step_adds() -> None:
    cloud = Cloud()
    (first,) = cloud.receive(OPEN)
    cloud.ask(append(1, 0, 1, 2, 3))
    cloud.receive(append(2, 3, 4, 5))
    work = cloud.session.start()  # it runs on while the device comes back, twice
    assert work is not None
    lengths = []
    for _ in range(2):
        cloud.connect()
        (reply,) = cloud.receive(wire.Open(model="tiny", key_id="key", resume=first.resume))
        lengths.append(reply.kv_length)
        cloud.receive(append(1, 9, 6))
        assert codes(cloud.run()) == ["out_of_step"]  # which says nothing of the step
        cloud.engine.run([work])
    assert lengths == [3, 3]
    cloud.ask(append(2, 3, 7))
    cloud.connect()
    (reply,) = cloud.receive(wire.Open(model="tiny", key_id="key", resume=first.resume))
    assert reply.kv_length == 4


@pytest.mark.parametrize("computed", wire.FLOATS)
def test_dtype_auto_is_what_the_engine_computes_in(computed: str) -> None:
    assert Cloud(dtype=computed).receive(OPEN)[0].dtype == computed


@pytest.mark.parametrize("wanted", wire.FLOATS)
def test_a_named_dtype_is_the_dtype_of_results(wanted: Any) -> None:
    cloud = Cloud()
    cloud.receive(wire.Open(model="tiny", key_id="key", dtype=wanted))
    (reply,) = cloud.ask(append(1, 0, 5, rows=1, dtype=wanted))
    assert reply.values.dtype.name == wanted


@pytest.mark.parametrize(
    "first",
    [
        append(1, 0, 1),
        wire.Cancel(seq=0),
        wire.Encode(seq=1, lengths=(1,), tensors=(np.zeros((1, HIDDEN), np.float32),)),
        wire.Error(code="idle", message=""),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_first_message_that_is_not_open_ends_the_connection(first: wire.Message) -> None:
    cloud = Cloud()
    (error,) = cloud.receive(first)
    assert (error.code, error.seq, cloud.session.closing) == ("bad_request", None, (1008, "bad_request"))


def test_a_second_open_ends_the_connection() -> None:
    cloud = opened()
    (error,) = cloud.receive(OPEN)
    assert (error.code, error.seq, cloud.session.closing) == ("bad_request", None, (1008, "bad_request"))


def test_a_message_of_the_clouds_own_ends_the_connection() -> None:
    cloud = opened()
    (error,) = cloud.receive(wire.Error(code="idle", message="", seq=3))
    assert (error.code, error.seq, cloud.session.closing) == ("bad_request", None, (1008, "bad_request"))


def test_a_name_that_is_not_served_is_unknown_model() -> None:
    cloud = Cloud()
    assert codes(cloud.receive(wire.Open(model="huge", key_id="key"))) == ["unknown_model"]
    assert cloud.session.closing == (1008, "unknown_model")


def test_a_served_name_under_another_key_is_wrong_key() -> None:
    cloud = Cloud()
    assert codes(cloud.receive(wire.Open(model="tiny", key_id="other"))) == ["wrong_key"]
    assert cloud.session.closing == (1008, "wrong_key")


@pytest.mark.parametrize("token", [None, "", "stip_wrong"])
def test_a_missing_or_wrong_token_is_unauthorized(token: str | None) -> None:
    cloud = Cloud(token=TOKEN)
    assert codes(cloud.receive(wire.Open(model="tiny", key_id="key", token=token))) == ["unauthorized"]
    assert cloud.session.closing == (1008, "unauthorized")


def test_the_right_token_opens() -> None:
    assert codes(Cloud(token=TOKEN).receive(wire.Open(model="tiny", key_id="key", token=TOKEN))) == ["Opened"]


@pytest.mark.parametrize(("model", "key"), [("huge", "key"), ("tiny", "other")])
def test_without_the_token_nobody_learns_what_is_served(model: str, key: str) -> None:
    assert codes(Cloud(token=TOKEN).receive(wire.Open(model=model, key_id=key))) == ["unauthorized"]


# --- keep, append, rows ---


def test_append_adds_to_the_cache() -> None:
    cloud = opened()
    cloud.ask(append(1, 0, 1, 2), append(2, 2, 3))
    assert cloud.cache.held == [1, 2, 3]


def test_keep_cuts_the_cache_before_it_appends() -> None:
    cloud = opened()
    cloud.ask(append(1, 0, 1, 2, 3), append(2, 1, 4))
    assert cloud.cache.held == [1, 4]


def test_kv_length_is_keep_and_what_was_appended() -> None:
    replies = opened().ask(append(1, 0, 1, 2, 3), append(2, 1, 4, 5), append(3, 0, 6))
    assert [reply.kv_length for reply in replies] == [3, 3, 1]


def test_keep_beyond_the_cache_is_out_of_step_and_changes_nothing() -> None:
    cloud = opened()
    _, error = cloud.ask(append(1, 0, 1, 2), append(2, 3, 4))
    assert (error.code, error.seq, error.kv_length) == ("out_of_step", 2, 2)
    assert cloud.cache.held == [1, 2]


def test_rows_are_those_of_the_last_embeddings() -> None:
    (reply,) = opened().ask(append(1, 0, 1, 2, 3, rows=2))
    assert reply.values[:, 0].tolist() == [2, 3]


def test_rows_0_is_acknowledged_by_empty_logits() -> None:
    (reply,) = opened().ask(append(7, 0, 1, 2, rows=0))
    assert (type(reply), reply.seq, reply.kv_length) == (wire.Logits, 7, 2)
    assert (len(reply.values), len(reply.ids), reply.log_sum_exp.shape) == (0, 0, (0, 2))


def test_hidden_is_answered_with_hidden() -> None:
    (reply,) = opened().ask(append(1, 0, 1, 2, rows=1, want="hidden"))
    assert (type(reply), reply.hidden.tolist()) == (wire.Hidden, [[2] * HIDDEN])


@pytest.mark.parametrize("rows", [0, 1])
def test_logits_of_a_model_without_a_classifier_are_unsupported(rows: int) -> None:
    cloud = opened(vocab_size=0)
    (reply,) = cloud.ask(append(1, 0, 1, 2, rows=rows))
    assert (reply.code, reply.seq, reply.kv_length) == ("unsupported", 1, 0)
    assert "wanted hidden" in reply.message
    assert codes(cloud.ask(append(2, 0, 1, 2, rows=rows, want="hidden"))) == ["Hidden"]


def test_top_k_and_temperature_reach_the_engine() -> None:
    cloud = opened()
    cloud.receive(append(1, 0, 1, rows=1, top_k=7, temperature=0.3))
    work = cloud.session.start()
    assert work is not None and (work.top_k, work.temperature) == (7, 0.3)


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 9e-31])
def test_a_temperature_that_nothing_finite_comes_of_is_a_bad_request(temperature: float) -> None:
    assert codes(opened().ask(append(1, 0, 1, temperature=temperature))) == ["bad_request"]


def test_times_are_passed_on() -> None:
    cloud = opened()
    cloud.receive(append(1, 0, 1))
    work = cloud.session.start()
    assert work is not None
    cloud.session.finish(cloud.engine.run([work])[0], queue_us=11, compute_us=22)
    (reply,) = cloud.replies()
    assert (reply.queue_us, reply.compute_us) == (11, 22)


def test_the_context_can_be_filled_to_its_last_position() -> None:
    assert opened().ask(append(1, 0, *range(CONTEXT)))[0].kv_length == CONTEXT


def test_one_position_more_is_context_full_and_changes_nothing() -> None:
    cloud = opened()
    _, error = cloud.ask(append(1, 0, *range(CONTEXT)), append(2, CONTEXT - 1, 98, 99))
    assert (error.code, error.seq, error.kv_length) == ("context_full", 2, CONTEXT)
    assert cloud.cache.held == list(range(CONTEXT))


# --- after ---


def test_after_the_request_that_changed_the_cache_last_is_taken() -> None:
    cloud = opened()
    assert codes(cloud.ask(append(1, 0, 1), append(2, 1, 2, after=1), append(3, 2, 3, after=2))) == ["Logits"] * 3


def test_after_a_request_that_failed_is_out_of_step() -> None:
    cloud = opened()
    cloud.ask(append(1, 0, 1, 2, 3), append(2, 3, np.nan), append(3, 2, 9, after=2))
    assert (codes(cloud.sent), cloud.cache.held) == (["Logits", "not_finite", "out_of_step"], [1, 2, 3])


def test_after_an_older_request_is_out_of_step() -> None:
    assert codes(opened().ask(append(1, 0, 1), append(2, 1, 2), append(3, 1, 3, after=1)))[2:] == ["out_of_step"]


def test_after_a_request_that_was_never_sent_is_out_of_step() -> None:
    assert codes(opened().ask(append(5, 0, 1, after=4))) == ["out_of_step"]


def test_a_failed_request_does_not_come_between() -> None:
    assert codes(opened().ask(append(1, 0, 1), append(2, 9, 2), append(3, 1, 3, after=1)))[2:] == ["Logits"]


def test_a_failure_breaks_the_whole_chain_behind_it() -> None:
    cloud = opened()
    cloud.ask(append(1, 0, 1), append(2, 1, np.inf, after=1), *(append(seq, 1, seq, after=seq - 1) for seq in (3, 4)))
    assert codes(cloud.sent) == ["Logits", "not_finite", "out_of_step", "out_of_step"]


def test_nothing_comes_after_a_request_on_which_the_engine_failed() -> None:
    cloud = opened()
    cloud.receive(append(1, 0, 1), append(2, 0, 2, after=1), append(3, 0, 3, after=2), append(4, 0, 4, after=1))
    work = cloud.session.start()
    assert work is not None
    cloud.finish(work)
    assert cloud.session.start() is not None
    cloud.session.finish(RequestError("internal", "the engine failed"))
    cloud.run()
    assert codes(cloud.sent) == ["Logits", "internal", "out_of_step", "out_of_step"]


# --- requests that do not fit ---

GOOD = append(1, 0, 1, 2, rows=1, top_k=4)
SPECIAL = {"NaN": np.nan, "infinity": np.inf, "minus infinity": -np.inf}
BAD = {
    **{name: (append(1, 0, 1, value), "not_finite") for name, value in SPECIAL.items()},
    "another dtype": (append(1, 0, 1, dtype="float16"), "bad_request"),
    "too narrow": (with_embeddings(GOOD, np.ones((2, HIDDEN - 1), np.float32)), "bad_request"),
    "too wide": (with_embeddings(GOOD, np.ones((2, HIDDEN + 1), np.float32)), "bad_request"),
    "no width": (with_embeddings(GOOD, np.ones((2, 0), np.float32)), "bad_request"),
    "no embeddings": (with_embeddings(GOOD, np.ones((0, HIDDEN), np.float32)), "bad_request"),
    "more rows than embeddings": (append(1, 0, 1, 2, rows=3), "bad_request"),
    "too many rows": (append(1, 0, *range(7), rows=7), "too_large"),
    "too many full rows": (append(1, 0, *range(4), rows=4, top_k=0), "too_large"),
    "too large a top_k": (append(1, 0, 1, top_k=9), "too_large"),
    "keep beyond the cache": (append(1, 1, 1), "out_of_step"),
    "after nothing": (append(1, 0, 1, after=999), "out_of_step"),
    "past the context": (append(1, 0, *range(CONTEXT + 1)), "context_full"),
    "an image": (append(1, 0, 1, kind="image"), "unsupported"),
    "Encode": (wire.Encode(seq=1, lengths=(2,), tensors=(np.ones((2, HIDDEN), np.float32),)), "unsupported"),
    "Encode of other lengths": (
        wire.Encode(seq=1, lengths=(1,), tensors=(np.ones((2, HIDDEN), np.float32),)),
        "bad_request",
    ),
}
every_bad_request = pytest.mark.parametrize(("bad", "code"), BAD.values(), ids=BAD)


def later(message: Any, seq: int) -> Any:
    return msgspec.structs.replace(message, seq=seq)


@every_bad_request
def test_a_request_that_does_not_fit_gets_this_code_with_its_seq(bad: Any, code: str) -> None:
    assert [(reply.code, reply.seq) for reply in opened().ask(later(bad, 9))] == [(code, 9)]


@every_bad_request
def test_a_request_that_does_not_fit_leaves_the_session_open(bad: Any, code: str) -> None:
    cloud = opened()
    assert codes(cloud.ask(bad, append(2, 0, 5)))[1:] == ["Logits"]


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize(
    "bad",
    [bad for bad, code in BAD.values() if code != "out_of_step"],
    ids=[name for name, (_, code) in BAD.items() if code != "out_of_step"],
)
def test_a_request_that_does_not_fit_leaves_the_cache_as_it_was(bad: Any, keep: int) -> None:
    if isinstance(bad, wire.Append):
        bad = msgspec.structs.replace(bad, keep=keep)
    cloud = opened()
    error = cloud.ask(append(1, 0, 1, 2, 3), later(bad, 2))[-1]
    assert (cloud.cache.held, error.kv_length) == ([1, 2, 3], 3)


@pytest.mark.parametrize("dtype", wire.FLOATS)
@pytest.mark.parametrize("value", SPECIAL.values(), ids=SPECIAL)
def test_embeddings_that_are_not_finite_are_refused_in_every_dtype(dtype: Any, value: float) -> None:
    cloud = Cloud()
    cloud.receive(wire.Open(model="tiny", key_id="key", dtype=dtype))
    assert codes(cloud.ask(append(1, 0, 1, value, dtype=dtype))) == ["not_finite"]


def test_hidden_rows_are_not_full_rows() -> None:
    assert codes(opened().ask(append(1, 0, *range(6), rows=6, want="hidden", top_k=0))) == ["Hidden"]


def test_a_frame_beyond_the_limit_is_too_large_with_its_seq() -> None:
    message = append(4, 0, *range(8))
    cloud = opened(replace(LIMITS, max_frame=len(wire.encode(message)) - 1))
    (error,) = cloud.ask(message)
    assert (error.code, error.seq, cloud.session.closing) == ("too_large", 4, None)


def test_a_frame_of_just_the_limit_is_taken() -> None:
    message = append(4, 0, *range(8))
    assert codes(opened(replace(LIMITS, max_frame=len(wire.encode(message)))).ask(message)) == ["Logits"]


@pytest.mark.parametrize("second", [5, 4, 0])
def test_a_seq_that_does_not_rise_ends_the_connection(second: int) -> None:
    cloud = opened()
    error = cloud.ask(append(5, 0, 1), append(second, 1, 2))[-1]
    assert (error.code, error.seq, cloud.session.closing) == ("bad_request", None, (1008, "bad_request"))


def test_a_seq_that_was_refused_is_used_up() -> None:
    cloud = opened()
    cloud.ask(append(5, 0, np.nan), append(5, 0, 1))
    assert cloud.session.closing == (1008, "bad_request")


BROKEN = {
    "empty": b"",
    "short": b"\0\0\0",
    "garbage": b"\xff" * 40,
    "cut": wire.encode(GOOD)[:-1],
    "longer": wire.encode(GOOD) + b"\0",
    "integers": wire.encode(with_embeddings(GOOD, np.ones((2, HIDDEN), np.uint32))),
    "one dimension": wire.encode(with_embeddings(GOOD, np.ones(HIDDEN, np.float32))),
    "no tensor": wire.encode(msgspec.structs.replace(GOOD, tensors=())),
    "two tensors": wire.encode(msgspec.structs.replace(GOOD, tensors=GOOD.tensors * 2)),
}


@pytest.mark.parametrize("frame", BROKEN.values(), ids=BROKEN)
def test_a_broken_frame_ends_the_connection(frame: bytes) -> None:
    cloud = opened()
    (error,) = cloud.receive(frame)
    assert (error.code, error.seq, cloud.session.closing) == ("bad_frame", None, (1002, "bad_frame"))


# --- what errors say ---


def headed(**fields: Any) -> bytes:
    header = msgspec.msgpack.encode(fields)
    return len(header).to_bytes(4, "little") + header


@every_bad_request
def test_an_error_quotes_no_value_of_a_tensor(bad: Any, code: str) -> None:
    embeddings = np.where(np.isfinite(bad.embeddings), SECRET_VALUE, bad.embeddings).astype(bad.embeddings.dtype)
    (error,) = opened().ask(with_embeddings(bad, embeddings))
    assert "123" not in error.message


def test_no_reply_to_open_quotes_the_token() -> None:
    cloud = Cloud(token="stip_another")
    cloud.receive(wire.Open(model="huge", key_id="other", token=TOKEN))
    assert TOKEN not in cloud.sent[0].message


@pytest.mark.parametrize(
    "frame",
    [
        headed(type="\x1b[31mred"),
        headed(type="x" * 5000),
        headed(type="open", model="tiny", key_id="key", dtype="\x07" * 3000),
        headed(type="cancel", seq="\n\n"),
        headed(type="append", seq=1, keep=0, tensors=[["\x1b[2J", [1]]]),
    ],
    ids=["type", "long type", "dtype", "seq", "tensor"],
)
def test_an_error_is_short_and_holds_no_control_characters(frame: bytes) -> None:
    cloud = Cloud()
    cloud.session.receive(frame)
    (sent,) = cloud.session.outbox
    message = msgspec.msgpack.decode(sent[4:])["message"]
    assert len(message) <= 2048 and message.isprintable()


@pytest.mark.parametrize("field", ["type", "dtype"])
def test_an_error_does_not_quote_a_token_in_the_wrong_field(field: str) -> None:
    cloud = Cloud()
    cloud.session.receive(headed(**{"type": "open", "model": "tiny", "key_id": "key", field: TOKEN}))
    assert TOKEN.encode() not in cloud.session.outbox[0]


# --- order ---


def test_a_bad_request_waits_for_its_turn_behind_a_running_one() -> None:
    cloud = opened()
    cloud.receive(append(1, 0, 1))
    work = cloud.session.start()
    assert work is not None
    assert cloud.receive(append(2, 1, np.nan), append(3, 1, 2)) == []
    cloud.finish(work)
    assert [reply.seq for reply in cloud.replies() + cloud.run()] == [1, 2, 3]


def test_a_failed_request_does_not_stop_the_ones_behind_it() -> None:
    cloud = opened()
    replies = cloud.ask(append(1, 0, 1), append(2, 9, 2), append(3, 1, np.inf), append(4, 1, 3))
    assert codes(replies) == ["Logits", "out_of_step", "not_finite", "Logits"]
    assert cloud.cache.held == [1, 3]


def test_one_work_runs_at_a_time() -> None:
    cloud = opened()
    cloud.receive(append(1, 0, 1), append(2, 1, 2))
    assert cloud.session.start() is not None
    assert cloud.session.start() is None


def test_a_failing_engine_is_answered_with_internal_and_the_session_goes_on() -> None:
    cloud = opened()
    cloud.receive(append(1, 0, 1), append(2, 0, 2))
    assert cloud.session.start() is not None
    cloud.session.finish(RequestError("internal", "the engine failed"))
    assert numbered(cloud.replies() + cloud.run()) == [
        (1, "internal"),
        (2, "Logits"),
    ]


def test_a_session_is_full_only_while_many_requests_wait() -> None:
    cloud = opened()
    cloud.receive(*(append(seq, 0, 1) for seq in range(MOST_PENDING)))
    full = cloud.session.full
    cloud.run()
    assert (full, cloud.session.full) == (True, False)


# --- cancel ---


def running_with(*behind: wire.Message) -> tuple[Cloud, Work]:
    """A session where request 1 runs and others wait."""
    cloud = opened()
    cloud.receive(append(1, 0, 1))
    work = cloud.session.start()
    assert work is not None
    cloud.receive(*behind)
    return cloud, work


def test_cancel_answers_every_request_that_has_not_started() -> None:
    cloud, work = running_with(append(2, 1, 2), append(3, 2, 3))
    cloud.receive(wire.Cancel(seq=0))
    cloud.finish(work)
    assert numbered(cloud.replies()) == [
        (1, "Logits"),
        (2, "cancelled"),
        (3, "cancelled"),
    ]


def test_cancel_lets_the_running_request_finish() -> None:
    cloud, work = running_with()
    cloud.receive(wire.Cancel(seq=1))
    cloud.finish(work)
    assert (codes(cloud.replies()), cloud.cache.held) == (["Logits"], [1])


def test_nobody_wants_a_running_request_that_was_cancelled_whatever_is_cancelled_after_it() -> None:
    cloud, _ = running_with(append(2, 1, 2))
    assert not cloud.session.dropped()
    cloud.receive(wire.Cancel(seq=2))
    assert not cloud.session.dropped()
    cloud.receive(wire.Cancel(seq=1), wire.Cancel(seq=2))
    assert cloud.session.dropped()


def test_a_request_that_is_dropped_half_way_is_cancelled_and_breaks_the_chain_behind_it() -> None:
    cloud = opened()
    cloud.ask(append(1, 0, 1, 2, 3))
    cloud.receive(append(2, 1, 4, 5, after=1), append(3, 1, 6, after=1))
    assert cloud.session.start() is not None
    cloud.cache.cut(1)  # as the scheduler leaves it: begun, then cut to keep
    cloud.session.finish(RequestError("cancelled", "dropped by Cancel"))
    replies = cloud.replies() + cloud.run()
    assert numbered(replies)[-2:] == [(2, "cancelled"), (3, "out_of_step")]
    assert [reply.kv_length for reply in replies[-2:]] == [1, 1]


def test_cancel_spares_requests_with_a_smaller_seq() -> None:
    cloud, work = running_with(append(2, 1, 2), append(3, 2, 3))
    cloud.receive(wire.Cancel(seq=3))
    cloud.finish(work)
    assert codes(cloud.replies() + cloud.run()) == ["Logits", "Logits", "cancelled"]


def test_cancel_spares_requests_that_come_after_it() -> None:
    cloud, work = running_with(wire.Cancel(seq=0), append(2, 1, 2))
    cloud.finish(work)
    assert codes(cloud.replies() + cloud.run()) == ["Logits", "Logits"]


def test_a_cancelled_request_leaves_the_cache_alone() -> None:
    cloud, work = running_with(append(2, 0, 2), wire.Cancel(seq=2))
    cloud.finish(work)
    assert [reply.kv_length for reply in cloud.replies() + cloud.run()] == [1, 1]


def test_cancel_with_nothing_to_drop_is_not_answered() -> None:
    assert opened().ask(wire.Cancel(seq=0)) == []


def test_a_request_known_to_fail_keeps_its_code_when_cancelled() -> None:
    cloud, work = running_with(append(2, 1, np.nan), wire.Cancel(seq=0))
    cloud.finish(work)
    assert codes(cloud.replies()) == ["Logits", "not_finite"]


# --- window ---

SIZE = len(wire.encode(append(1000, 0, 1)))  # seqs from 1000 on take the same number of bytes
TWO = replace(LIMITS, window=2 * SIZE, max_frame=2 * SIZE)


def test_bytes_in_flight_up_to_the_window_are_taken() -> None:
    assert codes(opened(TWO).ask(append(1000, 0, 1), append(1001, 1, 2))) == ["Logits", "Logits"]


def test_bytes_beyond_the_window_are_refused_and_may_come_again() -> None:
    cloud = opened(TWO)
    cloud.receive(append(1000, 0, 1), append(1001, 1, 2), append(1002, 2, 3))
    error = cloud.run()[-1]
    assert (error.code, error.seq, error.retryable) == ("window_exceeded", 1002, True)


def test_a_refused_request_takes_no_part_of_the_window() -> None:
    cloud = opened(TWO)
    cloud.receive(append(1000, 0, 1), append(1001, 1, np.nan), append(1002, 1, 2))
    assert codes(cloud.run()) == ["Logits", "not_finite", "Logits"]


def test_a_running_request_is_still_in_flight() -> None:
    cloud = opened(TWO)
    cloud.receive(append(1000, 0, 1))
    assert cloud.session.start() is not None
    cloud.receive(append(1001, 1, 2), append(1002, 2, 3))
    cloud.session.finish(RequestError("internal", ""))
    assert codes(cloud.replies() + cloud.run()) == ["internal", "out_of_step", "window_exceeded"]


@pytest.mark.parametrize("keep", [0, 9], ids=["result", "error"])
def test_a_reply_frees_the_window(keep: int) -> None:
    cloud = opened(TWO)
    for seq in range(1000, 1006, 2):
        assert "window_exceeded" not in codes(cloud.ask(append(seq, keep, 1), append(seq + 1, keep, 2)))


def test_a_cancelled_request_frees_the_window_once() -> None:
    cloud = opened(TWO)
    cloud.receive(append(1000, 0, 1), append(1001, 1, 2), wire.Cancel(seq=1001), wire.Cancel(seq=1000))
    cloud.receive(append(1002, 0, 1), append(1003, 1, 2), append(1004, 2, 3))
    cloud.run()
    assert codes(cloud.sent) == ["cancelled", "cancelled", "Logits", "Logits", "window_exceeded"]


# --- the end ---


@pytest.mark.parametrize(
    ("code", "close", "retryable"),
    [
        ("idle", 1008, True),
        ("too_many_sessions", 1013, True),
        ("shutting_down", 1001, True),
        ("bad_frame", 1002, False),
    ],
)
def test_a_failed_connection_says_why_and_whether_to_come_again(code: Any, close: int, retryable: bool) -> None:
    cloud = opened()
    cloud.session.fail(code, "because")
    (error,) = cloud.replies()
    assert (error.code, error.seq, error.retryable) == (code, None, retryable)
    assert cloud.session.closing == (close, code)


def test_nothing_is_said_after_the_error_that_ends_the_connection() -> None:
    cloud, work = running_with(append(2, 1, 2), append(3, 1, np.nan))
    cloud.session.fail("shutting_down", "the cloud stops")
    cloud.session.fail("idle", "too late")
    cloud.finish(work)
    assert codes(cloud.replies() + cloud.run()) == ["shutting_down"]


# --- any mix ---

names = st.lists(st.integers(1, 99), min_size=1, max_size=6)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), names, st.integers(0, CONTEXT), st.integers(0, 6), st.none() | st.integers(0, 9)),
        st.tuples(st.just("store"), names.filter(lambda given: len(given) <= READING["encoder_context"])),
        st.tuples(st.just("bad"), st.sampled_from(sorted(BAD))),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("start")),
        st.tuples(st.just("finish")),
        st.tuples(st.just("break")),
    ),
    max_size=40,
)


def play(steps: list[tuple[Any, ...]], limits: Limits = LIMITS, **engine: Any) -> tuple[Cloud, dict[int, wire.Message]]:
    """Carries out the steps, then lets the engine finish. Gives the cloud and the requests by seq."""
    cloud, work = opened(limits, **engine), None
    asked: dict[int, Any] = {}
    seq = 1000
    for kind, *values in steps:
        if kind in ("append", "store", "bad"):
            seq += 1
            if kind == "append":
                given, keep, rows, back = values
                after = None if back is None else seq - back
                asked[seq] = append(seq, keep, *given, rows=min(rows, len(given)), after=after)
            elif kind == "store":
                asked[seq] = encoding(seq, *values[0])
            else:
                asked[seq] = later(BAD[values[0]][0], seq)
            cloud.receive(asked[seq])
        elif kind == "cancel":
            cloud.receive(wire.Cancel(seq=1000 + values[0]))
        elif kind == "start":
            work = cloud.session.start() or work
        elif work is not None:
            if kind == "finish":
                cloud.finish(work)
            else:
                cloud.session.finish(RequestError("internal", "the engine failed"))
            work = None
    if work is not None:
        cloud.finish(work)
    cloud.run()
    return cloud, asked


@settings(max_examples=examples(300), deadline=None)
@given(operations)
def test_each_request_gets_exactly_one_reply_in_order(steps: list[tuple[Any, ...]]) -> None:
    cloud, asked = play(steps)
    assert [reply.seq for reply in cloud.sent] == list(asked)


@settings(max_examples=examples(300), deadline=None)
@given(operations)
def test_a_device_can_work_out_from_the_answers_what_the_cache_holds(steps: list[tuple[Any, ...]]) -> None:
    cloud, asked = play(steps)
    held: list[float] = []
    for reply in cloud.sent:
        if isinstance(reply, wire.Logits):
            request = asked[reply.seq]
            held[request.keep :] = request.embeddings[:, 0].tolist()
        assert reply.kv_length == len(held)
    assert cloud.cache.held == held


@settings(max_examples=examples(300), deadline=None)
@given(operations)
def test_a_device_can_work_out_from_the_answers_which_source_is_stored(steps: list[tuple[Any, ...]]) -> None:
    cloud, asked = play([("store", [7]), *steps], **READING)
    held: list[float] = []
    source: list[float] | None = None
    for reply in cloud.sent:
        request: Any = asked[reply.seq]
        if isinstance(reply, wire.Encoded) and request.want == "store":
            source, held = request.embeddings[:, 0].tolist(), []
        elif isinstance(reply, wire.Logits):
            held[request.keep :] = request.embeddings[:, 0].tolist()
        assert reply.kv_length == len(held)
    assert (cloud.cache.source, cloud.cache.held) == (source, held)


@settings(max_examples=examples(300), deadline=None)
@given(operations)
def test_when_all_is_answered_the_whole_window_is_free(steps: list[tuple[Any, ...]]) -> None:
    last = append(5000, 0, *range(20))
    size = len(wire.encode(last))
    cloud, _ = play(steps, replace(LIMITS, window=size, max_frame=size))
    assert codes(cloud.ask(last)) == ["Logits"]
