"""Sessions that take images and source sequences, without a socket."""

from __future__ import annotations

import numpy as np
import pytest

from shared import wire
from shared.errors import RequestError
from tests.cloud_backend.list_cloud import CONTEXT, READING, SEEING, append, codes, encoding, image, opened, reading


def test_an_image_takes_its_positions_whatever_its_patches_are() -> None:
    cloud = opened(**SEEING)
    replies = cloud.ask(append(1, 0, 1), image(2, 1, 9, after=1), append(3, 4, 2, after=2))
    assert ([reply.kv_length for reply in replies], cloud.cache.held) == ([1, 4, 5], [1, 9, 9, 9, 2])


def test_an_image_is_acknowledged_in_the_form_that_was_wanted() -> None:
    rows, hidden = opened(**SEEING).ask(image(1, 0, 9), image(2, 3, 9, want="hidden"))
    assert (type(rows), len(rows.values), type(hidden), len(hidden.hidden)) == (wire.Logits, 0, wire.Hidden, 0)


def test_the_last_image_that_fits_the_context_is_taken_and_the_next_is_not() -> None:
    cloud = opened(**SEEING)
    replies = cloud.ask(append(1, 0, *range(CONTEXT - 3)), image(2, CONTEXT - 3, 9), image(3, CONTEXT - 2, 9))
    assert codes(replies) == ["Logits", "Logits", "context_full"]
    assert cloud.cache.length == CONTEXT


def test_logits_of_an_image_are_unsupported_without_a_classifier() -> None:
    replies = opened(**SEEING, vocab_size=0).ask(image(1, 0, 9), image(2, 0, 9, want="hidden"))
    assert codes(replies) == ["unsupported", "Hidden"]


def test_store_is_acknowledged_by_no_rows_and_an_empty_cache() -> None:
    cloud = reading(encoding(1, 7, 8), append(2, 0, 1, 2))
    (reply,) = cloud.ask(encoding(3, 9))
    assert (type(reply), reply.seq, reply.kv_length, len(reply.result)) == (wire.Encoded, 3, 0, 0)
    assert (cloud.cache.source, cloud.cache.held) == ([9], [])


def test_a_source_and_a_sequence_to_encode_have_limits_of_their_own() -> None:
    lengths = {"store": READING["encoder_context"], "hidden": CONTEXT}
    for want, most in lengths.items():
        fits, not_ = encoding(1, *range(most), want=want), encoding(2, *range(most + 1), want=want)
        assert codes(reading(fits, not_).sent) == ["Encoded", "too_large"]


def test_an_append_before_the_first_store_is_out_of_step() -> None:
    assert codes(reading(append(1, 0, 1), encoding(2, 7), append(3, 0, 1)).sent) == ["out_of_step", "Encoded", "Logits"]


def test_an_encode_of_hidden_states_is_no_source() -> None:
    cloud = reading(encoding(1, 7, want="hidden"), append(2, 0, 1))
    assert (codes(cloud.sent), cloud.sent[0].result[:, 0].tolist()) == (["Encoded", "out_of_step"], [7])


def test_after_a_store_is_taken() -> None:
    assert codes(reading(encoding(1, 7), append(2, 0, 1, after=1)).sent) == ["Encoded", "Logits"]


def test_after_an_append_that_a_store_threw_away_is_out_of_step() -> None:
    cloud = reading(encoding(1, 7), append(2, 0, 1), encoding(3, 8), append(4, 0, 2, after=2))
    assert codes(cloud.sent)[3:] == ["out_of_step"]


@pytest.mark.parametrize("name", [np.nan, np.inf])
def test_after_a_store_that_failed_is_out_of_step(name: float) -> None:
    cloud = reading(encoding(1, 7), append(2, 0, 1), encoding(3, name), append(4, 0, 2, after=3))
    assert codes(cloud.sent)[2:] == ["not_finite", "out_of_step"]
    assert (cloud.cache.source, cloud.cache.held) == ([7], [1])


def test_an_encode_of_hidden_states_does_not_come_between() -> None:
    cloud = reading(encoding(1, 7), encoding(2, 8, want="hidden"), append(3, 0, 1, after=1), append(4, 1, 2, after=2))
    assert codes(cloud.sent) == ["Encoded", "Encoded", "Logits", "out_of_step"]


def test_a_cancelled_store_leaves_source_and_cache_alone() -> None:
    cloud = reading(encoding(1, 7), append(2, 0, 1))
    replies = cloud.ask(encoding(3, 8), wire.Cancel(seq=3), append(4, 1, 2, after=2))
    assert codes(replies) == ["cancelled", "Logits"]
    assert (cloud.cache.source, cloud.cache.held) == ([7], [1, 2])


def test_a_store_on_which_the_engine_failed_does_not_come_between() -> None:
    cloud = reading(encoding(1, 7), append(2, 0, 1))
    cloud.receive(encoding(3, 8), append(4, 1, 2, after=2))
    assert cloud.session.start() is not None
    cloud.session.finish(RequestError("internal", "the engine failed"))
    assert codes(cloud.replies() + cloud.run()) == ["internal", "Logits"]
