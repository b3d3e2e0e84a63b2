"""Hundreds of failures at random, over real sockets: every answer that ends is the one of an undisturbed run."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from device_app import Sampling
from device_app.answer import Answer
from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from shared.wire import Cancel, Error, Logits, Opened, decode
from tests.processes import Held, at_rest, eventually, metric
from tests.system.line import Line, random_faults
from tests.system.mortal_cloud import MortalCloud

pytestmark = pytest.mark.alone

SEED = 5
DEVICES = 12
FAULTS = 22  # of each device's line
CANCELS = 5  # of each device, at least
KILLS = 3
LEAST_EVENTS = 300
EVENTS = ("cut", "half-sent", "vanished", "stalled", "trickling", "cancelled", "left", "killed", "evicted")
LEAST = {  # of each kind, and of what came of them
    "cut": 40,
    "half-sent": 40,
    "vanished": 20,
    "stalled": 20,
    "trickling": 20,
    "cancelled": DEVICES * CANCELS,
    "told to cancel": 15,  # the cloud was, by a Cancel behind a request that it had not answered
    "left": 10,
    "killed": KILLS,
    "evicted": 10,
    "told of eviction": 5,  # within a connection: others find out when they come back
    "resumed": 10,
}
GRACE_SECONDS = 3.0
LONGEST_HANG = 10.0  # seconds without a token once the cloud is there
LONGEST_RUN = 150.0  # seconds; longer is a hang
SERVE = (
    *("--kv-bytes", "160K"),  # far less than all devices would like to hold
    *("--grace-seconds", str(GRACE_SECONDS)),
    *("--max-frame", "8192", "--window", "32768"),  # long prompts take several frames
)
TEXT = "the cat sat on the mat, and the dog sang in the rain; then all of them went home together"


@dataclass(frozen=True)
class Question:
    """What is asked, and the answer of an undisturbed run."""

    prompt: str
    sampling: Sampling
    max_tokens: int
    ids: tuple[int, ...] = ()
    text: str = ""


def questions() -> list[Question]:
    """Short and long ones, some answered greedily and some drawn."""
    chance = random.Random(SEED)
    made = []
    for number in range(12):
        prompt = " ".join(chance.choices(TEXT.split(), k=chance.choice((1, 5, 20, 80))))
        drawn = Sampling(temperature=0.9, top_p=0.95, seed=number)
        made.append(Question(prompt, drawn if number % 3 == 0 else Sampling(), chance.randint(10, 40)))
    return made


class Device:
    """Asks question after question over a line of its own, and cancels or leaves now and then."""

    def __init__(self, bundle: Bundle, line: Line, questions: list[Question], chance: random.Random) -> None:
        self.line = line
        self.assistant = Assistant(bundle, Address(line.url), on_frame=self._see)
        self.happened: Counter[str] = Counter()
        self.progress: list[float] = []  # when each result came
        self.failure: BaseException | None = None
        self._questions = questions
        self._chance = chance
        self._interrupt_after: int | None = None  # frames up, in this answer
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.ask("finish")  # whoever never reached the cloud gives up at once: that is not what is tested here
        self.line.plan(random_faults(self._chance, FAULTS))
        self._thread.start()

    def wait(self, until: float) -> None:
        """Raises what went wrong, or AssertionError where it is not over by then."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self.failure is not None:
            raise self.failure
        assert not self._thread.is_alive(), f"a device hangs; seen until then: {dict(self.line.happened)}"

    def _run(self) -> None:
        try:
            while not self.line.spent or self.happened["cancelled"] < CANCELS:
                self.ask(self._chance.choice(("finish", "finish", "stop", "interrupt", "leave")))
        except BaseException as error:
            self.failure = error

    def ask(self, then: str) -> None:
        """One question; `then` says how its answer ends."""
        question = self._chance.choice(self._questions)
        at = self._chance.randrange(question.max_tokens)
        self._interrupt_after = at if then == "interrupt" else None
        answer = self.assistant.complete(question.prompt, sampling=question.sampling, max_tokens=question.max_tokens)
        try:
            for _ in answer:
                if then == "stop" and len(answer.ids) > at:
                    answer.stop()
                    break
        except KeyboardInterrupt:
            assert then == "interrupt"
        self._check(answer, question)
        if then == "leave":
            self.assistant.close()
            self.happened["left"] += 1

    def _check(self, answer: Answer, question: Question) -> None:
        assert tuple(answer.ids) == question.ids[: len(answer.ids)]
        if answer.finish_reason == "cancelled":
            self.happened["cancelled"] += 1
        else:
            assert (tuple(answer.ids), answer.text) == (question.ids, question.text)

    def _see(self, way: str, frame: bytes) -> None:
        """Counts frames as they travel, and interrupts the answer behind the frame that was chosen for it."""
        if way == "up" and self._interrupt_after is not None:
            if self._interrupt_after == 0:
                self.assistant.interrupt()
            self._interrupt_after -= 1
        message = decode(frame)
        if isinstance(message, Cancel):
            self.happened["told to cancel"] += 1
        elif isinstance(message, Logits):
            self.progress.append(time.monotonic())
        elif isinstance(message, Error):
            self.happened["told of eviction"] += message.code == "out_of_step" and message.kv_length == 0
        elif isinstance(message, Opened):
            self.happened["resumed"] += message.kv_length > 0


def undisturbed(assistant: Assistant, question: Question) -> Question:
    """The same with its answer."""
    answer = assistant.complete(question.prompt, sampling=question.sampling, max_tokens=question.max_tokens).finish()
    return Question(question.prompt, question.sampling, question.max_tokens, tuple(answer.ids), answer.text)


def longest_hang(device: Device, lives: list[tuple[float, float]]) -> float:
    """Seconds without a result while the cloud was there, in any one of its lives."""
    gaps = pairwise(device.progress)
    return max(min(later, killed) - max(earlier, ready) for earlier, later in gaps for ready, killed in lives)


def given_back(url: str) -> bool:
    """Whether the server holds nothing for anyone."""
    names = ("stip_sessions_open", "stip_sessions_held", "stip_kv_used_bytes", "stip_requests_waiting")
    return all(metric(url, name) == 0 for name in names)


@dataclass(frozen=True)
class Run:
    """What is left of the run for claims about it."""

    happened: Counter[str]
    hangs: list[float]
    seconds: float
    held: bool  # whether sessions were, once every line was cut
    emptied: bool  # within the grace time and a little
    before: Held
    after: Held
    tasks_before: int
    tasks_after: int


def all_happened(devices: list[Device]) -> Counter[str]:
    return sum((Counter(device.line.happened) + device.happened for device in devices), Counter[str]())


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """All of it, once: any wrong or hanging answer fails here."""
    bundle = Bundle.open(tiny / "device")
    started = time.monotonic()
    tasks = tmp_path_factory.mktemp("tasks") / "tasks"
    with MortalCloud(tiny / "cloud", *SERVE, tasks=tasks) as cloud, ExitStack() as lines:
        with Assistant(bundle, Address(cloud.url)) as assistant:
            asked = [undisturbed(assistant, question) for question in questions()]
        assert eventually(lambda: given_back(cloud.url), GRACE_SECONDS + 5)
        before, tasks_before = at_rest(cloud.pid), cloud.tasks()
        devices = [
            Device(bundle, lines.enter_context(Line(cloud.port)), asked, random.Random(SEED + number))
            for number in range(DEVICES)
        ]
        for device in devices:
            device.start()
        deadline = started + LONGEST_RUN
        evictions = 0
        for kill in range(1, KILLS + 1):
            enough = partial(_struck, devices, DEVICES * FAULTS * kill // (KILLS + 1))
            assert eventually(enough, deadline - time.monotonic()), all_happened(devices)
            evictions += int(metric(cloud.url, "stip_evictions_total"))
            cloud.kill_and_restart()
        for device in devices:
            device.wait(deadline)
        happened = all_happened(devices)
        happened["killed"] = KILLS
        happened["evicted"] = evictions + int(metric(cloud.url, "stip_evictions_total"))
        hangs = [longest_hang(device, cloud.lives) for device in devices]
        for device in devices:
            device.line.cut()
        lines.close()
        held = eventually(lambda: metric(cloud.url, "stip_sessions_held") > 0, 10)
        emptied = eventually(lambda: given_back(cloud.url), GRACE_SECONDS + 5)
        yield Run(
            happened,
            hangs,
            time.monotonic() - started,
            held,
            emptied,
            before,
            at_rest(cloud.pid, 3.0),
            tasks_before,
            cloud.tasks(),
        )


def _struck(devices: list[Device], enough: int) -> bool:
    """Whether so many faults happened, or a device failed: then there is nothing to wait for."""
    faults = sum(device.line.happened.total() for device in devices)
    return faults >= enough or any(device.failure for device in devices)


def test_every_answer_that_ends_is_that_of_an_undisturbed_run_over_hundreds_of_failures(run: Run) -> None:
    events = sum(run.happened[kind] for kind in EVENTS)
    print(f"{events} events in {run.seconds:.0f} s: {dict(run.happened)}; no token for {max(run.hangs):.1f} s at most")
    assert events >= LEAST_EVENTS
    few = {kind: run.happened[kind] for kind, least in LEAST.items() if run.happened[kind] < least}
    assert not few, f"too few of them to claim anything: {few}"


def test_no_session_hangs_once_the_cloud_is_there(run: Run) -> None:
    assert max(run.hangs) < LONGEST_HANG


def test_lost_sessions_are_held_for_the_grace_time_and_then_gone(run: Run) -> None:
    assert run.held
    assert run.emptied


@pytest.mark.parametrize("what", ["threads", "descriptors"])
def test_the_server_holds_no_more_of_the_machine_than_at_the_start(run: Run, what: str) -> None:
    assert getattr(run.after, what) <= getattr(run.before, what)


def test_no_task_outlives_its_session(run: Run) -> None:
    assert run.tasks_after <= run.tasks_before
