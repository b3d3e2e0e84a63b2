"""What each level is worth, said in a line that fits a terminal and claims nothing."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from export.scheme import SchemeName
from shared.levels import SCHEMES, limit


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_limit_is_one_short_line_that_says_who_reads_every_token(scheme: str) -> None:
    line = limit(scheme)
    assert line.startswith(scheme) and "\n" not in line and len(line) <= 120
    assert re.search("who has .* reads every token$", line)


def test_what_is_no_encryption_is_not_called_so() -> None:
    assert "not encryption" in limit("permutation")
    assert not any(re.search("secure|safe|protects|private", limit(scheme)) for scheme in SCHEMES)


def test_every_scheme_that_exports_can_have_has_a_limit() -> None:
    assert set(get_args(SchemeName)) == set(SCHEMES)


def test_a_scheme_of_a_later_version_promises_nothing() -> None:
    assert "can promise nothing" in limit("masking") and "'masking'" in limit("masking")
    assert "\n" not in limit("a\nb")
