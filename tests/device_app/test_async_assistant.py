"""The assistant of asyncio, over a real socket: what the blocking one says, and a thread that is always free again."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_app import AsyncAnswer, AsyncAssistant
from device_app.sampler import Sampling
from shared.errors import BundleError, Cancelled, UnreachableError, UsageError
from tests.conftest import RunningCloud, open_assistant, run_cloud

QUESTION = [{"role": "user", "content": "the cat sat on the mat"}]
LONG = 200  # tokens: more than any test waits for
WARM = Sampling(temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.fixture
def assistant(tiny: Path, cloud: RunningCloud) -> AsyncAssistant:
    return AsyncAssistant(open_assistant(tiny, cloud.url))


def blocking(tiny: Path, cloud: RunningCloud, max_tokens: int) -> list[int]:
    """Ids that the blocking assistant chooses."""
    with open_assistant(tiny, cloud.url) as assistant:
        return assistant.chat(QUESTION, sampling=WARM, max_tokens=max_tokens).finish().ids


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("stip-assistant")]


async def gone(name: str) -> None:
    """Waits until a thread ended that was told to."""
    until = time.monotonic() + 5
    while name in threads():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


def test_it_says_what_the_blocking_one_says(tiny: Path, cloud: RunningCloud, assistant: AsyncAssistant) -> None:
    async def talk() -> AsyncAnswer:
        async with assistant:
            answer = assistant.chat(QUESTION, sampling=WARM, max_tokens=12, top_logprobs=1)
            pieces = [piece async for piece in answer]
            assert "".join(pieces) == answer.text
            assert [piece async for piece in answer] == []  # it is over
            return answer

    answer = asyncio.run(talk())
    assert answer.ids == blocking(tiny, cloud, 12)
    assert (answer.finish_reason, len(answer.logprobs), answer.stats.tokens) == ("length", 12, 12)


def test_a_bundle_is_opened_beside_the_loop(tiny: Path, cloud: RunningCloud) -> None:
    async def talk() -> str:
        async with await AsyncAssistant.open(tiny / "device", cloud.url) as assistant:
            assert await assistant.context() > 100
            prompt = await assistant.prompt(QUESTION)
            one = await assistant.answer(prompt, max_tokens=4).finish()
            two = await assistant.chat(QUESTION, max_tokens=4).finish()
            assert one.ids == two.ids
            return (await assistant.complete("the cat", max_tokens=4).finish()).text

    assert asyncio.run(talk())
    with pytest.raises(BundleError):
        asyncio.run(AsyncAssistant.open(tiny / "cloud", cloud.url))


def test_two_answers_at_once_come_in_order(tiny: Path, cloud: RunningCloud, assistant: AsyncAssistant) -> None:
    over: list[str] = []

    async def ask(name: str) -> list[int]:
        answer = await assistant.chat(QUESTION, sampling=WARM, max_tokens=10).finish()
        over.append(name)
        return answer.ids

    async def talk() -> list[list[int]]:
        async with assistant:
            return await asyncio.gather(*(ask(name) for name in "abc"))

    assert asyncio.run(talk()) == [blocking(tiny, cloud, 10)] * 3
    assert over == ["a", "b", "c"]


def test_the_loop_runs_while_an_answer_is_made(assistant: AsyncAssistant) -> None:
    async def talk() -> int:
        async with assistant:
            answer = asyncio.ensure_future(assistant.chat(QUESTION, max_tokens=30).finish())
            turns = 0
            while not answer.done():
                turns += 1
                await asyncio.sleep(0.001)
            return turns

    assert asyncio.run(talk()) > 10


def test_cancelling_the_task_cancels_the_answer(tiny: Path, cloud: RunningCloud, assistant: AsyncAssistant) -> None:
    async def talk() -> tuple[AsyncAnswer, list[int]]:
        async with assistant:
            left = assistant.chat(QUESTION, sampling=WARM, max_tokens=LONG)
            begun = asyncio.Event()

            async def listen() -> None:
                async for _ in left:
                    begun.set()

            task = asyncio.ensure_future(listen())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert left.finish_reason == "cancelled"  # the thread is out of it
            return left, (await assistant.chat(QUESTION, sampling=WARM, max_tokens=10).finish()).ids

    left, ids = asyncio.run(talk())
    assert 0 < len(left.ids) < LONG
    assert ids == blocking(tiny, cloud, 10)


def test_an_answer_that_waits_for_its_turn_is_cancelled_without_having_asked(assistant: AsyncAssistant) -> None:
    async def talk() -> None:
        async with assistant:
            async with assistant.chat(QUESTION, sampling=WARM, max_tokens=LONG) as running:
                await anext(running)
                waiting = assistant.chat(QUESTION)
                task = asyncio.ensure_future(waiting.finish())
                await asyncio.sleep(0.01)
                await waiting.stop()
                with pytest.raises(Cancelled):
                    await task
                assert waiting.stats.counters.bytes_up == 0
            assert running.finish_reason == "cancelled"

    asyncio.run(talk())


def test_leaving_the_assistant_ends_its_answers_and_its_thread(assistant: AsyncAssistant) -> None:
    async def talk() -> None:
        async with assistant:
            answer = assistant.chat(QUESTION, sampling=WARM, max_tokens=LONG)
            await anext(answer)
            [name] = threads()
        assert answer.finish_reason == "cancelled"
        await gone(name)

    asyncio.run(talk())


def test_it_may_be_closed_more_than_once(tiny: Path) -> None:
    async def talk() -> None:
        async with AsyncAssistant(open_assistant(tiny, "ws://127.0.0.1:9")) as assistant:
            await asyncio.gather(assistant.close(), assistant.close())
            await assistant.close()

    asyncio.run(talk())


def test_an_answer_that_nobody_holds_any_more_ends(assistant: AsyncAssistant) -> None:
    async def talk() -> None:
        async with assistant:
            answer = assistant.chat(QUESTION, sampling=WARM, max_tokens=LONG)
            await anext(answer)
            ids = answer.ids
            del answer
            gc.collect()
            await assistant.chat(QUESTION, max_tokens=1).finish()
            assert len(ids) < LONG

    asyncio.run(talk())


def test_cancelling_ends_a_wait_for_a_cloud_that_is_away(tiny: Path) -> None:
    async def talk() -> None:
        with run_cloud(tiny) as going:
            assistant = AsyncAssistant(open_assistant(tiny, going.url))
            answer = assistant.chat(QUESTION, sampling=WARM, max_tokens=LONG)
            await anext(answer)
        async with assistant:
            for waiting in (answer.finish(), assistant.context()):
                started = time.monotonic()
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(waiting, 0.3)
                assert time.monotonic() - started < 5

    asyncio.run(talk())


def test_errors_are_those_of_the_assistant(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"ws://127.0.0.1:{closed.getsockname()[1]}"

    async def talk() -> None:
        async with AsyncAssistant(open_assistant(tiny, url)) as assistant:
            with pytest.raises(UsageError, match="max_tokens"):
                assistant.chat(QUESTION, max_tokens=0)
            answer = assistant.chat(QUESTION)
            with pytest.raises(UnreachableError):
                await answer.finish()
            assert [piece async for piece in answer] == []
            with pytest.raises(UsageError, match="describe"):
                await assistant.describe(b"")
            with pytest.raises(UnreachableError):
                await assistant.context()

    asyncio.run(talk())
