"""`POST /v1/embeddings`: texts to vectors, where the bundle is an encoder's."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from device_app.bundle import Bundle
from device_app.encoder import Encoder
from device_app.gateway.errors import ApiError, json_response, refused_value
from device_app.gateway.openai_types import EmbeddingRequest, read
from device_app.gateway.serving import Gateway, ServedModel
from device_app.gateway.streams import answered
from shared.wire import Array

AT_ONCE = 32  # texts of one question to the cloud; between two of them a request can be cancelled
MOST_TEXTS = 2048


def routes(gateway: Gateway) -> list[Route]:
    """The one route."""

    async def embeddings(request: Request) -> Response:
        asked = await read(request, EmbeddingRequest)
        return await answered(request, _embed(gateway.model(asked.model), asked))

    return [Route("/v1/embeddings", embeddings, methods=["POST"])]


async def _embed(served: ServedModel, asked: EmbeddingRequest) -> Response:
    manifest = served.bundle.manifest
    if manifest.kind != "encoder":
        raise refused_value("model", f"one of the kind {manifest.kind!r}", "an encoder")
    if asked.dimensions not in (None, manifest.hidden_size):
        raise refused_value("dimensions", str(asked.dimensions), f"{manifest.hidden_size}, as the model has them")
    texts = _texts(asked.input)
    vectors: list[Array] = []
    async with served.pool.lease() as lease:
        encoder: Encoder = lease.client
        tokens = await lease.call(lambda: _tokens(served.bundle, texts))
        for start in range(0, len(texts), AT_ONCE):
            some = texts[start : start + AT_ONCE]
            vectors += list(await lease.call(lambda some=some: encoder.embed(some)))  # type: ignore[misc]
    data = [
        {"object": "embedding", "index": at, "embedding": _written(vector, asked.encoding_format)}
        for at, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "model": served.name, "data": data, "usage": usage})


def _texts(given: str | list[Any]) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise refused_value("input", f"{len(texts)} texts", f"1 to {MOST_TEXTS}")
    for text in texts:
        if not isinstance(text, str):
            raise refused_value(
                "input", f"a {type(text).__name__}", "text: token ids of another model mean nothing here"
            )
        if not text:
            raise refused_value("input", "an empty text", "at least one character")
    return texts


def _tokens(bundle: Bundle, texts: Sequence[str]) -> int:
    """How many in all. Raises ApiError (400) for a text that is too long."""
    manifest, total = bundle.manifest, 0
    ends = len(manifest.prefix_ids) + len(manifest.suffix_ids)
    for at, text in enumerate(texts):
        tokens = len(bundle.tokenizer.encode(text)) + ends
        if tokens > manifest.context:
            raise ApiError(
                400,
                f"input[{at}]: it takes {tokens} tokens, wanted at most {manifest.context}",
                param="input",
                code="context_length_exceeded",
            )
        total += tokens
    return total


def _written(vector: Array, form: str) -> list[float] | str:
    """base64: of float32, little-endian."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.astype(np.float64).tolist()
    return numbers
