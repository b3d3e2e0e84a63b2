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
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # a look-up of a few rows; more threads only wake up
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no exception of its own to name
            raise BundleError(f"{path}: {error}", hint="export the bundle again") from None

    def __call__(self, ids: Sequence[int]) -> Array:
        rows: Array = self._session.run(None, {"ids": np.asarray(ids, np.int64)})[0]
        return rows


@dataclass(frozen=True)
class Bundle:
    """What `stip-export` wrote to OUT/device."""

    manifest: DeviceManifest
    key: UserKey
    embed: Embedding
    tokenizer: Tokenizer
    template: ChatTemplate | None

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Opens a bundle. Raises BundleError if it is not whole, was edited, or mixes two exports."""
        manifest = read_manifest(folder, DeviceManifest)
        check_files(folder, manifest, contents=True)
        key = UserKey.load(folder / "key.safetensors")
        seen = (key.key_id, key.hidden_size, key.vocab_size)
        wanted = (manifest.key_id, manifest.hidden_size, manifest.vocab_size)
        if seen != wanted:
            raise BundleError(
                f"{folder / 'key.safetensors'}: seen the key {seen}, wanted {wanted} (key id, widths)",
                hint="the key is another export's; copy the whole device folder of one export",
            )
        template = folder / "chat_template.jinja"
        return cls(
            manifest,
            key,
            Embedding(folder / "embedding.onnx"),
            open_tokenizer(folder, manifest.tokenizer),
            ChatTemplate(template.read_text(encoding="utf-8"), manifest.special_tokens) if template.exists() else None,
        )
