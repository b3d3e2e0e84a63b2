"""What sizes on the line give away, whatever is in the frames: lengths in tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from export.audit.attack import Attack, Outcome, needs, needs_text
from export.audit.scene import Scene
from shared.wire import Append, Encode, Logits, encode

RECORD, RECORD_OVERHEAD = 2**14, 22  # TLS 1.3: bytes in a record, and what it adds (RFC 8446 §5.2, AES-GCM)
PIECE = 4 * 2**20 - 1024  # bytes of embeddings in one Append, as the device cuts a long prompt by default
TOP_K = 256
PROMPTS = 400  # paragraphs that are sent


def on_the_line(frame: bytes, *, masked: bool) -> int:
    """Bytes that an observer counts for a frame: WebSocket header (RFC 6455 §5.2) and TLS records."""
    length = len(frame)
    length += (2 if length < 126 else 4 if length < 2**16 else 10) + (4 if masked else 0)
    return length + RECORD_OVERHEAD * -(-length // RECORD)


def rows_in(size: int, width: int) -> int:
    """Embeddings of `width` bytes in an Append of which an observer counted `size` bytes."""
    inside = size - RECORD_OVERHEAD * -(-size // (RECORD + RECORD_OVERHEAD))
    return inside // width  # what else is in the frame is narrower than one embedding


def exchange(prompt: int, answer: int, hidden: int, dtype: np.dtype[np.generic]) -> tuple[list[int], list[int]]:
    """Sizes on the line, up and down, of a prompt and an answer of so many tokens, decoded one at a time."""
    up, down, held = [], [], 0
    piece = PIECE // (hidden * dtype.itemsize)
    pieces = [min(piece, prompt - start) for start in range(0, prompt, piece)] + [1] * (answer - 1)
    for seq, tokens in enumerate(pieces):
        rows = int(held + tokens >= prompt)  # a piece before the last asks for nothing
        append = Append(seq=seq, keep=held, rows=rows, top_k=TOP_K, tensors=(np.zeros((tokens, hidden), dtype),))
        held += tokens
        reply = (np.zeros((rows, TOP_K), dtype), np.zeros((rows, TOP_K), np.uint32), np.zeros((rows, 2), np.float32))
        up.append(on_the_line(encode(append), masked=True))
        down.append(on_the_line(encode(Logits(seq=seq, kv_length=held, tensors=reply)), masked=False))
    return up, down


def read_sizes(up: list[int], down: list[int], width: int) -> tuple[int, int]:
    """Tokens of prompt and answer. The first reply with rows in it ends the prompt; each after it brings a token."""
    first = next(i for i, size in enumerate(down) if size > TOP_K)
    return sum(rows_in(size, width) for size in up[: first + 1]), len(down) - first


def read_lengths(scene: Scene) -> Outcome:
    """Prompt and answer lengths from sizes, and how often they single out one paragraph of all there are."""
    hidden = scene.target.key.hidden_size
    dtype = np.dtype(np.float16 if scene.target.dtype.itemsize == 2 else np.float32)
    lengths = [paragraph.size for paragraph in scene.text.paragraphs]
    if scene.family.kind in ("encoder", "encoder-decoder"):
        return _read_encoded(lengths, hidden, dtype)
    talks = list(pairwise(lengths))  # a paragraph, answered by the next
    chosen = np.random.default_rng(0).choice(len(talks), min(PROMPTS, len(talks)), replace=False)
    read = [read_sizes(*exchange(talks[i][0], talks[i][1], hidden, dtype), hidden * dtype.itemsize) for i in chosen]
    prompts = [seen == talks[i][0] for i, seen in zip(chosen, (one[0] for one in read), strict=True)]
    answers = [seen == talks[i][1] for i, seen in zip(chosen, (one[1] for one in read), strict=True)]
    alone, both = [first for first, _ in talks], talks
    figures = {
        "prompts": len(chosen),
        "candidates": len(talks),
        "answer_length_exact": float(np.mean(answers)),
        "singled_out_by_prompt_length": float(np.mean([alone.count(one[0]) == 1 for one in read])),
        "singled_out_by_both_lengths": float(np.mean([both.count(one) == 1 for one in read])),
        "bytes_up_a_token": hidden * dtype.itemsize,
        "without": "drafts (an Append then carries the drafted tokens too) and other traffic on the line",
    }
    return Outcome(float(np.mean(prompts)), figures)


def _read_encoded(lengths: list[int], width: int, dtype: np.dtype[np.generic]) -> Outcome:
    """The same of texts that an encoder reads, each in one frame."""
    read = []
    for length in lengths:
        frame = encode(Encode(seq=0, lengths=(length,), tensors=(np.zeros((length, width), dtype),)))
        read.append(rows_in(on_the_line(frame, masked=True), width * dtype.itemsize))
    right = [seen == length for seen, length in zip(read, lengths, strict=True)]
    figures = {
        "prompts": len(lengths),
        "singled_out_by_prompt_length": float(np.mean([lengths.count(seen) == 1 for seen in read])),
        "bytes_up_a_token": width * dtype.itemsize,
        "without": "several texts in one request, and other traffic on the line",
    }
    return Outcome(float(np.mean(right)), figures)


def _needs_paragraphs(scene: Scene) -> str | None:
    return None if len(scene.text.paragraphs) > 1 else "the text is not cut into paragraphs"


LENGTHS = Attack(
    name="lengths-and-timing",
    title="Lengths from sizes on the line",
    knows="the width of an embedding; sees sizes of TLS records alone",
    after="prompts whose length in tokens is read exactly",
    source="Chen et al., IEEE S&P 2010 (side channels in web applications); Weiss et al., USENIX Security 2024",
    run=read_lengths,
    applies=needs(needs_text, _needs_paragraphs),
)

ATTACKS = (LENGTHS,)
