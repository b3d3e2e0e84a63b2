"""Engines whose forward fails, or computes what is not finite, as a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from cloud_backend.decoder import DecoderEngine
from cloud_backend.llama.context import Piece, Want
from cloud_backend.llama.engine import LlamaEngine

Tokens = list[int]  # new embeddings of each session of a step


@contextmanager
def failing(engine: Any, when: Callable[[Tokens], bool] = lambda tokens: True) -> Iterator[None]:
    """Within it a forward fails, after it has written to the KV memory, where `when` says so of its step."""

    def fail(rows: Any, tokens: Tokens) -> Any:
        if when(tokens):
            raise RuntimeError("secret detail")
        return rows

    with _after_each_forward(engine, fail):
        yield


@contextmanager
def computing_nan(engine: Any) -> Iterator[None]:
    """Within it a forward gives NaN."""
    with _after_each_forward(engine, lambda rows, tokens: rows * float("nan")):
        yield


@contextmanager
def poisoning(engine: LlamaEngine, tokens: int) -> Iterator[None]:
    """Within it the model computes with NaN, and stores it, for requests of so many embeddings."""
    context, real = engine._context, engine._context.decode

    def poisoned(pieces: Sequence[Piece], want: Want) -> Any:
        return real([_of_nan(piece) if len(piece.embeddings) == tokens else piece for piece in pieces], want)

    context.decode = poisoned  # type: ignore[method-assign]
    try:
        yield
    finally:
        del context.decode


def _of_nan(piece: Piece) -> Piece:
    return replace(piece, embeddings=np.full_like(piece.embeddings, np.nan))


@contextmanager
def _after_each_forward(engine: Any, change: Callable[[Any, Tokens], Any]) -> Iterator[None]:
    """change: gets the rows of a forward, and gives those that are used."""
    if isinstance(engine, DecoderEngine):
        of, name = engine, "_run_step"
    else:
        assert isinstance(engine, LlamaEngine)
        of, name = engine._context, "decode"  # type: ignore[assignment]
    real = getattr(of, name)

    def changed(appended: Sequence[Any], *arguments: Any) -> Any:
        counts = [one.tokens if hasattr(one, "tokens") else len(one.embeddings) for one in appended]
        return change(real(appended, *arguments), counts)

    setattr(of, name, changed)
    try:
        yield
    finally:
        delattr(of, name)
