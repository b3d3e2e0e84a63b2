"""The device's Python API: text in, text out, streamed.

with Assistant.open("OUT/device", "ws://127.0.0.1:8765") as assistant:
    for piece in assistant.chat([{"role": "user", "content": "Hello!"}]):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from device_app.bundle import Bundle
from device_app.connection import Address, Connection
from device_app.sampler import Sampler, Sampling
from device_app.session import Counters, Session
from device_app.text import TextStream
from shared.errors import BundleError, RefusedError, UsageError

Message = Mapping[str, str]
FinishReason = Literal["stop", "length", "cancelled"]

GREEDY = Sampling()
TOP_K = 256  # rows asked for: 2 KiB a token in float32, and more than 90 % of the mass


@dataclass
class Stats:
    """Figures of one answer. Times in seconds, bytes of WebSocket payload; `counters` has the details."""

    prompt_tokens: int = 0
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
    """An answer as it is made: iterate over its text. `ids`, `text`, `finish_reason` and `stats` grow with it."""

    def __init__(self, pieces: Callable[[Answer], Generator[str]]) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stats = Stats()
        self._pieces = pieces(self)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def finish(self) -> Answer:
        """Runs to the end and gives itself."""
        for _ in self:
            pass
        return self

    def stop(self) -> None:
        """Ends the answer here; the cloud drops what it has not started."""
        self._pieces.close()


class Assistant:
    """A private assistant: a bundle on this device, a model in a cloud. One answer at a time."""

    def __init__(
        self,
        bundle: Bundle,
        address: Address,
        *,
        token: str | None = None,
        retry_seconds: float = 60.0,
        on_lost: Callable[[], None] = lambda: None,
        on_frame: Callable[[str, bytes], None] = lambda way, frame: None,
    ) -> None:
        """Options are `Connection`'s. Nothing is sent before the first question."""
        self.bundle = bundle
        self._session = Session(
            bundle.key, bundle.embed, bundle.classify, served_name=bundle.manifest.served_name, token=token
        )
        self._connection = Connection(
            self._session, address, retry_seconds=retry_seconds, on_lost=on_lost, on_frame=on_frame
        )

    @classmethod
    def open(
        cls,
        folder: str | Path,
        url: str,
        *,
        token: str | None = None,
        ca: Path | None = None,
        insecure: bool = False,
        retry_seconds: float = 60.0,
    ) -> Assistant:
        """Opens the bundle in `folder` for the cloud at `url`. Raises BundleError, UsageError."""
        address = Address(url, ca, insecure)
        return cls(Bundle.open(Path(folder)), address, token=token, retry_seconds=retry_seconds)

    def __enter__(self) -> Assistant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session in the cloud."""
        self._connection.close()

    def cancel(self) -> None:
        """Stops the answer that is being made; the cloud drops what it has not started."""
        self._connection.cancel()

    def interrupt(self) -> None:
        """For signal handlers: the answer being made raises KeyboardInterrupt where no reply is lost."""
        self._connection.interrupted = True

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = GREEDY,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
    ) -> Answer:
        """The answer to a conversation of messages with `role` and `content`.

        When it no longer fits the context, the oldest turns are left out; the system prompt stays. Iterating raises
        BundleError without a chat template, RefusedError where even the last turn does not fit, CloudError otherwise.
        """
        _check(max_tokens)
        return Answer(
            lambda answer: self._run(
                answer, lambda: self._fit(messages, max_tokens, answer), sampling, max_tokens, stop
            )
        )

    def complete(
        self, prompt: str, *, sampling: Sampling = GREEDY, max_tokens: int = 512, stop: Sequence[str] = ()
    ) -> Answer:
        """The continuation of plain text, without a chat template. Iterating raises CloudError."""
        _check(max_tokens)
        ids = self.bundle.manifest.prefix_ids + self.bundle.tokenizer.encode(prompt)
        if not ids:
            raise UsageError("prompt: seen nothing, wanted at least one token")
        return Answer(lambda answer: self._run(answer, lambda: ids, sampling, max_tokens, stop))

    def _fit(self, messages: Sequence[Message], max_tokens: int, answer: Answer) -> list[int]:
        """The prompt's ids, without the oldest turns if they leave no room for an answer."""
        if self.bundle.template is None:
            raise BundleError(
                "this bundle has no chat template",
                hint="its model continues text: use complete(), or -p at the terminal",
            )
        context = self._connection.open().context
        most = context - min(max_tokens, context // 4)
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = list(messages[len(system) :])
        while True:
            ids: list[int] = self.bundle.tokenizer.encode(self.bundle.template.render([*system, *turns]))
            if len(ids) <= most:
                return ids
            # A turn is a user's message and what follows it.
            following = next((at for at in range(1, len(turns)) if turns[at]["role"] == "user"), None)
            if following is None:
                raise RefusedError(
                    "context_full",
                    f"prompt: the last turn alone takes {len(ids)} tokens, wanted at most {most} of {context}",
                    hint="shorten it, or ask for fewer tokens",
                )
            turns = turns[following:]
            answer.stats.dropped_turns += 1

    def _run(
        self,
        answer: Answer,
        prompt_of: Callable[[], list[int]],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
    ) -> Generator[str]:
        started = time.perf_counter()
        self._connection.interrupted = False
        stats, counters = answer.stats, Counters()
        stats.counters = self._session.counters = counters
        manifest = self.bundle.manifest
        text = TextStream(self.bundle.tokenizer.detokenizer(), manifest.hidden_ids, stop)
        try:
            prompt = prompt_of()
            stats.prompt_tokens = len(prompt)
            for token in self._tokens(prompt, sampling, max_tokens):
                answer.ids.append(token)
                stats.tokens += 1
                stats.seconds = time.perf_counter() - started
                stats.first_token_seconds = stats.first_token_seconds or stats.seconds
                if token in manifest.end_ids:
                    answer.finish_reason = "stop"
                    break
                with counters.timed("detokenise"):
                    piece = text.push(token)
                if piece:
                    yield piece
                if text.stopped:
                    answer.finish_reason = "stop"
                    break
            else:
                answer.finish_reason = "length"
            if piece := text.finish():
                yield piece
        except BaseException:
            answer.finish_reason = "cancelled"
            self.cancel()
            raise
        finally:
            stats.seconds = time.perf_counter() - started

    def _tokens(self, prompt: list[int], sampling: Sampling, max_tokens: int) -> Iterator[int]:
        """Token after token, until `max_tokens` or the end of the context."""
        opened = self._connection.open()
        if len(prompt) > opened.context:
            raise RefusedError(
                "context_full",
                f"prompt: it takes {len(prompt)} tokens, wanted at most {opened.context}",
                hint="shorten it",
            )
        counters = self._session.counters
        sampler = Sampler(sampling, self.bundle.manifest.vocab_size, prompt)
        temperature = sampling.temperature or 1.0
        # A few more than the sampler keeps, so that ties at its edge are seen; all where the cloud gives no so many.
        # The cloud is not told where the classifier is on the device: every row is full then.
        enough = max(TOP_K, sampling.top_k + 16)
        top_k = enough if enough <= opened.max_top_k else 0
        ids = list(prompt)
        for _ in range(max_tokens):
            if len(ids) > opened.context:
                return
            [row] = self._connection.rows(ids, top_k=top_k, temperature=temperature)
            with counters.timed("sample"):
                # Greedy sorts nothing; a draw sorts a full row only where its head leaves the token open.
                token = sampler.choose(row.head(enough) if sampling.temperature else row, len(ids))
                if token is None and row.full:
                    token = sampler.choose(row, len(ids))
            if token is None:
                counters.full_rows += 1
                [row] = self._connection.rows(ids, top_k=0, temperature=temperature)
                with counters.timed("sample"):
                    token = sampler.choose(row, len(ids))
                assert token is not None  # a full row always settles it
            sampler.observe(token)
            ids.append(token)
            yield token


def _check(max_tokens: int) -> None:
    if max_tokens < 1:
        raise UsageError(f"max_tokens: seen {max_tokens}, wanted at least 1")
