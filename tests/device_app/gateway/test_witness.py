"""What the cloud saw, from frames alone, and the attack that is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from device_app.bundle import Bundle
from device_app.gateway.witness import SHOWN_FEATURES, Witness
from shared.wire import Append, Hidden, Logits, encode

TEXT = "the cat sat on the mat"


@pytest.fixture
def bundle(tiny: Path) -> Bundle:
    return Bundle.open(tiny / "device")


def append(bundle: Bundle, text: str, *, seq: int = 0, keep: int = 0, dtype: object = np.float32) -> bytes:
    """The frame that sends a text."""
    hidden = bundle.key.hide(bundle.embed(bundle.tokenizer.encode(text))).astype(dtype)  # type: ignore[call-overload]
    return encode(Append(seq=seq, keep=keep, tensors=(hidden,)))


def logits(ids: list[int], *, seq: int, kv_length: int) -> bytes:
    """A reply whose best (permuted) ids are these."""
    rows = len(ids)
    best = np.array(ids, np.uint32)[:, None]
    values, sums = np.ones((rows, 1), np.float32), np.zeros((rows, 2), np.float32)
    return encode(Logits(seq=seq, kv_length=kv_length, compute_us=3000, tensors=(values, best, sums)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_embedding_table_reads_every_permuted_token(bundle: Bundle, dtype: object) -> None:
    witness = Witness(bundle)
    witness.see("up", append(bundle, TEXT, dtype=dtype))

    sight = witness.take()

    assert sight.found["sorted entries"] == sight.positions == len(bundle.tokenizer.encode(TEXT))
    assert sight.text == TEXT


def test_of_rotated_tokens_lengths_read_all_and_entries_none(tiny_exports: Callable[..., Path]) -> None:
    bundle = Bundle.open(tiny_exports("llama", "rotation") / "device")
    witness = Witness(bundle)
    witness.see("up", append(bundle, TEXT))

    sight = witness.take()

    assert sight.found == {"sorted entries": 0, "length": sight.positions}
    assert sight.text == TEXT


def test_vectors_are_shown_as_they_were_sent(bundle: Bundle) -> None:
    witness = Witness(bundle)
    witness.see("up", append(bundle, TEXT))

    sight = witness.take()

    hidden = bundle.key.hide(bundle.embed(bundle.tokenizer.encode(TEXT)))
    np.testing.assert_array_equal(np.stack(sight.vectors), hidden[:, :SHOWN_FEATURES])
    assert witness.take().vectors == []


def test_the_clouds_best_ids_are_read_as_plain_ones(bundle: Bundle) -> None:
    ids = bundle.tokenizer.encode(" dog")
    witness = Witness(bundle)
    witness.see("up", append(bundle, TEXT))
    witness.see("down", logits(ids[:1], seq=0, kv_length=6))

    assert witness.take().read == bundle.tokenizer.detokenizer().push(ids[0])


def test_a_draft_that_was_taken_back_is_forgotten(bundle: Bundle) -> None:
    kept = len(bundle.tokenizer.encode("the cat"))
    witness = Witness(bundle)
    witness.see("up", append(bundle, TEXT))
    witness.see("up", append(bundle, " dog", seq=1, keep=kept))

    assert witness.take().text == "the cat dog"


def test_what_was_sent_before_the_witness_came_is_not_claimed(bundle: Bundle) -> None:
    witness = Witness(bundle)
    witness.see("up", append(bundle, " dog", keep=20))

    sight = witness.take()

    assert sight.positions == len(bundle.tokenizer.encode(" dog"))


def test_a_round_trip_is_timed_and_the_clouds_part_of_it(bundle: Bundle) -> None:
    witness = Witness(bundle)
    witness.see("up", append(bundle, TEXT), at=10.0)
    witness.see("down", logits([1], seq=0, kv_length=6), at=10.05)

    [trip] = witness.take().round_trips

    assert (round(trip.total), trip.cloud) == (50, 3.0)


def test_hidden_states_say_nothing_to_be_read(bundle: Bundle) -> None:
    witness = Witness(bundle)
    witness.see("up", append(bundle, TEXT))
    witness.see("down", encode(Hidden(seq=0, kv_length=6, tensors=(np.zeros((1, 8), np.float32),))))

    assert witness.take().read == ""


def test_where_positions_are_added_the_look_up_claims_nothing(tiny_exports: Callable[..., Path]) -> None:
    bundle = Bundle.open(tiny_exports("gpt2") / "device")
    witness = Witness(bundle)
    witness.see("up", append(bundle, TEXT))

    sight = witness.take()

    assert sight.found == {"sorted entries": 0, "length": 0}
    assert sight.positions > 0


def test_a_frame_that_is_none_is_passed_over(bundle: Bundle) -> None:
    witness = Witness(bundle)
    witness.see("down", b"\x00\x01")

    assert witness.take().vectors == []
