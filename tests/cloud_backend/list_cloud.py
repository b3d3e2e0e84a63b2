"""A session without a socket or a model: its engine holds lists, and says only which row its logits are of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from cloud_backend.engine import EncodedRows, EncodeWork, HiddenRows, LogitRows, Result, Work
from cloud_backend.leases import Leases
from cloud_backend.limits import Limits
from cloud_backend.session import Context, Session
from shared import wire

HIDDEN, VOCAB, CONTEXT = 4, 10, 32
LIMITS = Limits(max_rows=6, max_full_rows=3, max_top_k=8)
TOKEN = "stip_correct-horse"
SECRET_VALUE = 1234.5678  # an embedding holds it; no reply's text may


@dataclass
class ListCache:
    """A KV cache that shows what it holds: the first value of each embedding. `reads`: it needs a source."""

    reads: bool = False
    source: list[float] | None = None
    held: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.held)

    @property
    def ready(self) -> bool:
        return not self.reads or self.source is not None

    def cut(self, keep: int) -> None:
        del self.held[keep:]

    def clear(self) -> None:
        self.held, self.source = [], None


class ListEngine:
    """The least that a session needs of an engine. Its logits say only which row they are of."""

    hidden_size, vocab_size, context = HIDDEN, VOCAB, CONTEXT
    appends: tuple[str, ...] = ("text",)
    encodes: tuple[str, ...] = ()
    same_length = False
    encoder_size = encoder_context = image_tokens = 0
    dtype: wire.FloatName = "float32"
    device = "cpu"
    pool = None

    def __init__(self) -> None:
        self.caches: list[ListCache] = []

    def new_cache(self) -> Any:
        self.caches.append(ListCache("store" in self.encodes))
        return self.caches[-1]

    def run(self, batch: list[Work]) -> list[Result]:
        return [self._run_one(work) for work in batch]

    def _run_one(self, work: Work) -> Result:
        cache: Any = work.cache  # a ListCache
        names = [float(row[0]) for row in work.embeddings]
        if isinstance(work, EncodeWork):
            if work.want == "store":
                cache.source, cache.held = names, []
            return EncodedRows(work.embeddings if work.want == "hidden" else np.empty((0, HIDDEN), np.float32))
        cache.cut(work.keep)
        if work.kind == "image":
            names = names[:1] * self.image_tokens
        cache.held += names
        answered = np.array(names[len(names) - work.rows :], wire.DTYPES[work.dtype])
        if work.want == "hidden":
            return HiddenRows(np.repeat(answered[:, None], HIDDEN, 1))
        k = min(work.top_k, VOCAB) or VOCAB
        ids = np.zeros((work.rows, k if work.top_k else 0), np.uint32)
        return LogitRows(np.repeat(answered[:, None], k, 1), ids, np.zeros((work.rows, 2), np.float32))


class Cloud:
    """A session with its engine, and every frame it sent, decoded."""

    def __init__(self, limits: Limits = LIMITS, *, token: str | None = None, **engine: Any) -> None:
        self.engine = ListEngine()
        for name, value in engine.items():
            setattr(self.engine, name, value)
        self.leases = Leases(limits.grace_seconds, lambda engine, cache: cache.clear())
        self.sent: list[Any] = []
        self._limits, self._token = limits, token
        self.connect()

    def connect(self) -> None:
        """From now on it is a new connection's session that is given messages."""
        contexts = {("tiny", "key"): Context("tiny", "key", self.engine)}
        self.session = Session(contexts, self._limits, self._owner, self.leases)

    def _owner(self, message: wire.Open) -> str | None:
        return "car" if self._token in (None, message.token) else None

    @property
    def cache(self) -> ListCache:
        return self.engine.caches[-1]

    def receive(self, *messages: wire.Message | bytes) -> list[Any]:
        """Gives the session these messages, and what it says at once."""
        for message in messages:
            self.session.receive(message if isinstance(message, bytes) else wire.encode(message))
        return self.replies()

    def replies(self) -> list[Any]:
        new = [wire.decode(frame) for frame in self.session.outbox]
        self.session.outbox.clear()
        self.sent += new
        return new

    def run(self) -> list[Any]:
        """Lets the engine do all that waits, and gives what the session says to it."""
        while (work := self.session.start()) is not None:
            self.finish(work)
        return self.replies()

    def finish(self, work: Work) -> None:
        (result,) = self.engine.run([work])
        self.session.finish(result)

    def ask(self, *messages: wire.Message | bytes) -> list[Any]:
        return self.receive(*messages) + self.run()


OPEN = wire.Open(model="tiny", key_id="key")


def opened(limits: Limits = LIMITS, **options: Any) -> Cloud:
    cloud = Cloud(limits, **options)
    cloud.receive(OPEN)
    cloud.sent.clear()
    return cloud


def append(
    seq: int, keep: int, *names: float, rows: int = 0, top_k: int = 4, dtype: str = "float32", **fields: Any
) -> wire.Append:
    """An Append of one embedding a name, the name its first value."""
    embeddings = np.zeros((len(names), HIDDEN), wire.DTYPES[dtype])
    embeddings[:, 0] = names
    return wire.Append(seq=seq, keep=keep, rows=rows, top_k=top_k, tensors=(embeddings,), **fields)


def with_embeddings(message: wire.Append, embeddings: np.ndarray) -> wire.Append:
    return msgspec.structs.replace(message, tensors=(embeddings,))


def codes(replies: list[Any]) -> list[str]:
    """Each reply as its error code, or its type."""
    return [reply.code if isinstance(reply, wire.Error) else type(reply).__name__ for reply in replies]


def numbered(replies: list[Any]) -> list[tuple[int, str]]:
    return list(zip((reply.seq for reply in replies), codes(replies), strict=True))


SEEING = {"appends": ("text", "image"), "encoder_size": 6, "encoder_context": 5, "image_tokens": 3}


def image(seq: int, keep: int, name: float, *, rows: int = 0, **fields: Any) -> wire.Append:
    """An Append of an image of SEEING."""
    patches = np.full((SEEING["encoder_context"], SEEING["encoder_size"]), name, np.float32)
    return wire.Append(seq=seq, keep=keep, rows=rows, top_k=4, kind="image", tensors=(patches,), **fields)


READING = {"encodes": ("hidden", "store"), "encoder_size": 6, "encoder_context": 4}


def encoding(seq: int, *names: float, want: Any = "store") -> wire.Encode:
    """An Encode of one sequence, of one embedding a name."""
    embeddings = np.zeros((len(names), READING["encoder_size"] if want == "store" else HIDDEN), np.float32)
    embeddings[:, 0] = names
    return wire.Encode(seq=seq, lengths=(len(names),), want=want, tensors=(embeddings,))


def reading(*messages: wire.Message) -> Cloud:
    """A session of a decoder that reads a source, to which these messages were sent."""
    cloud = opened(**READING)
    cloud.ask(*messages)
    return cloud
