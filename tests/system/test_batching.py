"""Sessions in a crowd: whoever is served beside others gets the tokens that it would get alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from tests.conftest import run_cloud_process
from tests.processes import metric

ON_BOTH_ENGINES = True
TEXT = "the cat sat on the mat, and the dog sang in the rain; then all of them went home together"
SERVED, STEPS = "stip_step_sessions_sum", "stip_step_sessions_count"
LONGEST_RUN = 120.0  # seconds; longer is a hang


@dataclass(frozen=True)
class Talk:
    """What one session asks: question after question, each at its time."""

    prompts: tuple[str, ...]
    lengths: tuple[int, ...]  # most tokens of each answer
    pauses: tuple[float, ...]  # seconds before each question


def random_talks(
    chance: random.Random, count: int, *, words: int, tokens: int, questions: int, seconds: float
) -> list[Talk]:
    """Talks of mixed lengths: some prompts are one token, some as long as allowed. Every one has another prompt."""
    talks = []
    for _ in range(count):
        prompts = [
            " ".join(chance.choices(TEXT.split(), k=chance.choice((1, 3, words // 4, words)))) for _ in range(questions)
        ]
        lengths = [chance.randint(5, tokens) for _ in range(questions)]
        pauses = [chance.uniform(0, seconds) for _ in range(questions)]
        talks.append(Talk(tuple(prompts), tuple(lengths), tuple(pauses)))
    return talks


@dataclass
class Told:
    """The answers of one talk, in ids."""

    answers: list[list[int]]
    prompts: list[list[int]]


def talk(bundle: Bundle, url: str, asked: Talk, *, alone: bool) -> Told:
    """Each question in a session that goes on, the last in one of its own. alone: without pauses."""
    told = Told([], [])
    assistant = Assistant(bundle, Address(url))
    for number, (prompt, length, pause) in enumerate(zip(asked.prompts, asked.lengths, asked.pauses, strict=True)):
        if not alone:
            time.sleep(pause)  # not to wait for anything: it is what makes sessions come and go at random
        if number == len(asked.prompts) - 1:
            assistant.close()
        answer = assistant.complete(prompt, max_tokens=length).finish()
        told.answers.append(answer.ids)
        told.prompts.append(bundle.tokenizer.encode(prompt))
    assistant.close()
    return told


def talk_together(bundle: Bundle, url: str, talks: Sequence[Talk]) -> tuple[list[Told], float]:
    """All of them at once, and how many sessions a step of the engine served."""
    told: dict[int, Told] = {}
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            told[number] = talk(bundle, url, talks[number], alone=False)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(talks))]
    began, served, steps = time.monotonic(), metric(url, SERVED), metric(url, STEPS)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, began + LONGEST_RUN - time.monotonic()))
    if failures:
        raise failures[0]
    assert len(told) == len(talks), f"{len(talks) - len(told)} sessions hang"
    shared = (metric(url, SERVED) - served) / (metric(url, STEPS) - steps)
    return [told[number] for number in range(len(talks))], shared


def excused(bundle: Bundle, url: str, prompt: list[int], alone: list[int], crowd: list[int]) -> bool:
    """Whether the two tokens where the answers part were too close to each other to be told apart.

    The numeric error is measured there: the same ids in one piece, and the last of them appended one by one.
    """
    parted = next(at for at, (one, other) in enumerate(zip(alone, crowd, strict=True)) if one != other)
    ids = prompt + alone[:parted]
    assistant = Assistant(bundle, Address(url))
    with assistant:
        assistant._connection.open()
        [whole] = assistant._connection.rows(ids, top_k=0)
        for end in range(max(1, len(ids) - 5), len(ids) + 1):
            [stepwise] = assistant._connection.rows(ids[:end], top_k=0)
    margin = float(whole.values[alone[parted]] - whole.values[crowd[parted]])
    error = float(np.abs(whole.values - stepwise.values).max())
    print(f"answers part at token {parted}: the margin of the two is {margin:.1e}, the numeric error {error:.1e}")
    return margin < error


def differences(bundle: Bundle, url: str, alone: Sequence[Told], crowd: Sequence[Told]) -> tuple[int, int]:
    """Answers that differ, and how many of them are excused."""
    parted = [
        (prompt, one, other)
        for a, b in zip(alone, crowd, strict=True)
        for prompt, one, other in zip(a.prompts, a.answers, b.answers, strict=True)
        if one != other
    ]
    return len(parted), sum(excused(bundle, url, *answers) for answers in parted)


def test_a_session_among_32_others_gets_the_tokens_that_it_gets_alone(tiny: Path) -> None:
    bundle = Bundle.open(tiny / "device")
    talks = random_talks(random.Random(1), 33, words=160, tokens=60, questions=2, seconds=0.5)
    with run_cloud_process(tiny / "cloud") as (url, _):
        alone = [talk(bundle, url, one, alone=True) for one in talks]
        crowd, shared = talk_together(bundle, url, talks)
    lengths = [len(prompt) for told in alone for prompt in told.prompts]
    assert min(lengths) <= 2 and max(lengths) >= 180
    print(f"{shared:.1f} sessions a step")
    assert [told.answers for told in crowd] == [told.answers for told in alone]
    assert shared > 1.5, "hardly any step served several: nothing is claimed then"


@pytest.mark.slow
def test_a_real_model_gives_a_session_in_a_crowd_the_tokens_that_it_gives_it_alone(smollm2: Path) -> None:
    bundle = Bundle.open(smollm2 / "device")
    talks = random_talks(random.Random(2), 12, words=80, tokens=24, questions=1, seconds=2.0)
    with run_cloud_process(smollm2 / "cloud") as (url, _):
        alone = [talk(bundle, url, one, alone=True) for one in talks]
        crowd, shared = talk_together(bundle, url, talks)
        differ, close_calls = differences(bundle, url, alone, crowd)
    print(f"{shared:.1f} sessions a step, {differ} answers differ, {close_calls} of them excused")
    assert differ == close_calls
    assert shared > 2, "the sessions were served one after the other"
