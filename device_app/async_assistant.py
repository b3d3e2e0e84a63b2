"""The same assistant for asyncio: the blocking one in a thread of its own.

async with await AsyncAssistant.open("OUT/device", "ws://127.0.0.1:8765") as assistant:
    async for piece in assistant.chat([{"role": "user", "content": "Hello!"}]):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from device_app.answer import STOPPED, Answer, FinishReason, Stats
from device_app.assistant import DESCRIBE, Assistant
from device_app.logprobs import TokenLogprobs
from device_app.prompt import Message, Prompt
from device_app.text import one_line
from shared.errors import Cancelled

if TYPE_CHECKING:
    from device_app.images import Source

AGAIN_SECONDS = 0.2  # between attempts to cancel: one may come just before the answer begins, and be missed

T = TypeVar("T")


class AsyncAnswer:
    """An answer as it is made: `async for` gives its text. Nothing is asked before the first piece is awaited.

    From then on it is made whether anybody iterates or not, so `text`, `ids`, `logprobs` and `stats` may be ahead of
    the pieces. Cancelling the task that awaits a piece cancels the answer, and so does leaving `async with`; both
    return when the thread is free again.
    """

    def __init__(self, answer: Answer, submit: Callable[[Callable[[], None]], Future[None]]) -> None:
        self._answer = answer
        self._submit = submit
        self._job: Future[None] | None = None
        # Pieces, then None at the end, or the exception that ended it.
        self._pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._ended = False

    @property
    def text(self) -> str:
        """What was said so far."""
        return self._answer.text

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return self._answer.ids

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """One a token, where they were asked for."""
        return self._answer.logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None before."""
        return self._answer.finish_reason

    @property
    def stop_text(self) -> str | None:
        """The stop string that ended it."""
        return self._answer.stop_text

    @property
    def stats(self) -> Stats:
        """Its figures."""
        return self._answer.stats

    def __aiter__(self) -> AsyncAnswer:
        return self

    async def __anext__(self) -> str:
        if self._ended:
            raise StopAsyncIteration
        if self._job is None:
            self._begin()
        try:
            piece = await self._pieces.get()
        except asyncio.CancelledError:
            await self.stop()
            raise
        if isinstance(piece, str):
            return piece
        self._ended = True
        if piece is None:
            raise StopAsyncIteration
        raise piece

    async def finish(self) -> AsyncAnswer:
        """Runs to the end and gives itself."""
        async for _ in self:
            pass
        return self

    async def stop(self) -> None:
        """Ends the answer here; the cloud drops what it has not started. Returns when the thread is free."""
        self._ended = True
        if self._job is None:
            return
        if self._job.cancel():  # its turn had not come
            self._pieces.put_nowait(Cancelled(STOPPED))  # for another task that waits
            return
        await _until_done(self._job, self._answer.cancel)

    async def __aenter__(self) -> AsyncAnswer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def __del__(self) -> None:
        # As a blocking answer that nobody holds any more: it is stopped.
        if self._job is not None and not self._job.done() and not self._job.cancel():
            self._answer.cancel()

    def _begin(self) -> None:
        loop, pieces, answer = asyncio.get_running_loop(), self._pieces, self._answer

        # Holds what it needs and not the AsyncAnswer, which would never be left by all who knew it.
        def make() -> None:
            end: BaseException | None = None
            try:
                for piece in answer:
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)
            except BaseException as error:
                end = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, end)

        self._job = self._submit(make)


class AsyncAssistant:
    """An `Assistant` for asyncio. One answer at a time: a second one waits for the first, in order.

    Errors are those of `Assistant`. Its callbacks (`on_lost`, `on_frame`) are called in the thread.
    """

    def __init__(self, assistant: Assistant) -> None:
        """assistant: nobody else uses it from now on."""
        self._assistant = assistant
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stip-assistant")
        self._answers: WeakSet[AsyncAnswer] = WeakSet()
        self._calls: WeakSet[Future[Any]] = WeakSet()  # whatever else was asked of the thread
        self._closing = asyncio.Lock()
        self._closed = False

    @classmethod
    async def open(cls, folder: str | Path, url: str, **options: Any) -> AsyncAssistant:
        """Opens the bundle in `folder` for the cloud at `url`. Options are those of `Assistant.open`."""
        return cls(await asyncio.to_thread(Assistant.open, folder, url, **options))

    async def __aenter__(self) -> AsyncAssistant:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stops what is being answered and ends the session in the cloud. Once that is done, does nothing."""
        async with self._closing:
            if self._closed:
                return
            for answer in list(self._answers):
                await answer.stop()
            for call in list(self._calls):
                if not call.cancel():
                    await _until_done(call, self._interrupt)
            await self._run(self._assistant.close)
            self._thread.shutdown(wait=False)
            self._closed = True

    def chat(self, messages: Sequence[Message], **options: Any) -> AsyncAnswer:
        """The answer to a conversation. Options are those of `Assistant.chat`."""
        return self._answered(self._assistant.chat(messages, **options))

    def complete(self, prompt: str, **options: Any) -> AsyncAnswer:
        """The continuation of plain text. Options are those of `Assistant.complete`."""
        return self._answered(self._assistant.complete(prompt, **options))

    def answer(self, prompt: Prompt, **options: Any) -> AsyncAnswer:
        """What follows a prompt. Options are those of `Assistant.answer`."""
        return self._answered(self._assistant.answer(prompt, **options))

    def translate(self, text: str, **options: Any) -> AsyncAnswer:
        """What a decoder that reads `text` says. Options are those of `Assistant.translate`."""
        return self._answered(self._assistant.translate(text, **options))

    async def describe(self, image: Source, prompt: str = DESCRIBE, *, max_tokens: int = 128) -> str:
        """What an image shows, in one line."""
        self._assistant.bundle.want_kind("describe", "vision-decoder")
        parts = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        answer = self.chat([{"role": "user", "content": parts}], max_tokens=max_tokens)
        return one_line((await answer.finish()).text)

    async def prompt(self, messages: Sequence[Message], **options: Any) -> Prompt:
        """What the model reads of a conversation. Options are those of `Assistant.prompt`."""
        return await self._run(lambda: self._assistant.prompt(messages, **options))

    async def context(self) -> int:
        """Positions that a prompt and its answer may take."""
        return await self._run(self._assistant.context)

    def _answered(self, answer: Answer) -> AsyncAnswer:
        made = AsyncAnswer(answer, self._thread.submit)
        self._answers.add(made)
        return made

    async def _run(self, call: Callable[[], T]) -> T:
        """Calls in the thread, in turn. Cancelling the task ends the call where it waits for the cloud."""
        cancelled = False

        def called() -> T:
            try:
                return call()
            except Cancelled:
                if cancelled:
                    raise
                return call()  # it was meant for what came before, which ended by itself just then

        job = self._thread.submit(called)
        self._calls.add(job)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            cancelled = True
            if not job.cancelled():
                await _until_done(job, self._interrupt)
            raise

    def _interrupt(self) -> None:
        self._assistant.interrupt(Cancelled(STOPPED))


async def _until_done(job: Future[Any], cancel: Callable[[], None]) -> None:
    """Cancels what a thread does, and waits until it is out. What came of it does not matter any more."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    job.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
    while not job.done():
        cancel()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(done.wait(), AGAIN_SECONDS)
