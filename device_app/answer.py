"""An answer as it is made, and its figures."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

from device_app.counters import Counters
from device_app.logprobs import TokenLogprobs
from shared.errors import Cancelled

STOPPED = "the answer was stopped"

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Stats:
    """Figures of one answer. Times in seconds, bytes of WebSocket payload; `counters` has the details."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt: those that the cloud held already
    tokens: int = 0
    dropped_turns: int = 0  # oldest turns that no longer fit the context
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    counters: Counters = field(default_factory=Counters)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token, which waits for the prompt, is left out."""
        decoding = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / decoding if self.tokens > 1 and decoding > 0 else 0.0


class Answer:
    """An answer as it is made: iterate over its text. `ids`, `text`, `logprobs`, `finish_reason` and `stats` grow with
    it. One thread iterates; any may cancel."""

    def __init__(self, pieces: Callable[[Answer], Generator[str]], cancel: Callable[[], None]) -> None:
        """pieces: makes the text, without keeping the answer alive: an answer that nobody holds any more is stopped.
        cancel: makes whoever waits for the next piece raise Cancelled."""
        self.text = ""
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []  # one a token, where they were asked for
        self.finish_reason: FinishReason | None = None
        self.stop_text: str | None = None  # the stop string that ended it
        self.stats = Stats()
        self._pieces = pieces(weakref.proxy(self))
        self._cancel = cancel
        self.cancelled = False  # by `cancel`

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.cancelled and self.finish_reason is None:
            self.finish_reason = "cancelled"  # of one that was not begun; otherwise whoever makes it says so too
            piece = self._pieces.throw(Cancelled(STOPPED))
        else:
            piece = next(self._pieces)
        self.text += piece
        return piece

    def finish(self) -> Answer:
        """Runs to the end and gives itself."""
        for _ in self:
            pass
        return self

    def stop(self) -> None:
        """Ends the answer here; the cloud drops what it has not started. For the thread that iterates."""
        self._pieces.close()

    def cancel(self) -> None:
        """The same from another thread: the one that iterates raises Cancelled, within about POLL_SECONDS."""
        self.cancelled = True
        if self.finish_reason is None:
            self._cancel()
