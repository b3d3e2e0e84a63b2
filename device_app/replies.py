"""What a reply must be to be true, and what it says once the key has revealed it (PROTOCOL.md, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from device_app.sampler import Row
from shared.errors import DishonestError
from shared.key import UserKey
from shared.wire import Array, Logits


def states(name: str, values: Array, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    """Values of this shape and dtype, all finite, in float32. Raises DishonestError."""
    if values.dtype != dtype:
        raise DishonestError(f"{name}: seen {values.dtype.name}, wanted {dtype.name}")
    if values.shape != shape:
        raise DishonestError(f"{name}: seen shape {values.shape}, wanted {shape}")
    plain: Array = values.astype(np.float32)
    if not np.isfinite(plain).all():
        raise DishonestError(f"{name}: seen NaN or infinity, wanted finite values")
    return plain


def revealed_rows(
    message: Logits, key: UserKey, *, rows: int, top_k: int, temperature: float, dtype: np.dtype[Any]
) -> list[Row]:
    """Rows of plain ids. Raises DishonestError for rows that no model can have given."""
    vocab_size = key.vocab_size
    full = top_k == 0
    wanted = (rows, vocab_size if full else min(top_k, vocab_size))
    values, ids = message.values.astype(np.float32), message.ids
    if message.values.dtype != dtype:
        raise DishonestError(f"logits: seen {message.values.dtype.name}, wanted {dtype.name}")
    if values.shape != wanted or ids.shape != (wanted[0], 0 if full else wanted[1]):
        raise DishonestError(f"logits: seen shapes {values.shape} and {ids.shape}, wanted {wanted}")
    both = message.log_sum_exp.tolist()
    if not all(math.isfinite(at_one) and math.isfinite(at_temperature) for at_one, at_temperature in both):
        raise DishonestError("log-sum-exp: seen NaN or infinity, wanted finite values")
    # (at 1, at the temperature): at 1 the second is not used, and not looked at.
    masses = [(at_one, at_one if temperature == 1 else at_temperature) for at_one, at_temperature in both]
    if full:
        ends = [(float(row.max()), float(row.min())) for row in values]
    else:
        # Comparisons with NaN are false, so what passes is sorted, and finite if its ends are.
        if not (values[:, 1:] <= values[:, :-1]).all():
            raise DishonestError("logits: seen rows that are not sorted")
        if any(len(set(row)) < len(row) for row in ids.tolist()):
            raise DishonestError("ids: seen one twice in a row")
        ends = [(float(row[0]), float(row[-1])) for row in values]
    for row, (top, least), (at_one, at_temperature) in zip(values, ends, masses, strict=True):
        _check_row(row, top, least, 1.0, at_one, vocab_size)
        if temperature != 1:
            _check_row(row, top, least, temperature, at_temperature, vocab_size)
    try:
        plain = np.arange(vocab_size)[None].repeat(len(ids), 0) if full else key.reveal_ids(ids)
    except IndexError:
        raise DishonestError(f"ids: seen one that is not less than {vocab_size}") from None
    if full:
        values = key.reveal_rows(values)
    return [
        Row(values[row], plain[row], at_temperature, at_one, full)
        for row, (at_one, at_temperature) in enumerate(masses)
    ]


def classified_rows(hidden: Array, classify: Callable[[Array], Array], temperature: float) -> list[Row]:
    """Full rows, which the device computes from plain hidden states [rows, hidden_size]."""
    return [_full_row(values, temperature) for values in classify(hidden)]


def _full_row(values: Array, temperature: float) -> Row:
    """A row of all logits [vocab_size] with their log-sum-exp at `temperature` and at 1."""
    top, least = float(values.max()), float(values.min())
    if not (math.isfinite(top) and math.isfinite(least)):  # either is NaN if any value is
        raise DishonestError("hidden: seen values that no logits can be computed of, wanted a model's")
    at_one = _log_sum_exp(values, top, 1.0)
    at_temperature = at_one if temperature == 1 else _log_sum_exp(values, top, temperature)
    return Row(values, np.arange(len(values)), at_temperature, at_one, full=True)


def _log_sum_exp(values: Array, top: float, temperature: float) -> float:
    with np.errstate(over="ignore"):  # so far below the top that it weighs nothing
        below = (values - np.float32(top)) / np.float32(temperature)
    return top / temperature + math.log(np.exp(below).sum(dtype=np.float64))


def _check_row(values: Array, top: float, least: float, temperature: float, mass: float, vocab_size: int) -> None:
    """A log-sum-exp (`mass`) below that of the values [k] beside it, or above what the unseen could add, is a lie."""
    if not (math.isfinite(top) and math.isfinite(least)):
        raise DishonestError("logits: seen NaN or infinity, wanted finite values")
    seen = float(np.exp((values - np.float32(top)) / np.float32(temperature)).sum())
    unseen = (vocab_size - len(values)) * math.exp((least - top) / temperature)
    over = mass - top / temperature
    slack = 1e-3 + 1e-6 * abs(top) / temperature
    if not math.log(seen) - slack <= over <= math.log(seen + unseen) + slack:
        raise DishonestError("log-sum-exp: it does not fit the values beside it")
