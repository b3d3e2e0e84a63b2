"""A device as a load has it: a real assistant with a connection of its own, that notes when tokens come."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from dataclasses import dataclass

import msgspec

from benchmarks.prompts import PROMPTS
from benchmarks.timelines import Timeline
from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.drafting import NO_DRAFTS
from device_app.prompt import Message
from device_app.sampler import Sampling
from device_app.tokenizer import Detokenizer, Tokenizer
from shared.wire import Error, Opened, decode

WARM_UP = "Say hello."


@dataclass
class Recoveries:
    """What the cloud forgot or lost of a device, and what came of it, as the device sees it."""

    evictions: int = 0  # requests that were answered out_of_step with a KV length of 0
    lost: int = 0  # connections that broke
    resumes: int = 0  # connections made again that found what they had in the cloud
    replays: int = 0  # times that all was sent again: after evictions, and connections that found nothing

    def add(self, other: Recoveries) -> None:
        """Counts another's as well."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Device:
    """One device. Its answers go on past their end, so that each has all the tokens that were asked for."""

    def __init__(self, bundle: Bundle, address: Address, number: int) -> None:
        """bundle: may be shared by devices of one process. A bearer token is taken from STIP_TOKEN."""
        self.number = number
        self.recoveries = Recoveries()
        self._clock = _Clock(bundle.tokenizer)
        self._sampling = Sampling(temperature=0.7, top_p=0.9, seed=number)
        self._was_open = False
        self._conversation: list[Message] = []
        self._turns = number  # so that devices differ in what they ask, and in when they start anew
        endless = msgspec.structs.replace(bundle.manifest, end_ids=[], hidden_ids=[])
        self._assistant = Assistant(
            dataclasses.replace(bundle, manifest=endless, tokenizer=self._clock),
            address,
            token=os.environ.get("STIP_TOKEN"),
            on_lost=self._lost,
            on_frame=self._travelled,
            drafting=NO_DRAFTS,  # what the cloud does for a token is measured
        )

    def warm_up(self) -> None:
        """Connects and makes a token, which nobody counts."""
        self._assistant.chat([{"role": "user", "content": WARM_UP}], max_tokens=1).finish()

    def forget(self) -> None:
        """Ends the session; the next answer opens another, which holds nothing."""
        self._assistant.close()
        self._was_open = False

    def answer(self, prompt: str, tokens: int, started: threading.Event, stopped: threading.Event) -> Timeline:
        """A conversation of one question. Sets `started` with the first token; ends early once `stopped` is set."""
        began = time.monotonic()
        answer = self._assistant.chat([{"role": "user", "content": prompt}], sampling=self._sampling, max_tokens=tokens)
        for _ in answer:
            started.set()
            if stopped.is_set():
                answer.stop()
        return Timeline(self.number, began, self._clock.moments)

    def turn(self, tokens: int, turns: int) -> Timeline:
        """One more question in a conversation, that starts anew after `turns` of them."""
        if self._turns % turns == 0:
            self._conversation = []
        self._conversation.append({"role": "user", "content": PROMPTS[self._turns % len(PROMPTS)]})
        self._turns += 1
        began = time.monotonic()
        answer = self._assistant.chat(self._conversation, sampling=self._sampling, max_tokens=tokens).finish()
        self._conversation.append({"role": "assistant", "content": answer.text})
        return Timeline(self.number, began, self._clock.moments)

    def _lost(self) -> None:
        self.recoveries.lost += 1

    def _travelled(self, way: str, frame: bytes) -> None:
        if way == "up":
            return
        message = decode(frame)
        if isinstance(message, Opened):
            self.recoveries.resumes += message.kv_length > 0
            self.recoveries.replays += self._was_open and message.kv_length == 0
            self._was_open = True
        elif isinstance(message, Error) and message.code == "out_of_step" and message.kv_length == 0:
            self.recoveries.evictions += 1
            self.recoveries.replays += 1


class _Clock:
    """A tokenizer that notes the moment of each token of the latest answer, as every one is detokenised."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.moments: list[float] = []
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def detokenizer(self) -> Detokenizer:
        self.moments = []
        return _Ticking(self._tokenizer.detokenizer(), self.moments)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)


class _Ticking:
    def __init__(self, stream: Detokenizer, moments: list[float]) -> None:
        self._stream = stream
        self._moments = moments

    def push(self, token_id: int) -> str:
        self._moments.append(time.monotonic())
        return self._stream.push(token_id)

    def finish(self) -> str:
        return self._stream.finish()
