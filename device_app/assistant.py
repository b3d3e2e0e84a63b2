"""The device's Python API: text in, text out, streamed.

with Assistant.open("OUT/device", "ws://127.0.0.1:8765") as assistant:
    for piece in assistant.chat([{"role": "user", "content": "Hello!"}]):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from device_app.bundle import Bundle
from device_app.connection import Address, Connection
from device_app.counters import Counters
from device_app.prompt import Message, Prompter
from device_app.sampler import Sampler, Sampling
from device_app.session import Session
from device_app.text import TextStream, one_line
from shared.errors import BundleError, RefusedError, UsageError

if TYPE_CHECKING:
    from device_app.images import Source

FinishReason = Literal["stop", "length", "cancelled"]

GREEDY = Sampling()
DESCRIBE = "Describe this image."
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
        """Options are `Connection`'s. Nothing is sent before the first question. Raises UsageError for an encoder."""
        bundle.want_kind("assistant", "decoder", "vision-decoder", "encoder-decoder")
        self.bundle = bundle
        self._session = Session(
            bundle.key,
            bundle.embed,
            bundle.classify,
            served_name=bundle.manifest.served_name,
            context=bundle.manifest.context,
            widths=bundle.widths,
            token=token,
        )
        self._prompter = Prompter(bundle, self._session.add_image)
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

    @property
    def counters(self) -> Counters:
        """Those of the last answer."""
        return self._session.counters

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

        Content is text; where the model takes images it may be a list of parts, {"type": "text", "text": …} and
        {"type": "image", "image": a path, a file's bytes, or an image of Pillow's}.

        When it no longer fits the context, the oldest turns are left out; the system prompt stays. Iterating raises
        BundleError without a chat template, UsageError for an image that cannot be read or taken, RefusedError where
        even the last turn does not fit, CloudError otherwise.
        """
        _check(max_tokens)
        self.bundle.want_kind("chat", "decoder", "vision-decoder")
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
        self.bundle.want_kind("complete", "decoder", "vision-decoder")
        ids = self._prompter.text_ids(prompt)
        if not ids:
            raise UsageError("prompt: seen nothing, wanted at least one token")
        return Answer(lambda answer: self._run(answer, lambda: ids, sampling, max_tokens, stop))

    def describe(self, image: Source, prompt: str = DESCRIBE, *, max_tokens: int = 128) -> str:
        """What an image shows, in one line. Raises UsageError for what is no image, CloudError otherwise."""
        self.bundle.want_kind("describe", "vision-decoder")
        parts = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        return one_line(self.chat([{"role": "user", "content": parts}], max_tokens=max_tokens).finish().text)

    def translate(self, text: str, *, max_tokens: int = 512, stop: Sequence[str] = ()) -> Answer:
        """What a decoder that reads `text` says, greedily: a translation, or what else the model was made for.

        Raises UsageError where there is nothing to read. Iterating raises RefusedError where it is too long,
        CloudError otherwise.
        """
        _check(max_tokens)
        self.bundle.want_kind("translate", "encoder-decoder")
        manifest = self.bundle.manifest
        if not manifest.start_ids:
            raise BundleError(
                "start_ids: seen none, wanted what the decoder begins with", hint="export the bundle again"
            )
        tokens = self.bundle.tokenizer.encode(text)
        if not tokens:
            raise UsageError("text: seen nothing, wanted at least one token")
        source = [*manifest.prefix_ids, *tokens, *manifest.suffix_ids]
        return Answer(
            lambda answer: self._run(answer, lambda: manifest.start_ids, GREEDY, max_tokens, stop, source=source)
        )

    def _fit(self, messages: Sequence[Message], max_tokens: int, answer: Answer) -> list[int]:
        """The prompt's ids, without the oldest turns if they leave no room for an answer."""
        all_turns = self._prompter.turns(messages)
        system = [turn for turn in all_turns[:1] if turn.role == "system"]
        turns = all_turns[len(system) :]
        ids = self._prompter.ids(all_turns)
        context = self._connection.open().context
        most = context - min(max_tokens, context // 4)
        while len(ids) > most:
            # A turn is a user's message and what follows it.
            following = next((at for at in range(1, len(turns)) if turns[at].role == "user"), None)
            if following is None:
                raise RefusedError(
                    "context_full",
                    f"prompt: the last turn alone takes {len(ids)} tokens, wanted at most {most} of {context}",
                    hint="shorten it, or ask for fewer tokens",
                )
            turns = turns[following:]
            answer.stats.dropped_turns += 1
            ids = self._prompter.ids([*system, *turns])
        return ids

    def _run(
        self,
        answer: Answer,
        prompt_of: Callable[[], list[int]],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
        *,
        source: list[int] | None = None,
    ) -> Generator[str]:
        started = time.perf_counter()
        self._connection.interrupted = False
        stats, counters = answer.stats, Counters()
        stats.counters = self._session.counters = counters
        manifest = self.bundle.manifest
        text = TextStream(self.bundle.tokenizer.detokenizer(), manifest.hidden_ids, stop)
        try:
            prompt = prompt_of()
            stats.prompt_tokens = len(prompt if source is None else source)
            for token in self._tokens(prompt, source, sampling, max_tokens):
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

    def _tokens(
        self, prompt: list[int], source: list[int] | None, sampling: Sampling, max_tokens: int
    ) -> Iterator[int]:
        """Token after token, until `max_tokens` or the end of the context."""
        opened = self._connection.open()
        if len(prompt) > opened.context:
            raise RefusedError(
                "context_full",
                f"prompt: it takes {len(prompt)} tokens, wanted at most {opened.context}",
                hint="shorten it",
            )
        counters = self._session.counters
        manifest = self.bundle.manifest
        sampler = Sampler(sampling, manifest.vocab_size, prompt, manifest.banned_ids)
        temperature = sampling.temperature or 1.0
        # A few more than the sampler keeps, so that ties at its edge are seen; all where the cloud gives no so many.
        # The cloud is not told where the classifier is on the device: every row is full then.
        enough = max(TOP_K, sampling.top_k + 16)
        top_k = enough if enough <= opened.max_top_k else 0
        ids = list(prompt)
        for _ in range(max_tokens):
            if len(ids) > opened.context:
                return
            [row] = self._connection.rows(ids, source=source, top_k=top_k, temperature=temperature)
            with counters.timed("sample"):
                # Greedy sorts nothing; a draw sorts a full row only where its head leaves the token open.
                token = sampler.choose(row.head(enough) if sampling.temperature else row, len(ids))
                if token is None and row.full:
                    token = sampler.choose(row, len(ids))
            if token is None:
                counters.full_rows += 1
                [row] = self._connection.rows(ids, source=source, top_k=0, temperature=temperature)
                with counters.timed("sample"):
                    token = sampler.choose(row, len(ids))
                if token is None:  # a full row settles all else
                    raise BundleError("banned_ids: they leave no token to choose", hint="export the bundle again")
            sampler.observe(token)
            ids.append(token)
            yield token


def _check(max_tokens: int) -> None:
    if max_tokens < 1:
        raise UsageError(f"max_tokens: seen {max_tokens}, wanted at least 1")
