"""The device's Python API for encoders: texts or images in, vectors or classes out.

with Encoder.open("OUT/device", "ws://127.0.0.1:8765") as encoder:
    vectors = encoder.embed(["Hello!", "Good morning!"])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from device_app.bundle import Bundle
from device_app.connection import Address, Connection
from device_app.counters import Counters
from device_app.encode import EncoderSession, Want
from shared.errors import UsageError
from shared.wire import Array

if TYPE_CHECKING:
    from device_app.images import Source


@dataclass(frozen=True)
class Prediction:
    """A class and how probable it is, from 0 to 1: among all classes, or by itself where several may hold; of a model
    that was trained to give scores, the score."""

    label: str
    probability: float


class Encoder:
    """A private encoder: a bundle on this device, a model in a cloud.

    `counters` count over its life. `dropped_tokens` holds, for each text of the last call, how many tokens were cut.
    """

    def __init__(
        self,
        bundle: Bundle,
        address: Address,
        *,
        token: str | None = None,
        truncate: bool = False,
        retry_seconds: float = 60.0,
        on_lost: Callable[[], None] = lambda: None,
        on_frame: Callable[[str, bytes], None] = lambda way, frame: None,
    ) -> None:
        """truncate: cut texts that are too long for the model, or for the cloud's frames, instead of refusing them.
        The others are `Connection`'s.

        Nothing is sent before the first question. Raises UsageError for a bundle that is no encoder's.
        """
        bundle.want_kind("encoder", "encoder", "image-encoder")
        self.bundle = bundle
        self.counters = Counters()
        self.dropped_tokens: list[int] = []
        self._truncate = truncate
        manifest = bundle.manifest
        session = EncoderSession(
            bundle.key,
            served_name=manifest.served_name,
            context=manifest.context,
            token=token,
            counters=self.counters,
        )
        self._connection = Connection(session, address, retry_seconds=retry_seconds, on_lost=on_lost, on_frame=on_frame)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        url: str,
        *,
        token: str | None = None,
        ca: Path | None = None,
        insecure: bool = False,
        truncate: bool = False,
        retry_seconds: float = 60.0,
    ) -> Encoder:
        """Opens the bundle in `folder` for the cloud at `url`. Raises BundleError, UsageError."""
        address = Address(url, ca, insecure)
        return cls(Bundle.open(Path(folder)), address, token=token, truncate=truncate, retry_seconds=retry_seconds)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session in the cloud."""
        self._connection.close()

    def interrupt(self, error: BaseException | None = None) -> None:
        """For signal handlers and other threads: a request that waits for the cloud raises KeyboardInterrupt, or
        `error`, and the cloud is told. The next request is not disturbed."""
        self._connection.interrupt(error or KeyboardInterrupt())

    def hidden(self, texts: Sequence[str]) -> list[Array]:
        """The last hidden states of each text, float32 [tokens, hidden_size], begin and end tokens included.

        All that takes texts raises UsageError for one that is too long (unless `truncate`) or has no token, and for
        what this model does not give; CloudError where the cloud fails.
        """
        return self._of_texts(texts, "hidden")

    def pooled(self, texts: Sequence[str]) -> Array:
        """The model's own pooled vector of each text, float32 [texts, hidden_size]."""
        return np.stack(self._of_texts(texts, "pooled"))

    def embed(self, texts: Sequence[str]) -> Array:
        """A vector for the meaning of each text, float32 [texts, hidden_size], pooled as the model was trained."""
        self.want("embed")
        pooling = self.bundle.manifest.pooling
        states = self._of_texts(texts, "hidden")
        vectors = np.stack([rows[0] if pooling == "first" else rows.mean(0, dtype=np.float64) for rows in states])
        if self.bundle.manifest.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True), 1e-12)
        return vectors.astype(np.float32)

    def classify(self, texts: Sequence[str]) -> list[list[Prediction]]:
        """All classes of each text, the most probable first."""
        return [self._predictions(logits) for logits in self._of_texts(texts, "logits")]

    def classify_images(self, images: Sequence[Source]) -> list[list[Prediction]]:
        """All classes of each image (a path, a file's bytes, or an image of Pillow's), the most probable first.

        Raises UsageError for what is no image, CloudError where the cloud fails.
        """
        self.bundle.want_kind("classify_images", "image-encoder")
        self._connection.attend()
        embeddings = [self.bundle.look(image) for image in images]
        return [self._predictions(logits) for logits in self._results(embeddings, "logits")]

    def want(self, what: Want | Literal["embed"]) -> None:
        """Raises UsageError where this model does not give it."""
        manifest = self.bundle.manifest
        if what == "embed" and manifest.pooling is None:
            raise UsageError(
                "embed: seen a model that was not trained for vectors of sentences",
                hint="take hidden() or pooled(), and pool by yourself",
            )
        output = "hidden" if what == "embed" else what
        if output not in manifest.outputs:
            raise UsageError(f"{output}: seen a model without, wanted one of what it gives: {manifest.outputs}")

    def _of_texts(self, texts: Sequence[str], want: Want) -> list[Array]:
        self.bundle.want_kind(want, "encoder")
        self._connection.attend()
        if isinstance(texts, str):
            raise UsageError("texts: seen one text, wanted a list of texts")
        self.want(want)  # before anything is sent
        self.dropped_tokens = []
        most = self._most_tokens() if texts else 0
        sequences = [
            self._ids(f"text {at}" if len(texts) > 1 else "text", text, most) for at, text in enumerate(texts, 1)
        ]
        with self.counters.timed("embed"):
            embeddings = [self.bundle.embed(ids) for ids in sequences]
        return self._results(embeddings, want)

    def _most_tokens(self) -> int:
        """Of a text, begin and end tokens included. What the cloud takes counts where texts may be cut to it."""
        if not self._truncate:
            return self.bundle.manifest.context
        self._connection.open()
        return self._connection.session.longest_sequence

    def _ids(self, name: str, text: str, most: int) -> list[int]:
        manifest = self.bundle.manifest
        ids = self.bundle.tokenizer.encode(text)
        ends = len(manifest.prefix_ids) + len(manifest.suffix_ids)
        over = min(len(ids), max(0, len(ids) + ends - most))
        if over and not self._truncate:
            raise UsageError(
                f"{name}: it takes {len(ids) + ends} tokens, wanted at most {most}",
                hint=f"shorten it, or let it be cut: {over} tokens would be dropped",
            )
        self.dropped_tokens.append(over)
        whole = [*manifest.prefix_ids, *ids[: len(ids) - over], *manifest.suffix_ids]
        if not whole:
            raise UsageError(f"{name}: seen nothing, wanted at least one token")
        return whole

    def _results(self, embeddings: Sequence[Array], want: Want) -> list[Array]:
        self.want(want)
        if not embeddings:
            raise UsageError("inputs: seen none, wanted at least one")
        try:
            return self._connection.results(embeddings, want)
        except BaseException:
            self._connection.cancel()  # nobody waits for it any more
            raise

    def _predictions(self, logits: Array) -> list[Prediction]:
        """Sorted; equal ones in the model's order."""
        probabilities = _probabilities(logits.astype(np.float64), self.bundle.manifest.activation)
        labels = self.bundle.manifest.labels
        order = np.argsort(-probabilities, kind="stable")
        return [Prediction(labels[at], float(probabilities[at])) for at in order]


def _probabilities(logits: Array, activation: str) -> Array:
    if activation == "none":
        return logits
    if activation == "sigmoid":
        alone: Array = 0.5 + 0.5 * np.tanh(0.5 * logits)  # the same as 1 / (1 + exp(−x)), and never overflows
        return alone
    masses: Array = np.exp(logits - logits.max())
    shares: Array = masses / masses.sum()
    return shares
