"""A device bundle, opened and checked: everything a device needs that the cloud must not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from device_app.template import ChatTemplate
from device_app.tokenizer import Tokenizer, open_tokenizer
from shared.errors import BundleError
from shared.key import UserKey
from shared.manifest import DeviceManifest, check_files, read_manifest
from shared.wire import Array


class Embedding:
    """embedding.onnx: ids → float32 [n, hidden_size]. Raises BundleError if it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        self._session = _opened(path, threads=1)  # a look-up of a few rows; more threads only wake up

    def __call__(self, ids: Sequence[int]) -> Array:
        rows: Array = self._session.run(None, {"ids": np.asarray(ids, np.int64)})[0]
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
    embed: Embedding
    classify: Classifier | None  # where the classifier is on the device
    tokenizer: Tokenizer
    template: ChatTemplate | None

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Opens a bundle. Raises BundleError if it is not whole, was edited, or mixes two exports."""
        manifest = read_manifest(folder, DeviceManifest)
        check_files(folder, manifest, contents=True)
        key = _fitting_key(folder / "key.safetensors", manifest)
        template = folder / "chat_template.jinja"
        return cls(
            manifest,
            key,
            Embedding(folder / "embedding.onnx"),
            Classifier(folder / "classifier.onnx") if manifest.head == "device" else None,
            open_tokenizer(folder, manifest.tokenizer),
            ChatTemplate(template.read_text(encoding="utf-8"), manifest.special_tokens) if template.exists() else None,
        )


def _fitting_key(path: Path, manifest: DeviceManifest) -> UserKey:
    """The key of the manifest's export."""
    hint = "the key is another export's; copy the whole device folder of one export"
    key = UserKey.load(path)
    if (key.vocab is None) != (manifest.head == "device"):
        seen_order = "no order" if key.vocab is None else "an order"
        place = "on the device" if manifest.head == "device" else "in the cloud"
        raise BundleError(
            f"{path}: seen a key with {seen_order} of the vocabulary, but the classifier is {place}", hint=hint
        )
    seen = (key.key_id, key.hidden_size, key.vocab_size)
    wanted = (manifest.key_id, manifest.hidden_size, manifest.vocab_size if manifest.head == "cloud" else 0)
    if seen != wanted:
        raise BundleError(f"{path}: seen the key {seen}, wanted {wanted} (key id, widths)", hint=hint)
    return key
