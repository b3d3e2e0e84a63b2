"""A short drive: real tunnels over real sockets, with the cabin example as a process of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.drive import Drive, drive
from benchmarks.tunnel import tunnels
from tests.conftest import run_cloud

SECONDS, CUTS = 6.0, 4


@pytest.fixture(scope="module")
def short_drive(tiny_exports: Callable[[str], Path]) -> Iterator[Drive]:
    export = tiny_exports("llava")
    with run_cloud(export) as cloud:
        darks = tunnels(random.Random(1), CUTS, 1, SECONDS, longest=0.8)
        yield drive(
            export / "device", cloud.url, darks, every=0.04, queue=3, options=["--max-tokens", "12", "--settle", "0.3"]
        )


def test_no_frame_is_described_twice_and_none_is_lost_that_the_queue_has_room_for(short_drive: Drive) -> None:
    assert short_drive.broken_claims() == []
    assert len(short_drive.frames("text")) > 10
    assert short_drive.frames("dropped")
    assert short_drive.frames("error")


def test_every_cut_is_told_of_with_the_time_since_when(short_drive: Drive) -> None:
    assert short_drive.cuts > 0  # on a busy machine it may not be back before the next one
    offline, online = short_drive.states("offline"), short_drive.states("online")
    assert len(offline) == len(online) >= short_drive.cuts
    assert all(one["since"].endswith("Z") for one in offline)


def test_it_ends_cleanly_and_says_what_it_did(short_drive: Drive) -> None:
    [ended] = short_drive.states("ended")
    assert short_drive.said[-1].fields == ended
    told = {"described": "text", "dropped": "dropped", "failed": "error"}
    assert {key: ended[key] for key in told} == {key: len(short_drive.frames(of)) for key, of in told.items()}
    assert ended["waiting"] == 0
