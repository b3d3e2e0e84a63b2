"""One model in llama.cpp with its KV memory: pieces of sequences in, rows of logits or of hidden states out."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cloud_backend.llama.library import Floats, failure, floats, forget_failures, library
from shared.errors import BundleError
from shared.wire import Array

Want = Literal["logits", "hidden"]
KVDtype = Literal["float16", "float32"]

MOST_TOKENS = 2048  # of one decode
MOST_POSITIONS = 2**31 - 1  # its numbers have 32 bits
WHOLE = -1  # llama.cpp's sign for all layers, and for the end of a sequence


class DecodeError(RuntimeError):
    """llama.cpp could not run a batch. Its text is the status alone, and may be logged."""


@dataclass(frozen=True)
class Piece:
    """Embeddings [n, width] that follow the first `start` positions of a sequence, and rows wanted of the last."""

    sequence: int
    start: int
    embeddings: Array
    rows: int


class LlamaModel:
    """The weights of a GGUF file. Raises BundleError where llama.cpp cannot load it."""

    def __init__(self, path: Path, *, gpu: bool) -> None:
        self._c = c = library()
        parameters = c.llama_model_default_params()
        parameters.n_gpu_layers = WHOLE if gpu else 0
        forget_failures()
        self.pointer = c.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.pointer:
            raise BundleError(
                f"{path}: llama.cpp cannot load it: {failure()}",
                hint="export it again; or update llama.cpp, which may not know a type of its tensors: "
                "pip install -U llama-cpp-python",
            )
        self.width = int(c.llama_model_n_embd(self.pointer))
        self.layers = int(c.llama_model_n_layer(self.pointer))
        self.key_value_heads = int(c.llama_model_n_head_kv(self.pointer))
        self.head_width = self.width // int(c.llama_model_n_head(self.pointer))
        self.context = int(c.llama_model_n_ctx_train(self.pointer))
        self.vocab_size = int(c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.pointer)))
        weakref.finalize(self, c.llama_model_free, self.pointer).atexit = False

    def says(self, key: str) -> str | None:
        """A value of the file's metadata, as text."""
        text = ctypes.create_string_buffer(256)
        length = self._c.llama_model_meta_val_str(self.pointer, key.encode(), text, len(text))
        return None if length < 0 else text.value.decode(errors="replace")


class LlamaContext:
    """KV memory for `positions`, which so many sequences share, and the arrays that a batch is put into.

    Raises MemoryError where there is not so much, or more than llama.cpp can count.
    """

    def __init__(
        self, model: LlamaModel, positions: int, sequences: int, *, kv_dtype: KVDtype, threads: int, gpu: bool
    ) -> None:
        if positions > MOST_POSITIONS:
            raise MemoryError(f"llama.cpp: seen {positions} positions, wanted at most {MOST_POSITIONS}")
        self._c = c = library()
        self._model = model
        parameters = c.llama_context_default_params()
        parameters.n_ctx = positions
        parameters.n_batch = MOST_TOKENS
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        set_kv_dtype(parameters, kv_dtype)
        parameters.kv_unified = True  # a position of any sequence may lie anywhere
        parameters.offload_kqv = parameters.op_offload = gpu
        forget_failures()
        self._pointer = c.llama_init_from_model(model.pointer, parameters)
        if not self._pointer:
            raise MemoryError(f"llama.cpp: {failure()}")
        # It holds the model until then: of two that go together, Python may let go of either first.
        weakref.finalize(self, _free, c.llama_free, self._pointer, model).atexit = False
        self._memory = c.llama_get_memory(self._pointer)
        self._most = int(c.llama_n_batch(self._pointer))
        self._hidden = False
        self._allocate()

    def _allocate(self) -> None:
        """What a batch points to, once for all of them."""
        most = self._most
        self._embeddings = np.empty((most, self._model.width), np.float32)
        self._positions = np.empty(most, np.int32)
        self._counts = np.ones(most, np.int32)  # of each token's sequences
        self._sequences = np.empty(most, np.int32)
        first, size = self._sequences.ctypes.data, self._sequences.itemsize
        self._of_tokens = np.arange(first, first + most * size, size, dtype=np.uintp)  # pointers into the line above
        self._wanted = np.empty(most, np.int8)
        batch = self._batch = self._c.llama_batch()
        kinds = dict(batch._fields_)
        for name, array in (
            ("embd", self._embeddings),
            ("pos", self._positions),
            ("n_seq_id", self._counts),
            ("seq_id", self._of_tokens),
            ("logits", self._wanted),
        ):
            setattr(batch, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def remove(self, sequence: int, keep: int) -> None:
        """Forgets what a sequence holds behind its first `keep` positions."""
        if not self._c.llama_memory_seq_rm(self._memory, sequence, keep, WHOLE):
            raise ArithmeticError("llama.cpp could not cut a sequence back")

    def clear(self) -> None:
        """Forgets all sequences, and makes the memory zero."""
        self._c.llama_memory_clear(self._memory, True)

    def decode(self, pieces: Sequence[Piece], want: Want) -> Floats:
        """Appends the pieces, and gives what is wanted of them, one piece's rows behind the other's: logits
        [rows, vocab], or hidden states behind the last norm [rows, width]."""
        rows = [self._decode(together, want) for together in _batches(pieces, self._most)]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _decode(self, pieces: Sequence[Piece], want: Want) -> Floats:
        count = self._fill(pieces)
        if self._hidden != (want == "hidden"):
            self._hidden = not self._hidden
            self._c.llama_set_embeddings(self._pointer, self._hidden)
        wanted = self._wanted[:count].astype(bool) if self._hidden else None
        if wanted is not None:
            self._wanted[:count] = 1  # llama.cpp gives hidden states of all tokens or of none
        self._batch.n_tokens = count
        status = self._c.llama_decode(self._pointer, self._batch)
        if status != 0:
            raise DecodeError(f"llama_decode: {status}")
        if wanted is not None:
            states: Floats = self._read(self._c.llama_get_embeddings, count, self._model.width)[wanted]
            return states
        rows = sum(piece.rows for piece in pieces)
        return self._read(self._c.llama_get_logits, rows, self._model.vocab_size).copy()

    def _fill(self, pieces: Sequence[Piece]) -> int:
        """Puts a batch together, and gives its tokens."""
        first = 0
        for piece in pieces:
            end = first + len(piece.embeddings)
            self._embeddings[first:end] = piece.embeddings
            self._positions[first:end] = np.arange(piece.start, piece.start + end - first)
            self._sequences[first:end] = piece.sequence
            self._wanted[first : end - piece.rows] = 0
            self._wanted[end - piece.rows : end] = 1
            first = end
        return first

    def _read(self, read: Any, rows: int, width: int) -> Floats:
        """What the last decode left in llama.cpp's own memory, good until the next."""
        found = read(self._pointer) if rows else None
        if not found:
            return np.empty((0, width), np.float32)
        return floats(found, rows * width).reshape(rows, width)


def _free(free: Callable[[Any], None], pointer: Any, _model: LlamaModel) -> None:
    free(pointer)


def set_kv_dtype(parameters: Any, kv_dtype: KVDtype) -> None:
    """In what llama.cpp keeps keys and values. Its fused attention makes float16 of float32 before it multiplies, so it
    is for float16 alone."""
    c = library()
    fused = kv_dtype == "float16"
    parameters.type_k = parameters.type_v = c.GGML_TYPE_F16 if fused else c.GGML_TYPE_F32
    parameters.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_AUTO if fused else c.LLAMA_FLASH_ATTN_TYPE_DISABLED


def _batches(pieces: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """The pieces in batches of at most so many tokens, cut where they must be."""
    batch: list[Piece] = []
    room = most
    for piece in pieces:
        while len(piece.embeddings) > room:
            first, piece = _cut(piece, room)
            yield [*batch, first] if room else batch
            batch, room = [], most
        batch.append(piece)
        room -= len(piece.embeddings)
    if batch:
        yield batch


def _cut(piece: Piece, count: int) -> tuple[Piece, Piece]:
    """The first tokens of a piece, and the others."""
    head, tail = piece.embeddings[:count], piece.embeddings[count:]
    late = min(piece.rows, len(tail))
    return (
        Piece(piece.sequence, piece.start, head, piece.rows - late),
        Piece(piece.sequence, piece.start + count, tail, late),
    )
