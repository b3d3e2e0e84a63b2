"""How far to draft, learned from round trips that are made up here: a line, and a cloud with a cost for each row."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from device_app.pace import OUTLIER, PROBE, Pace


@dataclass
class World:
    """Seconds of the line, of the cloud for a first row and for each further one, and the chance of each guess."""

    line: float
    first: float
    row: float
    chance: float
    row_bytes: int = 2700

    def run(self, pace: Pace, trips: int, *, most_drafted: int = 8) -> tuple[float, float, int]:
        """Tokens a second, bytes a token and tokens drafted over some round trips."""
        draws = random.Random(0)
        tokens = drafted_all = 0
        seconds = sent = 0.0
        for _ in range(trips):
            length, least, chance = pace.length(), pace.least(), self.chance
            drafted = 0
            while drafted < min(length, most_drafted) and chance >= least:
                drafted, chance = drafted + 1, chance * self.chance
            accepted = 0
            while accepted < drafted and draws.random() < self.chance:
                accepted += 1
            cloud = (self.first + self.row * drafted) * draws.uniform(0.95, 1.05)
            trip = cloud + self.line * draws.uniform(1.0, 1.1)
            size = (drafted + 1) * self.row_bytes
            pace.saw(drafted=drafted, accepted=accepted, seconds=trip, cloud_seconds=cloud, size=size)
            tokens, seconds, sent = tokens + accepted + 1, seconds + trip, sent + size
            drafted_all += drafted
        return tokens / seconds, sent / tokens, drafted_all


def best(world: World) -> float:
    """The most tokens a second that any fixed length gives."""

    def rate(length: int) -> float:
        tokens = sum(world.chance**at for at in range(length + 1))
        return tokens / (world.line * 1.05 + world.first + world.row * length)

    return max(rate(length) for length in range(9))


@pytest.mark.parametrize("line", [0.0, 0.01, 0.05, 0.25])
@pytest.mark.parametrize("row", [0.0005, 0.003, 0.02])
@pytest.mark.parametrize("chance", [0.2, 0.6, 0.95])
def test_the_rate_is_near_the_best_of_any_length(line: float, row: float, chance: float) -> None:
    world = World(line, first=0.02, row=row, chance=chance)
    pace = Pace(8)
    world.run(pace, 100)
    rate, _, _ = world.run(pace, 400)
    assert rate > 0.9 * best(world)


def test_drafting_begins_at_once() -> None:
    pace = Pace(8)
    assert (pace.length(), pace.least()) == (8, 0.0)


def test_a_slow_line_asks_for_less_sure_drafts_than_a_fast_one() -> None:
    least = []
    for line in (0.0, 0.25):
        pace = Pace(8)
        World(line, first=0.02, row=0.003, chance=0.5).run(pace, 200)
        least.append(pace.least())
    assert least[1] < least[0]


def test_where_rows_cost_as_much_as_round_trips_little_is_drafted() -> None:
    pace, world = Pace(8), World(0.0, first=0.02, row=0.02, chance=0.3)
    world.run(pace, 200)
    _, _, drafted = world.run(pace, 320)
    assert drafted <= 8 * 320 / PROBE * 2


def test_after_many_round_trips_without_a_draft_one_is_tried() -> None:
    pace = Pace(8)
    World(0.0, first=0.02, row=0.02, chance=0.3).run(pace, 200)
    for _ in range(PROBE):
        pace.saw(drafted=0, accepted=0, seconds=0.02, cloud_seconds=0.02, size=2700)
    assert pace.least() == 0.0


def test_bytes_a_token_stay_below_their_bound() -> None:
    pace, world = Pace(8, bytes_a_token=5000), World(0.25, first=0.02, row=0.001, chance=0.3)
    world.run(pace, 100)
    _, size, drafted = world.run(pace, 1000)
    assert size < 5100
    assert drafted > 0


def test_no_bytes_to_spare_means_no_drafts() -> None:
    pace, world = Pace(8, bytes_a_token=2000), World(0.25, first=0.02, row=0.001, chance=0.9)
    world.run(pace, 100)
    _, _, drafted = world.run(pace, 100)
    assert drafted == 0


def test_one_stall_of_the_line_is_soon_forgotten() -> None:
    pace, world = Pace(8), World(0.05, first=0.02, row=0.001, chance=0.5)
    world.run(pace, 200)
    before = pace.least()
    pace.saw(drafted=8, accepted=0, seconds=10.0, cloud_seconds=0.03, size=24_000)
    stalled = pace.least()
    assert stalled <= OUTLIER * before + 0.05
    world.run(pace, 200)
    assert pace.least() == pytest.approx(before, rel=0.5, abs=0.02)


def test_the_same_round_trips_give_the_same_pace() -> None:
    rates = {World(0.05, first=0.02, row=0.002, chance=0.5).run(Pace(8), 100) for _ in range(2)}
    assert len(rates) == 1
