"""Whose fault an error is, as programs are told."""

from __future__ import annotations

import pytest

from device_app.gateway.errors import api_error
from shared.errors import (
    BundleError,
    Cancelled,
    DishonestError,
    HistoryError,
    RefusedError,
    StipError,
    UnreachableError,
    UsageError,
)


@pytest.mark.parametrize(
    ("error", "status", "code", "again"),
    [
        (UsageError("x: wrong"), 400, None, False),
        (BundleError("chat template: wrong"), 400, None, False),
        (RefusedError("context_full", "too long"), 400, "context_length_exceeded", False),
        (RefusedError("unauthorized", "no token"), 502, "cloud_unauthorized", False),
        (RefusedError("too_many_sessions", "full"), 503, "cloud_too_many_sessions", True),
        (RefusedError("internal", "broken"), 502, "cloud_internal", False),
        (DishonestError("NaN"), 502, "cloud_dishonest", False),
        (UnreachableError("gone"), 503, "cloud_unreachable", True),
        (Cancelled("stopped"), 503, "cancelled", False),
        (HistoryError("disk full"), 500, None, False),
    ],
)
def test_errors_of_ours_have_the_status_that_says_whose_fault_it_is(
    error: StipError, status: int, code: str | None, again: bool
) -> None:
    answer = api_error(error)
    assert (answer.status, answer.code, answer.retry_after is not None) == (status, code, again)
    assert ("retry-after" in answer.response().headers) is again
    assert set(answer.body()["error"]) == {"message", "type", "param", "code"}


def test_a_hint_goes_with_the_message() -> None:
    assert api_error(UsageError("x: wrong", hint="do y")).message == "x: wrong (do y)"
