"""Text to token ids and back, on the device: what `stip-export` proved, as it proved it."""

from __future__ import annotations

import codecs
import importlib.util
import json
import re
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import onnxruntime

from shared.errors import BundleError

if TYPE_CHECKING:
    import tokenizers


class Detokenizer(Protocol):
    """The text of one stream of ids."""

    def push(self, token_id: int) -> str:
        """Text that is now certain; empty while inside a character of several bytes."""

    def finish(self) -> str:
        """What is left: replacement characters for a character that was cut."""


class Tokenizer(Protocol):
    """Text to ids; `detokenizer` gives a fresh stream for the way back, `token_bytes` what one id stands for."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens in it are recognised; none is added. Lone surrogates count as U+FFFD."""

    def detokenizer(self) -> Detokenizer:
        """A fresh stream."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, in UTF-8, perhaps a part of a character; nothing for ids past the table."""


def open_tokenizer(folder: Path, kind: Literal["onnx", "json", "sentencepiece"]) -> Tokenizer:
    """The tokenizer of a bundle. Raises BundleError if a file is missing or unreadable."""
    if kind == "sentencepiece":
        from device_app.pieces import PieceTokenizer  # its library is for translation models alone

        return PieceTokenizer(folder / "source.spm", folder / "vocab.json")
    path = folder / "tokenizer.json"
    if kind == "json":
        return JsonTokenizer(path)
    if not path.is_file():
        raise BundleError(f"{path}: missing", hint="copy the whole folder again")
    # Few chats ever need the fallback, and to read it takes as long as all else that a tokenizer needs.
    return OnnxTokenizer(folder / "tokenizer.onnx", folder / "detokenizer.onnx", cache(lambda: JsonTokenizer(path)))


def _unreadable(path: Path, error: Exception) -> BundleError:
    message = (str(error) or type(error).__name__).splitlines()[0]
    return BundleError(f"{path}: {message}", hint="export the bundle again")


def _library() -> str:
    """Path of the custom ops. Importing the package for it would import transformers and torch where they are."""
    spec = importlib.util.find_spec("onnxruntime_extensions")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("onnxruntime_extensions is not installed", name="onnxruntime_extensions")
    paths = [Path(spec.origin).with_name(f"_extensions_pydll{suffix}") for suffix in EXTENSION_SUFFIXES]
    return str(next(path for path in paths if path.exists()))


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.register_custom_ops_library(_library())
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise _unreadable(path, error) from None


def _valid(text: str) -> str:
    """`text` as UTF-8 can hold it: surrogate pairs joined, lone ones (JSON can carry them) replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class OnnxTokenizer:
    """tokenizer.onnx and detokenizer.onnx. Text that the custom op cannot read goes to the fallback, tokenizer.json."""

    def __init__(self, encoder: Path, decoder: Path, fallback: Callable[[], Tokenizer]) -> None:
        self._encoder, self._fallback = _session(encoder), fallback
        # Its table, once: to run the graph for every token takes twenty times as long as to cut bytes out of it.
        try:
            self._table = _Table(*_session(decoder).run(["table", "all_starts", "all_ends"], {"id": np.array(0)}))
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise _unreadable(decoder, error) from None
        try:
            self._outside = re.compile(self._encoder.get_modelmeta().custom_metadata_map["outside"])
        except (KeyError, re.error) as error:
            raise _unreadable(encoder, error) from None

    def encode(self, text: str) -> list[int]:
        text = _valid(text)
        if self._outside.search(text):
            return self._fallback().encode(text)
        ids: list[int] = self._encoder.run(None, {"text": np.array([text], dtype=object)})[0].tolist()
        return ids

    def detokenizer(self) -> Detokenizer:
        return _BytesStream(self._table)

    def token_bytes(self, token_id: int) -> bytes:
        return self._table.piece(token_id)


class _Table:
    """The bytes of every token."""

    def __init__(self, table: Any, starts: Any, ends: Any) -> None:
        self._bytes: bytes = table.tobytes()
        self._starts, self._ends = starts, ends

    def piece(self, token_id: int) -> bytes:
        """Bytes of a token; none for ids past the table."""
        if token_id >= len(self._starts):
            return b""
        return self._bytes[self._starts[token_id] : self._ends[token_id]]


class _BytesStream:
    def __init__(self, table: _Table) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._table.piece(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


# The characters that byte-level tokenizers write bytes as: themselves where they can be seen, else those from 256 on.
_SEEN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTE_LEVEL = dict(zip(map(chr, _SEEN), _SEEN, strict=True)) | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_SEEN)))
}
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def _decoders(tokenizer: tokenizers.Tokenizer) -> set[str]:
    """Kinds of the steps by which tokens become text."""
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    return {step["type"] for step in (decoder, *decoder.get("decoders", ())) if step}


class JsonTokenizer:
    """tokenizer.json, by the library tokenizers."""

    def __init__(self, path: Path) -> None:
        import tokenizers  # only where it is wanted

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise _unreadable(path, error) from None
        self._decoders = _decoders(self._tokenizer)
        self._anchor = next(iter(self.encode("a")), 0)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_valid(text), add_special_tokens=False).ids
        return ids

    def detokenizer(self) -> Detokenizer:
        return _JsonStream(self._tokenizer)

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if "ByteLevel" in self._decoders and _BYTE_LEVEL.keys() >= set(token):
            return bytes(map(_BYTE_LEVEL.__getitem__, token))
        if "ByteFallback" in self._decoders and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        # Decoders may treat the first token otherwise (its blank goes), so it comes second.
        before: str = self._tokenizer.decode([self._anchor], skip_special_tokens=False)
        both: str = self._tokenizer.decode([self._anchor, token_id], skip_special_tokens=False)
        return both[len(before) :].encode()


class _JsonStream:
    """The library's DecodeStream raises on byte tokens that make no character, and cannot be finished: so not that one.

    A token's text may depend on the tokens before it (blanks, bytes), so the last ids shown are decoded along.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # ids of the last text given out, which ends with a whole character
        self._held: list[int] = []  # ids since

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        whole: str = self._tokenizer.decode(self._shown + self._held, skip_special_tokens=False)
        return whole[len(self._tokenizer.decode(self._shown, skip_special_tokens=False)) :]
