"""One answer as the page gets it: events with the HTML of what is new, the figures, and what the cloud saw.

The answer is made by a task of its own, which keeps it in the history however it ends; events are read from its state
at a bounded rate, so a slow page holds nothing up.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from device_app.answer import Answer, Stats
from device_app.gateway.errors import ApiError, api_error, log_failure
from device_app.gateway.page_images import joined, with_files
from device_app.gateway.page_lines import Lines
from device_app.gateway.serving import ServedModel
from device_app.gateway.watching import Watch
from device_app.gateway.witness import Sight, Witness
from device_app.history import Chat, Content, StoredMessage, title_of
from device_app.markdown import render
from device_app.prompt import Prompter
from device_app.sampler import Sampling
from shared.errors import Cancelled, StipError
from shared.wire import Array

TICK_SECONDS = 0.1  # between events
RENDERING_SHARE = 0.2  # of the time, at most, goes into rendering a text that grows
SHOWN_VECTORS = 512  # of one event
STEPS_A_SPREAD = 32  # of the shown values: a root mean square of a vector is so many


class Settings(msgspec.Struct):
    """How a chat is answered."""

    system: Annotated[str, msgspec.Meta(max_length=100_000)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.3
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.5, le=2)] = 1.0
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 512
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**53)] | None = None  # None: another one each time

    def sampling(self) -> Sampling:
        """What the sampler takes."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
        )


class PageAnswer:
    """`prepare`, `start`, then `events`; `stop` at any time."""

    def __init__(self, lines: Lines, served: ServedModel, chat: Chat, watch: Watch) -> None:
        self._lines = lines
        self._served = served
        self._chat = chat
        self._watch = watch
        self._settings = msgspec.convert(chat.settings, Settings)
        self._kept: list[StoredMessage] = []  # before the question, or with it where it is asked again
        self._asked: list[StoredMessage] = []  # the question, where it is new
        self._held = False  # whether the chat is still as it was before the question
        self._conversation: list[dict[str, Any]] = []
        self._text = ""
        self._stats = Stats()
        self._finish_reason = ""
        self._witness: Witness | None = None
        self._notices: list[dict[str, Any]] = []  # of failures, to be told
        self._work: asyncio.Task[None] | None = None
        self._answer: Answer | None = None

    async def prepare(self, asked: Content | None, keep: int | None) -> None:
        """Takes the question in. Raises ApiError where there is none to answer.

        A question that only adds to the chat is kept at once. One in whose place something was said before is kept
        with the first word of its answer, so that a failure leaves the chat as it was.
        """
        lines = await self._lines.of(self._chat.id)
        self._kept = lines[:keep]
        self._asked = [] if asked is None else [StoredMessage("user", asked, {}, time.time())]
        said = self._said()
        if not said or said[-1].role != "user":
            raise ApiError(400, "text: seen none, wanted a question", param="text")
        self._conversation = _conversation(said)
        if self._settings.system and self._settings.system.strip():
            self._conversation.insert(0, {"role": "system", "content": self._settings.system})
        cuts = len(self._kept) < len(lines)
        self._held = cuts or bool(self._asked)
        if not cuts:
            await self._keep_question()

    def _said(self) -> list[StoredMessage]:
        return [*self._kept, *self._asked]

    def start(self, ended: Callable[[], object]) -> None:
        """Begins the answer; `ended` is called once it has ended and is kept."""
        self._work = asyncio.create_task(self._run())
        self._work.add_done_callback(lambda _: ended())

    async def stop(self) -> None:
        """Ends the answer and waits until it has ended, and what there is of it is kept."""
        self._cancel()
        if self._work is not None:
            await asyncio.wait({self._work})

    def _cancel(self) -> None:
        if self._answer is not None:
            self._answer.cancel()  # raises Cancelled where the answer is made
        elif self._work is not None:
            self._work.cancel()  # it waits for a session

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, until the answer has ended. Who stops reading stops the answer."""
        assert self._work is not None
        shown = _Shown()
        looking: asyncio.Task[Sight] | None = None
        pause = TICK_SECONDS
        try:
            while not self._work.done():
                await asyncio.wait({self._work}, timeout=pause)
                began = time.perf_counter()
                if (blocks := await shown.new(self._text)) is not None:
                    yield _event("html", **blocks)
                    pause = max(TICK_SECONDS, (time.perf_counter() - began) / RENDERING_SHARE)
                yield _event("figures", figures=figures(self._stats))
                if looking is not None and looking.done():
                    yield _event("wire", **_seen(looking.result()))
                    looking = None
                if looking is None and self._witness is not None:
                    looking = asyncio.create_task(asyncio.to_thread(self._witness.take))
            if (blocks := await shown.new(self._text)) is not None:
                yield _event("html", **blocks)
            for notice in self._notices:
                yield _event(**notice)
            yield _event("done", finish_reason=self._finish_reason, text=self._text, figures=figures(self._stats))
            if looking is not None:
                yield _event("wire", **_seen(await looking))
            if self._witness is not None:
                yield _event("wire", **_seen(await asyncio.to_thread(self._witness.take)))
        finally:
            self._cancel()

    async def _run(self) -> None:
        """Makes the answer and keeps it, however it ends."""
        await self._tried(self._make())
        await self._tried(self._keep_answer())

    async def _tried(self, work: Awaitable[None]) -> None:
        """Waits for a part of the work, and takes down how it failed, if it did."""
        try:
            await work
        except (asyncio.CancelledError, Cancelled):
            self._finish_reason = "cancelled"
        except ApiError as error:
            self._failed(error)
        except StipError as error:
            self._failed(api_error(error))
        except Exception as error:
            log_failure("an answer of the page", error)
            self._failed(ApiError(500, "the answer failed; the gateway's log says where"))

    async def _make(self) -> None:
        ids = await asyncio.to_thread(self._ids)
        async with self._served.pool.lease(ids) as lease:
            with self._watch.over(self._served, lease.number) as witness:
                self._witness = witness
                answer: Answer = lease.client.chat(
                    self._conversation, sampling=self._settings.sampling(), max_tokens=self._settings.max_tokens
                )
                self._answer, self._stats = answer, answer.stats
                try:
                    async for piece in lease.run(answer):
                        if piece:
                            await self._keep_question()
                        self._text += piece
                    await self._keep_question()  # the answer may be empty
                finally:
                    self._finish_reason = answer.finish_reason or ""

    def _ids(self) -> list[int]:
        """Of the whole conversation: the session that holds most of them is the one to ask."""
        prompter = Prompter(self._served.bundle)
        return prompter.ids(prompter.turns(self._conversation))

    def _failed(self, error: ApiError) -> None:
        self._finish_reason = "error"
        self._notices.append({"kind": "error", "message": error.message, "again": error.retry_after is not None})

    async def _keep_question(self) -> None:
        """Brings the chat to where the answer begins, once."""
        if self._held:
            self._held = False
            await self._put(self._kept, self._asked)

    async def _keep_answer(self) -> None:
        if self._text:
            details = {"finish_reason": self._finish_reason, "figures": figures(self._stats)}
            await self._put(self._said(), [StoredMessage("assistant", self._text, details, time.time())])

    async def _put(self, before: Sequence[StoredMessage], new: Sequence[StoredMessage]) -> None:
        title = title_of(self._said()[0].content)
        self._notice(await self._lines.put(self._chat.id, before, new, title=title))

    def _notice(self, said: str | None) -> None:
        if said is not None:
            self._notices.append({"kind": "notice", "message": said})


def _conversation(said: Sequence[StoredMessage]) -> list[dict[str, Any]]:
    """Messages as the prompt takes them. A question that was never answered is one with the next."""
    merged: list[tuple[str, Content]] = []
    for message in said:
        if merged and merged[-1][0] == message.role:
            merged[-1] = (message.role, joined(merged[-1][1], message.content))
        else:
            merged.append((message.role, message.content))
    return [{"role": role, "content": with_files(content)} for role, content in merged]


class _Shown:
    """What the page shows of an answer, block by block."""

    def __init__(self) -> None:
        self._text = ""
        self._blocks: list[str] = []

    async def new(self, text: str) -> dict[str, Any] | None:
        """Blocks that changed, and where they begin; None where nothing did."""
        if text == self._text:
            return None
        blocks = await asyncio.to_thread(render, text)
        same = 0
        while same < min(len(blocks), len(self._blocks)) and blocks[same] == self._blocks[same]:
            same += 1
        self._text, self._blocks = text, blocks
        return {"start": same, "blocks": blocks[same:]}


def figures(stats: Stats) -> dict[str, Any]:
    """The client's own figures of an answer."""
    counters = {name: value for name, value in vars(stats.counters).items() if isinstance(value, int)}
    own = {name: value for name, value in vars(stats).items() if isinstance(value, (int, float))}
    return own | {"tokens_per_second": stats.tokens_per_second} | counters


def _event(kind: str, **content: Any) -> bytes:
    return b"data: " + msgspec.json.encode({"kind": kind, **content}) + b"\n\n"


def _seen(sight: Sight) -> dict[str, Any]:
    return {
        "vectors": [_drawn(vector) for vector in sight.vectors[-SHOWN_VECTORS:]],
        "last": [round(float(value), 4) for value in sight.vectors[-1][:12]] if sight.vectors else [],
        "images": sight.images,
        "round_trips": [[round(one.total, 1), round(one.cloud, 1)] for one in sight.round_trips],
        "read": sight.read,
        "positions": sight.positions,
        "found": sight.found,
        "text": sight.text,
    }


def _drawn(vector: Array) -> str:
    """The values of a vector, as one signed byte each in base64."""
    spread = float(np.sqrt(np.square(vector).mean())) or 1.0
    steps = np.clip(np.rint(vector / spread * STEPS_A_SPREAD), -127, 127).astype(np.int8)
    return base64.b64encode(steps.tobytes()).decode()
