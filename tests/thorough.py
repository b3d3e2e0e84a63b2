"""How thoroughly properties are tried: `make test-all` tries four times as many examples as `make test`."""

from __future__ import annotations

import os

THOROUGH = "STIP_THOROUGH_TESTS"


def examples(most: int) -> int:
    """Examples of a property of which so many are tried where time does not matter."""
    return most if os.environ.get(THOROUGH) else max(2, most // 4)
