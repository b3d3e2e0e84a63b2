"""Steps of fixed shapes, captured as CUDA graphs: a step that only decodes is one launch then, not thousands.

Shapes come in few sizes. What a batch lacks to its size is padded: sequences that read the row of zeros and write to
the page that is nobody's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cloud_backend.kv_cache import PAGE
from cloud_backend.step import Group, Span, Step, padded_rows
from cloud_backend.tensor_pool import TensorPool
from cloud_backend.tensors import to_device

log = logging.getLogger("stip.cloud")

COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # sequences
TOKENS = (1, 2, 4, 8)  # new ones of each: one, or a draft to check
SHORTEST = 256  # positions that are read
MOST_PADDING = 2.5  # times what the sequences hold, beyond the shortest
MOST_GRAPHS = 48  # kept, the last used

Forward = Callable[[Step, torch.Tensor], torch.Tensor]  # step, embeddings [tokens, hidden] → states [tokens, hidden]
Shape = tuple[int, int, int]  # sequences, tokens of each, positions that are read


def shape_of(spans: Sequence[Span], context: int) -> Shape | None:
    """The fixed shape that holds a step, or None where it is to be run as it is."""
    tokens, ends = {span.tokens for span in spans}, [span.end for span in spans]
    if len(tokens) != 1 or not tokens <= set(TOKENS) or len(spans) > COUNTS[-1]:
        return None
    count = next(count for count in COUNTS if count >= len(spans))
    longest = SHORTEST
    while longest < max(ends):
        longest = longest * 3 // 2 if longest.bit_count() == 1 else longest * 4 // 3  # 256, 384, 512, 768, …
    longest = min(longest, context)
    # One long sequence would have all the others read as much.
    if longest > SHORTEST and count * longest > MOST_PADDING * sum(ends):
        return None
    return count, tokens.pop(), longest


class FixedStep:
    """A step whose tensors keep their shapes and addresses."""

    def __init__(self, pool: TensorPool, shape: Shape, hidden_size: int, dtype: torch.dtype) -> None:
        count, tokens, longest = self.shape = shape
        device = pool.device
        self.embeddings = torch.zeros(count * tokens, hidden_size, dtype=dtype, device=device)
        self._lengths = torch.full((count,), tokens, device=device)
        self._rows = torch.zeros(count * longest, dtype=torch.int64, device=device)
        group = Group(0, count, tokens, self._lengths, longest, self._rows, causal=True, padded=True)
        written, positions = (torch.zeros(count * tokens, dtype=torch.int64, device=device) for _ in range(2))
        self.step = Step(pool, written, positions[None], [group])
        self.fill([], torch.empty(0, hidden_size, dtype=dtype))

    def fill(self, spans: Sequence[Span], embeddings: torch.Tensor) -> None:
        """Puts a batch in; what it lacks is padding."""
        count, tokens, longest = self.shape
        missing = count - len(spans)
        device = self.embeddings.device
        nobody = np.tile(np.arange(PAGE, PAGE + tokens), missing)  # the second page
        written = np.concatenate([*(span.pages.rows[span.start : span.end] for span in spans), nobody])
        none = np.tile(np.arange(tokens), missing)
        positions = np.concatenate([*(np.arange(span.start, span.end) for span in spans), none])
        lengths = np.array([*(span.end for span in spans), *[tokens] * missing], np.int64)
        rows = np.zeros((count, longest), np.int64)
        rows[: len(spans)] = padded_rows([span.pages for span in spans], [span.end for span in spans], longest)
        for there, now in (
            (self.step.written, written),
            (self.step.positions[0], positions),
            (self._lengths, lengths),
            (self._rows, rows.ravel()),
        ):
            there.copy_(to_device(now.astype(np.int64), device), non_blocking=True)
        self.embeddings[: len(embeddings)].copy_(embeddings, non_blocking=True)


class Graphs:
    """The captured steps of one engine."""

    def __init__(self, pool: TensorPool, hidden_size: int, dtype: torch.dtype, context: int, forward: Forward) -> None:
        self._make = lambda shape: FixedStep(pool, shape, hidden_size, dtype)
        self._context = context
        self._forward = forward
        self._captured: dict[Shape, tuple[FixedStep, Any, torch.Tensor]] = {}
        self._capturable = True
        # One for all: replays follow each other, and what one leaves in between is not needed by the next.
        self._memory = torch.cuda.graph_pool_handle()
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def run(self, spans: Sequence[Span], embeddings: torch.Tensor) -> torch.Tensor | None:
        """States [tokens, hidden], good until the next run; None where no graph fits."""
        shape = shape_of(spans, self._context) if self._capturable else None
        if shape is None or (shape not in self._captured and not self._capture(shape)):
            return None
        fixed, graph, states = self._captured[shape] = self._captured.pop(shape)  # the last used at the end
        fixed.fill(spans, embeddings)
        graph.replay()
        return states[: len(embeddings)]

    def _capture(self, shape: Shape) -> bool:
        if len(self._captured) == MOST_GRAPHS:
            self._captured.pop(next(iter(self._captured)))
        before = torch.cuda.current_stream()
        try:
            self._captured[shape] = self._made(shape)
        except torch.OutOfMemoryError:
            log.warning("CUDA graphs: no memory for %d sequences of %d positions", shape[0], shape[2])
            self._captured.clear()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a model that asks the host in between
            log.warning(
                "CUDA graphs: not for this model (%s); its kernels are launched one by one", type(error).__name__
            )
            self._capturable = False
        finally:
            torch.cuda.set_stream(before)  # which a capture that failed does not do
            torch.cuda.synchronize()
        return shape in self._captured

    def _made(self, shape: Shape) -> tuple[FixedStep, Any, torch.Tensor]:
        fixed, graph = self._make(shape), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # libraries allocate what they need in a first run
            self._forward(fixed.step, fixed.embeddings)
        self._stream.synchronize()
        fixed.step.groups[0].forget_masks()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            states = self._forward(fixed.step, fixed.embeddings)
        return fixed, graph, states
