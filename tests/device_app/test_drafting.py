"""What the device guesses, from where, and what it learns of its guesses."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from device_app.drafting import Drafting, LearningDrafter
from device_app.lookup import MOST_KEPT, Lookup
from device_app.successors import Successors
from shared.errors import UsageError

LIST = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]


def table(pairs: dict[int, int], chance: float) -> Successors:
    rows = np.zeros((100, 2), np.uint32)
    for token, after in pairs.items():
        rows[token] = after, round(255 * chance)
    return Successors(rows)


# --- where guesses come from ---


def test_a_draft_goes_on_as_the_same_tokens_went_on_before() -> None:
    assert LearningDrafter().draft([*LIST, 1, 2, 12, 13], 4) == [14, 15, 16, 17]


def test_the_longest_match_wins() -> None:
    assert LearningDrafter().draft([1, 2, 3, 50, 9, 3, 60, 1, 2, 3], 1) == [50]


def test_of_equal_matches_the_latest_wins() -> None:
    assert LearningDrafter().draft([1, 2, 50, 1, 2, 60, 1, 2], 1) == [60]


def test_without_a_match_the_table_is_asked_and_chained() -> None:
    assert LearningDrafter(table({1: 2, 2: 3, 3: 4}, 0.9)).draft([1], 3) == [2, 3, 4]


def test_what_was_said_in_an_earlier_conversation_is_found() -> None:
    drafter = LearningDrafter()
    drafter.draft([1, *LIST], 0)
    assert drafter.draft([2, 10, 11, 12], 3) == [13, 14, 15]


def test_an_edited_conversation_is_taken_in_from_the_edit_on() -> None:
    drafter = LearningDrafter()
    drafter.draft([1, 2, 3, *LIST], 0)
    assert drafter.draft([1, 2, 3, 10, 11, 77, 3, 10, 11], 2) == [77, 3]


def test_images_are_never_drafted() -> None:
    image = -(10**30)
    draft = LearningDrafter().draft([1, 2, 3, image, image, 5, 1, 2, 3], 4)
    assert min(draft, default=0) >= 0


def test_nothing_is_drafted_from_nothing() -> None:
    assert LearningDrafter().draft([], 4) == []
    assert LearningDrafter().draft([1, 2, 3], 4) == []


@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_draft_is_longer_than_wanted(most: int) -> None:
    assert len(LearningDrafter().draft(LIST * 3, most)) == most


# --- how far they go ---


def test_a_draft_ends_where_the_chance_that_all_of_it_is_right_is_too_small() -> None:
    drafter = LearningDrafter(table({token: token + 1 for token in range(90)}, 1.0))  # believed at 0.4 each
    assert [len(drafter.draft([1], 8, least)) for least in (0.5, 0.39, 0.15, 0.06)] == [0, 1, 2, 3]


def test_guesses_that_never_come_true_are_given_up() -> None:
    drafter = LearningDrafter(table(dict.fromkeys(range(99), 99), 0.9))
    ids = [1]
    assert drafter.draft(ids, 1, 0.2) == [99]
    for token in range(2, 40):
        ids.append(token)
        drafter.draft(ids, 1, 0.2)
    assert drafter.draft([*ids, 50], 1, 0.2) == []


def test_guesses_that_are_not_sent_are_learned_from_too() -> None:
    drafter = LearningDrafter(table({token: token + 1 for token in range(90)}, 0.1))
    ids = [1]
    assert drafter.draft(ids, 1, 0.3) == []
    for token in range(2, 40):
        ids.append(token)
        drafter.draft(ids, 0, 0.3)
    assert drafter.draft([*ids, 50], 1, 0.3) == [51]


def test_the_same_ids_give_the_same_drafts() -> None:
    draws = random.Random(0)
    ids = [draws.randrange(30) for _ in range(400)]
    one, other = LearningDrafter(), LearningDrafter()
    for end in range(1, len(ids)):
        assert one.draft(ids[:end], 4, 0.05) == other.draft(ids[:end], 4, 0.05)


# --- what it costs ---


def test_a_match_is_the_longest_that_there_is() -> None:
    """Against a search of everything, for runs of up to the length that is indexed."""
    draws = random.Random(1)
    ids = [draws.randrange(4) for _ in range(300)]
    lookup = Lookup(longest=4)
    for end in range(1, len(ids)):
        lookup.take(ids[:end], end - 1)
        before = ids[max(0, end - 4) : end]
        longest = max(
            (run for run in range(1, len(before) + 1) for at in range(run, end) if ids[at - run : at] == before[-run:]),
            default=0,
        )
        found = lookup.find(before)
        assert (0 if found is None else found.length) == longest


def test_memory_is_bounded_and_the_latest_is_kept() -> None:
    lookup = Lookup(longest=12)
    for start in range(0, 4 * MOST_KEPT, 1000):
        lookup.take([start + at for at in range(1000)], 0)
    assert len(lookup._text) <= 2 * MOST_KEPT
    last = 4 * MOST_KEPT // 1000 * 1000 + 500
    found = lookup.find([last - 2, last - 1, last])
    assert found is not None
    assert found.token == last + 1
    assert lookup.find([1, 2, 3]) is None


@pytest.mark.alone
def test_a_token_of_a_long_conversation_takes_less_than_a_millisecond() -> None:
    draws = random.Random(2)
    ids = [draws.randrange(2000) for _ in range(8000)]
    drafter = LearningDrafter()
    drafter.draft(ids, 8)
    began = time.thread_time()
    for _ in range(200):
        ids.append(draws.randrange(2000))
        drafter.draft(ids, 8)
    assert (time.thread_time() - began) / 200 < 1e-3


@pytest.mark.parametrize("options", [{"most": -1}, {"most": 65}, {"bytes_a_token": 0}])
def test_settings_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Drafting(**options)
