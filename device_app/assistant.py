"""The device's Python API: text in, text out, streamed.

with Assistant.open("OUT/device", "ws://127.0.0.1:8765") as assistant:
    for piece in assistant.chat([{"role": "user", "content": "Hello!"}]):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_app.answer import STOPPED, Answer
from device_app.bundle import Bundle
from device_app.connection import Address, Connection
from device_app.counters import Counters
from device_app.decoding import Chosen, Decoding
from device_app.drafting import Drafting, drafter_of
from device_app.pace import Pace
from device_app.prompt import Message, Prompt, Prompter
from device_app.sampler import Sampler, Sampling
from device_app.session import Session
from device_app.text import TextStream, one_line
from shared.errors import BundleError, Cancelled, RefusedError, UsageError

if TYPE_CHECKING:
    from device_app.grammar import Constraint
    from device_app.images import Source

GREEDY = Sampling()
DRAFTING = Drafting()
DESCRIBE = "Describe this image."
RETRY_SECONDS = 600.0


class Assistant:
    """A private assistant: a bundle on this device, a model in a cloud. One answer at a time."""

    def __init__(
        self,
        bundle: Bundle,
        address: Address,
        *,
        token: str | None = None,
        retry_seconds: float = RETRY_SECONDS,
        on_lost: Callable[[], None] = lambda: None,
        on_frame: Callable[[str, bytes], None] = lambda way, frame: None,
        drafting: Drafting = DRAFTING,
    ) -> None:
        """Options but `drafting` are `Connection`'s. Nothing is sent before the first question. Raises UsageError for
        an encoder."""
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
        self._prompter = Prompter(bundle)
        self._drafter = drafter_of(bundle) if drafting.most else None
        self._pace = Pace(drafting.most, drafting.bytes_a_token)  # one for all answers: it learns
        self._answers = 0  # made so far, whether begun or not
        self._running: int | None = None  # the number of the answer that was begun last, until its end
        self._running_lock = threading.RLock()  # an answer may be dropped wherever memory is taken
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
        retry_seconds: float = RETRY_SECONDS,
        drafting: Drafting = DRAFTING,
    ) -> Assistant:
        """Opens the bundle in `folder` for the cloud at `url`. Raises BundleError, UsageError."""
        address = Address(url, ca, insecure)
        bundle = Bundle.open(Path(folder))
        return cls(bundle, address, token=token, retry_seconds=retry_seconds, drafting=drafting)

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

    @property
    def round_trip_seconds(self) -> float | None:
        """How long a round trip takes on the line alone, smoothed; None before the first one."""
        return self._pace.round_trip_seconds

    def cancel(self) -> None:
        """Stops the answer that is being made; the cloud drops what it has not started."""
        self._connection.cancel()

    def interrupt(self, error: BaseException | None = None) -> None:
        """For signal handlers and other threads: who waits for the cloud raises KeyboardInterrupt, or `error`, where
        no reply is lost."""
        self._connection.interrupt(error or KeyboardInterrupt())

    def context(self) -> int:
        """Positions that a prompt and its answer may take. Connects if need be; raises CloudError."""
        return self._connection.open().context

    def shared_prefix(self, ids: Sequence[int]) -> int:
        """How many of `ids`, from the first on, the cloud holds for this session."""
        return self._session.shared_prefix(ids)

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 512,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """What the model reads of a conversation, with room for an answer of `max_tokens`, or a quarter of the context.

        The oldest turns are left out where they do not fit; the system prompt stays. Connects, to learn the context.
        Raises BundleError without a chat template, UsageError for an image that cannot be read or taken, RefusedError
        where even the last turn does not fit, CloudError otherwise.
        """
        self.bundle.want_kind("chat", "decoder", "vision-decoder")
        all_turns = self._prompter.turns(messages)
        system = [turn for turn in all_turns[:1] if turn.role == "system"]
        turns = all_turns[len(system) :]
        ids, dropped = self._prompter.ids(all_turns, tools), 0
        context = self.context()
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
            turns, dropped = turns[following:], dropped + 1
            ids = self._prompter.ids([*system, *turns], tools)
        return Prompt(ids, [image for turn in [*system, *turns] for image in turn.images], dropped)

    def answer(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling = GREEDY,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
    ) -> Answer:
        """What follows a prompt.

        stop: the answer ends before any of these. constraint: what it must be; a fresh one for each answer.
        top_logprobs: log-probabilities of each token and of so many of the most probable ones. Iterating raises
        CloudError, and Cancelled after `Answer.cancel`.
        """
        _check(max_tokens)
        self.bundle.want_kind("answer", "decoder", "vision-decoder")
        return self._answer(lambda: prompt, sampling, max_tokens, stop, constraint, top_logprobs)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = GREEDY,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Answer:
        """The answer to a conversation of messages with `role` and `content`. Options are those of `answer`.

        Content is text; where the model takes images it may be a list of parts, {"type": "text", "text": …} and
        {"type": "image", "image": a path, a file's bytes, or an image of Pillow's}. Nothing happens before the first
        step of the iteration, which raises what `prompt` does.
        """
        _check(max_tokens)
        self.bundle.want_kind("chat", "decoder", "vision-decoder")
        return self._answer(
            lambda: self.prompt(messages, max_tokens=max_tokens, tools=tools),
            sampling,
            max_tokens,
            stop,
            constraint,
            top_logprobs,
        )

    def complete(
        self,
        prompt: str,
        *,
        sampling: Sampling = GREEDY,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
    ) -> Answer:
        """The continuation of plain text, without a chat template. Options are those of `answer`."""
        return self.answer(
            self.text_prompt(prompt),
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            constraint=constraint,
            top_logprobs=top_logprobs,
        )

    def text_prompt(self, text: str) -> Prompt:
        """Plain text to go on from. Raises UsageError where it is empty."""
        self.bundle.want_kind("complete", "decoder", "vision-decoder")
        ids = self._prompter.text_ids(text)
        if not ids:
            raise UsageError("prompt: seen nothing, wanted at least one token")
        return Prompt(ids)

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
        return self._answer(lambda: Prompt(manifest.start_ids), GREEDY, max_tokens, stop, None, None, source)

    def _answer(
        self,
        prompt_of: Callable[[], Prompt],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
        constraint: Constraint | None,
        top_logprobs: int | None,
        source: list[int] | None = None,
    ) -> Answer:
        manifest = self.bundle.manifest

        def pieces(answer: Answer) -> Generator[str]:
            started = time.perf_counter()
            prompt = prompt_of()
            ids = prompt.ids
            answer.stats.dropped_turns = prompt.dropped_turns
            answer.stats.prompt_tokens = len(ids if source is None else source)
            answer.stats.cached_tokens = min(self.shared_prefix(ids), len(ids) - 1) if source is None else 0
            context = self.context()
            if len(ids) > context:
                raise RefusedError(
                    "context_full",
                    f"prompt: it takes {len(ids)} tokens, wanted at most {context}",
                    hint="shorten it",
                )
            for image in prompt.images:
                self._session.add_image(image)
            decoding = Decoding(
                self._connection,
                Sampler(sampling, manifest.vocab_size, ids, manifest.banned_ids),
                sampling,
                source=source,
                constraint=constraint,
                top_logprobs=top_logprobs,
                drafter=self._drafter,
                pace=self._pace,
            )
            text = TextStream(self.bundle.tokenizer.detokenizer(), manifest.hidden_ids, stop)
            yield from self._pieces(answer, decoding.tokens(ids, max_tokens), text, started)

        self._answers += 1
        number = self._answers
        return Answer(lambda answer: self._watched(number, answer, pieces(answer)), lambda: self._cancel(number))

    def _cancel(self, number: int) -> None:
        """Whoever makes this answer raises Cancelled; others are not disturbed."""
        with self._running_lock:
            if self._running == number:
                self.interrupt(Cancelled(STOPPED))

    def _watched(self, number: int, answer: Answer, pieces: Generator[str]) -> Generator[str]:
        """The pieces, timed; an answer that does not come to its end is cancelled in the cloud."""
        started, stats = time.perf_counter(), answer.stats
        with self._running_lock:
            self._running = number
            self._connection.attend()
        stats.counters = self._session.counters = Counters()
        try:
            if answer.cancelled:  # just now
                raise Cancelled(STOPPED)
            yield from pieces
        except BaseException:
            if self._running == number:  # otherwise the question that is open is another answer's
                self.cancel()
            with suppress(ReferenceError):  # left by all who knew it
                answer.finish_reason = "cancelled"
            raise
        finally:
            stats.seconds = time.perf_counter() - started
            with self._running_lock:
                if self._running == number:
                    self._running = None
                    self._connection.attend()

    def _pieces(self, answer: Answer, tokens: Iterator[Chosen], text: TextStream, started: float) -> Generator[str]:
        """Text that has become certain, token after token."""
        stats = answer.stats
        for chosen in tokens:
            answer.ids.append(chosen.id)
            if chosen.logprobs is not None:
                answer.logprobs.append(chosen.logprobs)
            stats.tokens += 1
            stats.seconds = time.perf_counter() - started
            stats.first_token_seconds = stats.first_token_seconds or stats.seconds
            if chosen.id in self.bundle.manifest.end_ids:
                answer.finish_reason = "stop"
                break
            with stats.counters.timed("detokenise"):
                piece = text.push(chosen.id)
            if piece:
                yield piece
            if text.stopped:
                answer.finish_reason = "stop"
                break
        else:
            answer.finish_reason = "length"
        if piece := text.finish():
            yield piece
        answer.stop_text = text.stop_text


def _check(max_tokens: int) -> None:
    if max_tokens < 1:
        raise UsageError(f"max_tokens: seen {max_tokens}, wanted at least 1")
