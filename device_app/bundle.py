"""A device bundle, opened and checked: everything a device needs that the cloud must not have."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from device_app.opening import Widths
from device_app.successors import NO_SUCCESSORS, SUCCESSORS, Successors
from device_app.template import ChatTemplate
from device_app.tokenizer import Detokenizer, Tokenizer, open_tokenizer
from shared.errors import BundleError, UsageError
from shared.key import UserKey
from shared.manifest import DeviceManifest, ImageFormat, Kind, check_file, read_manifest
from shared.wire import Array

if TYPE_CHECKING:
    from device_app.grammar import Grammar
    from device_app.images import Source

TABLE = ".onnx.data"  # how the names of a graph's external data end


class Embedding:
    """embedding.onnx: ids → float32 [n, hidden_size]. Raises BundleError if it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        self._session = _opened(path, threads=1)  # a look-up of a few rows; more threads only wake up
        self._positions = "positions" in _inputs(self._session)  # whether the device adds them

    def __call__(self, ids: Sequence[int], start: int = 0) -> Array:
        """start: position of the first id in its sequence."""
        inputs = {"ids": np.asarray(ids, np.int64)}
        if self._positions:
            inputs["positions"] = np.arange(start, start + len(ids), dtype=np.int64)
        rows: Array = self._session.run(None, inputs)[0]
        return rows


class Patches:
    """image.onnx: pixels uint8 [height, width, 3] → float32 [patches, width of the stream].

    Raises BundleError if it cannot be loaded or takes other pixels than the manifest says.
    """

    def __init__(self, path: Path, image: ImageFormat) -> None:
        self._session = _opened(path, threads=2)
        sizes = [image.resize] if isinstance(image.resize, int) else image.resize
        if min(sizes) < 1 or image.resample not in range(6):
            raise BundleError(
                f"{path}: seen pixels resized to {sizes} by the filter {image.resample}, wanted lengths above 0 "
                "and a filter of Pillow's (0 to 5)",
                hint="export the bundle again",
            )
        seen, wanted = _inputs(self._session), [image.height, image.width, 3]
        if seen != {"pixels": wanted}:
            raise BundleError(f"{path}: seen inputs {seen}, wanted pixels {wanted}", hint="export the bundle again")

    def __call__(self, pixels: Array) -> Array:
        rows: Array = self._session.run(None, {"pixels": pixels})[0]
        return rows


class Classifier:
    """classifier.onnx: hidden states → float32 logits [rows, vocab_size]. Raises BundleError if it cannot be loaded.

    Row by row: a row's logits then do not depend on what is asked beside it, and are the same bits whenever it is.
    """

    def __init__(self, path: Path) -> None:
        # Reading the whole table is the work, and two cores read nearly as fast as all do. Packed weights serve many
        # rows at once; for one they take longer than the plain ones.
        self._session = _opened(path, threads=2, **{"session.disable_prepacking": "1"})

    def __call__(self, hidden: Array) -> Array:
        return np.concatenate([self._session.run(None, {"hidden": row[None]})[0] for row in hidden])


class NoText:
    """Stands for tokenizer and embedding where a model takes images alone. Raises UsageError if it is used."""

    def __call__(self, ids: Sequence[int], start: int = 0) -> Array:
        raise self._error()

    def encode(self, text: str) -> list[int]:
        raise self._error()

    def detokenizer(self) -> Detokenizer:
        raise self._error()

    def token_bytes(self, token_id: int) -> bytes:
        raise self._error()

    @staticmethod
    def _error() -> UsageError:
        return UsageError("text: seen some, wanted none, as this bundle's model takes images alone")


def _inputs(session: ort.InferenceSession) -> dict[str, list[int | str]]:
    """Shapes of a graph's inputs, by name."""
    return {one.name: one.shape for one in session.get_inputs()}


def _opened(path: Path, *, threads: int, **entries: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Between tokens the device waits for the cloud, and should not spin meanwhile.
    for name, value in ({"session.intra_op.allow_spinning": "0"} | entries).items():
        options.add_session_config_entry(name, value)
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no exception of its own to name
        raise BundleError(f"{path}: {error}", hint="export the bundle again") from None


@dataclass(frozen=True)
class Bundle:
    """What `stip-export` wrote to OUT/device."""

    manifest: DeviceManifest
    key: UserKey
    embed: Embedding | NoText
    classify: Classifier | None  # where the classifier is on the device
    tokenizer: Tokenizer  # a NoText where there is no text
    template: ChatTemplate | None
    patches: Patches | None = None  # where the model takes images
    successors: Successors = NO_SUCCESSORS  # for drafts

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Opens a bundle. Raises BundleError if it is not whole, was edited, or mixes two exports."""
        manifest = read_manifest(folder, DeviceManifest)
        with _checked(folder, manifest):
            return cls._loaded(folder, manifest)

    @classmethod
    def _loaded(cls, folder: Path, manifest: DeviceManifest) -> Bundle:
        key = _fitting_key(folder / "key.safetensors", manifest)
        template = folder / "chat_template.jinja"
        return cls(
            manifest,
            key,
            NoText() if manifest.tokenizer == "none" else Embedding(folder / "embedding.onnx"),
            Classifier(folder / "classifier.onnx") if manifest.head == "device" else None,
            NoText() if manifest.tokenizer == "none" else open_tokenizer(folder, manifest.tokenizer),
            ChatTemplate(template.read_text(encoding="utf-8"), manifest.special_tokens) if template.exists() else None,
            Patches(folder / "image.onnx", manifest.image) if manifest.image is not None else None,
            Successors.load(folder / SUCCESSORS, manifest.vocab_size)
            if SUCCESSORS in manifest.files
            else NO_SUCCESSORS,
        )

    @property
    def widths(self) -> Widths:
        """What the cloud must say of the encoder that the decoder reads."""
        manifest = self.manifest
        return Widths(manifest.encoder_size, manifest.encoder_context, manifest.image.tokens if manifest.image else 0)

    def want_kind(self, what: str, *kinds: Kind) -> None:
        """Raises UsageError where `what` does not go with this bundle's kind of model."""
        if self.manifest.kind not in kinds:
            raise UsageError(f"{what}: seen a bundle of the kind {self.manifest.kind!r}, wanted {' or '.join(kinds)}")

    @cached_property
    def grammar(self) -> Grammar:
        """Makes constraints for this bundle's answers. Raises UsageError for a model that gives no text."""
        self.want_kind("grammar", "decoder", "vision-decoder", "encoder-decoder")
        from device_app.grammar import Grammar  # its library: only where it is asked for

        manifest = self.manifest
        return Grammar(
            self.tokenizer, manifest.vocab_size, manifest.end_ids, {*manifest.hidden_ids, *manifest.banned_ids}
        )

    def look(self, source: Source) -> Array:
        """Embeddings of an image. Raises UsageError for what is no image, and where the model takes none."""
        if self.patches is None or self.manifest.image is None:
            raise UsageError(f"image: seen one, wanted none, as a model of the kind {self.manifest.kind!r} takes none")
        from device_app.images import pixels  # Pillow: only where there is something to look at

        return self.patches(pixels(source, self.manifest.image))


@contextmanager
def _checked(folder: Path, manifest: DeviceManifest) -> Iterator[None]:
    """Checks what will be parsed, and then the tables of numbers beside the loading, which may end first.

    A damaged table harms no parser, and is most of a bundle's bytes. What is wrong with it goes before what came of it.
    """
    tables = [name for name in manifest.files if name.endswith(TABLE)]
    for name in manifest.files:
        if name not in tables:
            check_file(folder, manifest, name, contents=True)
    found: list[Exception] = []

    def check() -> None:
        try:
            for name in tables:
                check_file(folder, manifest, name, contents=True)
        except Exception as error:
            found.append(error)

    checking = threading.Thread(target=check, name="digests", daemon=True)
    checking.start()
    try:
        yield
    finally:
        checking.join()
        if found:
            raise found[0]


def _fitting_key(path: Path, manifest: DeviceManifest) -> UserKey:
    """The key of the manifest's export."""
    hint = "the key is another export's; copy the whole device folder of one export"
    key = UserKey.load(path)
    if manifest.kind in ("encoder", "image-encoder"):
        classes = len(manifest.labels) if "logits" in manifest.outputs else 0
        if "logits" in manifest.outputs and not classes:
            raise BundleError(f"{path.parent}: seen logits of no class, wanted labels", hint="export the bundle again")
    else:
        classes = manifest.vocab_size if manifest.head == "cloud" else 0
        if (key.vocab is None) != (manifest.head == "device"):
            seen_order = "no order" if key.vocab is None else "an order"
            place = "on the device" if manifest.head == "device" else "in the cloud"
            raise BundleError(
                f"{path}: seen a key with {seen_order} of the vocabulary, but the classifier is {place}", hint=hint
            )
    encoder_size = 0 if key.encoder is None else len(key.encoder)
    seen = (key.key_id, key.hidden_size, key.vocab_size, encoder_size)
    wanted = (manifest.key_id, manifest.hidden_size, classes, manifest.encoder_size)
    if seen != wanted:
        raise BundleError(f"{path}: seen the key {seen}, wanted {wanted} (key id, widths)", hint=hint)
    return key
