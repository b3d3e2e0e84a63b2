"""Drafts change how many round trips an answer takes, and nothing else. Against a real server, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_app.bundle import Bundle
from device_app.connection import Address, Connection
from device_app.counters import Counters
from device_app.decoding import Decoding
from device_app.sampler import Sampler, Sampling
from device_app.session import MOST_ROWS, Session
from tests.conftest import RunningCloud, run_cloud

PROMPT = list(range(5, 25))
TOKENS = 40
SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, top_p=0.9, top_k=30, seed=4),
    Sampling(temperature=5.0, seed=5),  # most tokens need the full row
]


@dataclass
class Steady:
    """Drafts of one length; keeps what it is told."""

    most: int
    told: list[dict[str, Any]] = field(default_factory=list)

    def length(self) -> int:
        return self.most

    def least(self) -> float:
        return 0.0

    def saw(self, **figures: Any) -> None:
        self.told.append(figures)


@dataclass
class Knowing:
    """Knows how the answer goes on, and says every `wrong`th token of it otherwise."""

    whole: Sequence[int]
    wrong: int = 10**9

    def draft(self, ids: Sequence[int], most: int, least: float = 0.0) -> list[int]:
        start = len(ids)
        return [
            token if (start + at) % self.wrong else (token + 1) % 1000
            for at, token in enumerate(self.whole[start : start + most])
        ]


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


Decode = Callable[..., tuple[list[int], Counters]]


@pytest.fixture
def decode(tiny: Path, cloud: RunningCloud) -> Iterator[Decode]:
    """The ids of an answer and what it took, on a session of its own."""
    bundle = Bundle.open(tiny / "device")
    connections: list[Connection[Session]] = []

    def answer(sampling: Sampling, most: int = TOKENS, **options: Any) -> tuple[list[int], Counters]:
        manifest = bundle.manifest
        session = Session(
            bundle.key, bundle.embed, served_name=manifest.served_name, context=manifest.context, widths=bundle.widths
        )
        connections.append(Connection(session, Address(cloud.url)))
        sampler = Sampler(sampling, manifest.vocab_size, PROMPT, manifest.banned_ids)
        decoding = Decoding(connections[-1], sampler, sampling, **options)
        return [chosen.id for chosen in decoding.tokens(PROMPT, most)], session.counters

    yield answer
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_drafts_change_no_token(decode: Decode, sampling: Sampling) -> None:
    plain, _ = decode(sampling)
    for length, wrong in [(1, 2), (4, 5), (5, 3), (15, 10**9)]:
        drafted, _ = decode(sampling, drafter=Knowing(PROMPT + plain, wrong), pace=Steady(length))
        assert drafted == plain


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_right_draft_saves_a_round_trip_for_each_of_its_tokens(decode: Decode, length: int) -> None:
    plain, before = decode(Sampling())
    assert before.round_trips == TOKENS
    _, counters = decode(Sampling(), drafter=Knowing(PROMPT + plain), pace=Steady(length))
    assert counters.round_trips == ceil(TOKENS / (length + 1))
    assert counters.drafted == counters.accepted == TOKENS - counters.round_trips


def test_tokens_behind_a_wrong_one_were_drafted_for_nothing(decode: Decode) -> None:
    plain, _ = decode(Sampling())
    _, counters = decode(Sampling(), drafter=Knowing(PROMPT + plain, wrong=1), pace=Steady(4))
    assert counters.accepted == 0 < counters.drafted
    assert counters.round_trips == TOKENS


def test_no_draft_is_longer_than_the_tokens_that_are_wanted(decode: Decode) -> None:
    plain, _ = decode(Sampling())
    ids, counters = decode(Sampling(), most=3, drafter=Knowing(PROMPT + plain), pace=Steady(10))
    assert ids == plain[:3]
    assert counters.drafted == 2


def test_a_draft_ends_where_the_context_does(decode: Decode) -> None:
    plain, _ = decode(Sampling(), most=10**6)
    drafted, _ = decode(Sampling(), most=10**6, drafter=Knowing(PROMPT + plain), pace=Steady(15))
    assert drafted == plain
    assert len(PROMPT) + len(plain) == 257  # the context's 256 positions, and the token behind the last of them


def test_a_draft_is_never_longer_than_rows_that_a_reply_may_hold(decode: Decode) -> None:
    plain, _ = decode(Sampling())
    _, counters = decode(Sampling(), drafter=Knowing(PROMPT + plain), pace=Steady(1000))
    assert counters.round_trips == ceil(TOKENS / MOST_ROWS)


def test_where_rows_come_whole_nothing_is_drafted(decode: Decode) -> None:
    # More than the cloud gives as the top of a row.
    sampling = Sampling(temperature=1.0, top_k=100_000, seed=1)
    plain, _ = decode(sampling)
    ids, counters = decode(sampling, drafter=Knowing(PROMPT + plain), pace=Steady(5))
    assert (ids, counters.drafted) == (plain, 0)


def test_the_pace_is_told_of_each_round_trip_that_did_nothing_else(decode: Decode) -> None:
    plain, _ = decode(Sampling())
    pace = Steady(3)
    _, counters = decode(Sampling(), drafter=Knowing(PROMPT + plain, wrong=6), pace=pace)
    assert len(pace.told) == counters.round_trips - 1  # the first one took the prompt along
    assert sum(told["accepted"] for told in pace.told) + 3 == counters.accepted
    assert all(0 < told["cloud_seconds"] < told["seconds"] for told in pace.told)
    assert sum(told["size"] for told in pace.told) < counters.bytes_up + counters.bytes_down


def test_probabilities_are_those_of_the_whole_row(decode: Decode, tiny: Path, cloud: RunningCloud) -> None:
    bundle = Bundle.open(tiny / "device")
    session = Session(bundle.key, bundle.embed, served_name=bundle.manifest.served_name, context=256)
    connection = Connection(session, Address(cloud.url))
    sampling = Sampling(temperature=1.7, seed=9)
    sampler = Sampler(sampling, bundle.manifest.vocab_size)
    ids = list(PROMPT)
    for chosen in Decoding(connection, sampler, sampling, top_logprobs=5).tokens(PROMPT, 10):
        [row] = connection.rows(ids, top_k=0)
        logits = row.values.astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert chosen.logprobs is not None
        assert abs(chosen.logprobs.logprob - expected[chosen.id]) < 1e-4
        assert [token for token, _ in chosen.logprobs.top] == np.argsort(-expected, kind="stable")[:5].tolist()
        ids.append(chosen.id)
    connection.close()
