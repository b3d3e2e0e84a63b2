"""What replies say of last hidden states: for a whole batch of requests at once, as a vocabulary is wide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cloud_backend import host_rows
from cloud_backend.engine import AppendWork, HiddenRows, LogitRows, Outcome, not_finite
from cloud_backend.tensors import TORCH_DTYPES, to_device, to_host, to_numpy
from shared.wire import DTYPES, Array, FloatName

Classify = Callable[[torch.Tensor], torch.Tensor]  # last hidden states [rows, hidden] to logits [rows, vocab]


def answers(works: Sequence[AppendWork], states: Sequence[torch.Tensor], classify: Classify | None) -> list[Outcome]:
    """The result of each work from its last hidden states [rows, hidden]; `not_finite` where a value is not."""
    results: list[Outcome] = [not_finite()] * len(works)
    kinds = dict.fromkeys((work.want, work.dtype) for work in works)
    for want, dtype in kinds:
        chosen = [at for at, work in enumerate(works) if (work.want, work.dtype) == (want, dtype)]
        # [rows of all, hidden]; one alone is not copied
        hidden = torch.cat([states[at] for at in chosen]) if len(chosen) > 1 else states[chosen[0]]
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
    finite, there = to_host(_finite(hidden), hidden)
    rows = to_numpy(there)
    return [HiddenRows(rows[start:end]) if finite[start:end].all() else not_finite() for start, end in _of_each(works)]


def logit_rows(works: Sequence[AppendWork], logits: torch.Tensor) -> list[Outcome]:
    """Of logits [rows of all, vocab] in the dtype they are sent in: the top k by value, then id, or all of them; and
    log-sum-exp of the values as sent, so that a device can rely on it."""
    if logits.device.type == "cuda":
        return _rows_of_cuda(works, logits)
    rows = to_numpy(logits)
    return [
        host_rows.logit_rows(work, rows[start:end]) for work, (start, end) in zip(works, _of_each(works), strict=True)
    ]


def _rows_of_cuda(works: Sequence[AppendWork], logits: torch.Tensor) -> list[Outcome]:
    wide = logits.float()
    most = min(max((work.top_k for work in works), default=0), logits.shape[-1])
    top = torch.topk(wide, most, sorted=False)
    full = [logits[start:end] for work, (start, end) in zip(works, _of_each(works), strict=True) if work.top_k == 0]
    finite, log_sum_exp, values, ids, *full = to_host(
        _finite(wide), _log_sum_exp(works, wide), top.values, top.indices, *full
    )
    dtype, whole, sums = DTYPES[_name(logits)], iter(full), log_sum_exp.numpy()
    best, named = _sorted(values.numpy(), ids.numpy().astype(np.uint32))
    results: list[Outcome] = []
    for work, (start, end) in zip(works, _of_each(works), strict=True):
        row = slice(start, end)
        if work.top_k == 0:
            result = LogitRows(to_numpy(next(whole)), np.empty((work.rows, 0), np.uint32), sums[row])
        else:
            result = LogitRows(best[row, : work.top_k].astype(dtype), named[row, : work.top_k], sums[row])
        results.append(result if finite[row].all() else not_finite())
    return results


def _finite(rows: torch.Tensor) -> torch.Tensor:
    """Whether all values of each row are: seen by the greatest and the least, which take less than looking at each."""
    return torch.isfinite(rows.amax(-1)) & torch.isfinite(rows.amin(-1))


def _sorted(values: Array, ids: Array) -> tuple[Array, Array]:
    """Each row by descending value, then ascending id."""
    order = np.lexsort((ids, -values))
    return np.take_along_axis(values, order, -1), np.take_along_axis(ids, order, -1)


def _log_sum_exp(works: Sequence[AppendWork], wide: torch.Tensor) -> torch.Tensor:
    """[rows of all, 2]: at temperature 1, and at each work's own."""
    at_one = torch.logsumexp(wide, -1)
    at_temperature = at_one
    if any(work.temperature != 1.0 for work in works):
        temperatures = np.repeat([work.temperature for work in works], [work.rows for work in works])
        at_temperature = torch.logsumexp(wide / to_device(temperatures.astype(np.float32), wide.device)[:, None], -1)
    return torch.stack([at_one, at_temperature], -1)


def _of_each(works: Sequence[AppendWork]) -> list[tuple[int, int]]:
    """Where the rows of each work start and end among those of all."""
    ends = np.cumsum([work.rows for work in works]).tolist()
    return [(end - work.rows, end) for end, work in zip(ends, works, strict=True)]


def _name(tensor: torch.Tensor) -> FloatName:
    return next(name for name, dtype in TORCH_DTYPES.items() if dtype is tensor.dtype)
