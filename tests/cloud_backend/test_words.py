"""Options as a mapping: from the YAML of a deployment, or as text from `serve run`."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_backend.words import parse
from shared.errors import UsageError


@pytest.mark.parametrize(
    ("value", "meant"), [(True, True), ("true", True), ("True", True), (False, False), ("false", False)]
)
def test_an_option_without_a_value_is_true_or_false_also_as_text(value: object, meant: bool) -> None:
    parsed = parse({"folders": "cloud", "verify": value})
    assert parsed.verify is meant and [str(folder) for folder in parsed.folders] == ["cloud"]


def test_a_value_may_begin_with_a_dash() -> None:
    parsed = parse({"folders": "-cloud", "token-file": "-tokens.txt", "origin": ["-a", "-b"]})
    assert (str(parsed.folders[0]), str(parsed.token_file), parsed.origin) == ("-cloud", "-tokens.txt", ["-a", "-b"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"verify": "yes"}, "--verify: seen yes, wanted true or false"),
        ({"verify": None}, "--verify: seen None, wanted true or false"),
        ({"token_file": None}, "--token-file: seen None, wanted a value"),
        ({"origin": ["https://a", None]}, "--origin: seen None, wanted a value"),
        ({"token-file": True}, "--token-file: seen True, wanted a value"),
        ({"folders": None}, "folders: seen None, wanted a value"),
    ],
)
def test_what_is_no_value_is_never_taken_for_one(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        parse({"folders": "cloud"} | options)
    assert caught.value.hint
