"""Text to token ids and back, on the device: what `stip-export` proved, as it proved it."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime
import onnxruntime_extensions
import tokenizers
from tokenizers.decoders import DecodeStream

from shared.errors import BundleError


class Detokenizer(Protocol):
    """The text of one stream of ids."""

    def push(self, token_id: int) -> str:
        """Text that is now certain; empty while inside a character of several bytes."""

    def finish(self) -> str:
        """What is left: replacement characters for a character that was cut."""


class Tokenizer(Protocol):
    """Text to ids; `detokenizer` gives a fresh stream for the way back."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens in it are recognised; none is added."""

    def detokenizer(self) -> Detokenizer:
        """A fresh stream."""


def open_tokenizer(folder: Path, kind: Literal["onnx", "json"]) -> Tokenizer:
    """The tokenizer of a bundle. Raises BundleError if a file is missing or unreadable."""
    fallback = JsonTokenizer(folder / "tokenizer.json")
    if kind == "json":
        return fallback
    return OnnxTokenizer(folder / "tokenizer.onnx", folder / "detokenizer.onnx", fallback)


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no exception of its own to name
        raise BundleError(f"{path}: {str(error).splitlines()[0]}", hint="export the bundle again") from None


class OnnxTokenizer:
    """tokenizer.onnx and detokenizer.onnx. Text that the custom op cannot read goes to the fallback."""

    def __init__(self, encoder: Path, decoder: Path, fallback: Tokenizer) -> None:
        self._encoder, self._decoder, self._fallback = _session(encoder), _session(decoder), fallback
        self._outside = re.compile(self._encoder.get_modelmeta().custom_metadata_map["outside"])

    def encode(self, text: str) -> list[int]:
        if self._outside.search(text):
            return self._fallback.encode(text)
        ids: list[int] = self._encoder.run(None, {"text": np.array([text], dtype=object)})[0].tolist()
        return ids

    def detokenizer(self) -> Detokenizer:
        return _BytesStream(self._decoder)


class _BytesStream:
    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        (piece,) = self._decoder.run(None, {"id": np.array(token_id)})
        return self._utf8.decode(piece.tobytes())

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class JsonTokenizer:
    """tokenizer.json, by the library tokenizers."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path}: {error}", hint="export the bundle again") from None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def detokenizer(self) -> Detokenizer:
        return _JsonStream(self._tokenizer)


class _JsonStream:
    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []  # ids since text was last certain

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text:
            self._held.clear()
        return text or ""

    def finish(self) -> str:
        return self._tokenizer.decode(self._held, skip_special_tokens=False) if self._held else ""
