"""Log-probabilities as OpenAI's two APIs have them. End tokens, which are no part of an answer, are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from device_app.bundle import Bundle
from device_app.logprobs import TokenLogprobs


def chat_logprobs(bundle: Bundle, tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat completion."""
    return [
        _entry(bundle, token.id, token.logprob)
        | {"top_logprobs": [_entry(bundle, other, logprob) for other, logprob in token.top]}
        for token in _shown(bundle, tokens)
    ]


def _entry(bundle: Bundle, token: int, logprob: float) -> dict[str, Any]:
    piece = bundle.tokenizer.token_bytes(token)
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}


def completion_logprobs(bundle: Bundle, tokens: Sequence[TokenLogprobs], offset: int) -> tuple[dict[str, Any], int]:
    """`logprobs` of a completion; offset: where in its text the first token begins. Gives where the next one does."""
    shown = _shown(bundle, tokens)
    texts = [_text(bundle, token.id) for token in shown]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = [
        {_text(bundle, other): logprob for other, logprob in (*token.top, (token.id, token.logprob))} for token in shown
    ]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in shown],
        "top_logprobs": top,
        "text_offset": offsets,
    }, offset


def _text(bundle: Bundle, token: int) -> str:
    return bundle.tokenizer.token_bytes(token).decode("utf-8", "replace")


def _shown(bundle: Bundle, tokens: Sequence[TokenLogprobs]) -> list[TokenLogprobs]:
    return [token for token in tokens if token.id not in bundle.manifest.end_ids]
