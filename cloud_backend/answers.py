"""What replies say of last hidden states: for a whole batch of requests at once, as a vocabulary is wide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cloud_backend.engine import AppendWork, HiddenRows, LogitRows, Outcome, not_finite
from cloud_backend.tensors import TORCH_DTYPES, to_numpy
from shared.wire import DTYPES, Array, FloatName

Classify = Callable[[torch.Tensor], torch.Tensor]  # last hidden states [rows, hidden] to logits [rows, vocab]


def answers(works: Sequence[AppendWork], states: Sequence[torch.Tensor], classify: Classify | None) -> list[Outcome]:
    """The result of each work from its last hidden states [rows, hidden]; `not_finite` where a value is not."""
    results: list[Outcome] = [not_finite()] * len(works)
    kinds = dict.fromkeys((work.want, work.dtype) for work in works)
    for want, dtype in kinds:
        chosen = [at for at, work in enumerate(works) if (work.want, work.dtype) == (want, dtype)]
        hidden = torch.cat([states[at] for at in chosen])  # [rows of all, hidden]
        of = [works[at] for at in chosen]
        if want == "hidden":
            found = hidden_rows(of, hidden.to(TORCH_DTYPES[dtype]))
        else:
            assert classify is not None
            found = logit_rows(of, classify(hidden).to(TORCH_DTYPES[dtype]))
        for at, result in zip(chosen, found, strict=True):
            results[at] = result
    return results


def hidden_rows(works: Sequence[AppendWork], hidden: torch.Tensor) -> list[Outcome]:
    """Of hidden states [rows of all, hidden] in the dtype they are sent in."""
    finite, rows = torch.isfinite(hidden).all(-1).cpu().numpy(), to_numpy(hidden)
    return [HiddenRows(rows[start:end]) if finite[start:end].all() else not_finite() for start, end in _of_each(works)]


def logit_rows(works: Sequence[AppendWork], logits: torch.Tensor) -> list[Outcome]:
    """Of logits [rows of all, vocab] in the dtype they are sent in: the top k by value, then id, or all of them; and
    log-sum-exp of the values as sent, so that a device can rely on it."""
    wide = logits.float()
    finite = torch.isfinite(wide).all(-1).cpu().numpy()
    log_sum_exp = _log_sum_exp(works, wide)
    most = min(max((work.top_k for work in works), default=0), logits.shape[-1])
    top = torch.topk(wide, most, sorted=False)
    values, ids = top.values.cpu().numpy(), top.indices.cpu().numpy().astype(np.uint32)
    order = np.lexsort((ids, -values))
    values, ids = np.take_along_axis(values, order, -1), np.take_along_axis(ids, order, -1)
    dtype = _name(logits)
    results: list[Outcome] = []
    for work, (start, end) in zip(works, _of_each(works), strict=True):
        if not finite[start:end].all():
            results.append(not_finite())
        elif work.top_k == 0:
            rows = slice(start, end)
            results.append(LogitRows(to_numpy(logits[rows]), np.empty((work.rows, 0), np.uint32), log_sum_exp[rows]))
        else:
            some = (slice(start, end), slice(min(work.top_k, most)))
            # Back to the dtype it was computed in: exact, as it came from there.
            results.append(LogitRows(values[some].astype(DTYPES[dtype]), ids[some], log_sum_exp[start:end]))
    return results


def _log_sum_exp(works: Sequence[AppendWork], wide: torch.Tensor) -> Array:
    """[rows of all, 2]: at temperature 1, and at each work's own."""
    at_one = torch.logsumexp(wide, -1)
    at_temperature = at_one
    if any(work.temperature != 1.0 for work in works):
        temperatures = torch.tensor([work.temperature for work in works for _ in range(work.rows)], device=wide.device)
        at_temperature = torch.logsumexp(wide / temperatures[:, None], -1)
    both: Array = torch.stack([at_one, at_temperature], -1).cpu().numpy()
    return both


def _of_each(works: Sequence[AppendWork]) -> list[tuple[int, int]]:
    """Where the rows of each work start and end among those of all."""
    ends = np.cumsum([work.rows for work in works]).tolist()
    return [(end - work.rows, end) for end, work in zip(ends, works, strict=True)]


def _name(tensor: torch.Tensor) -> FloatName:
    return next(name for name, dtype in TORCH_DTYPES.items() if dtype is tensor.dtype)
