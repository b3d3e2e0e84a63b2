"""Random JSON schemas of the keywords that grammars support, each of whose texts has an end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Schema = dict[str, Any]

NAMES = ("name", "the cat", "age", "tags", "é", 'a "b"', "x", "y_1", "<|end|>", "next")
PATTERNS = ("^[a-z]{1,4}$", "^(yes|no|perhaps)$", "[0-9]{3}-[0-9]{2}", "^#[0-9a-f]{6}$", "^.{0,5}$", "^\\w{1,5}@\\d$")
FORMATS = ("ipv4", "ipv6", "uuid")


def random_schema(random: np.random.Generator, depth: int = 3) -> Schema:
    """A schema; `depth` bounds how deep it nests."""
    kinds = [_string, _matching, _formatted, _integer, _number, _boolean, _null, _enum, _const, _several_types]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _tuple, _any_of, _all_of, _map]
    if depth == 3:  # references are to the root's definitions
        kinds = [_object, _object, _object, _array, _any_of, _list_by_reference, _shared_by_reference, *kinds[:3]]
    kind: Callable[[np.random.Generator, int], Schema] = kinds[random.integers(len(kinds))]
    schema = kind(random, depth)
    if random.random() < 0.2:  # what constrains nothing
        schema = {"title": "A title", "description": "of something", **schema}
    return schema


def _string(random: np.random.Generator, depth: int) -> Schema:
    least = int(random.integers(4))
    return {"type": "string", "minLength": least, "maxLength": least + int(random.integers(8))}


def _matching(random: np.random.Generator, depth: int) -> Schema:
    pattern = str(random.choice(PATTERNS))
    return {"type": "string", "pattern": pattern, **({} if pattern.startswith("^") else {"maxLength": 12})}


def _formatted(random: np.random.Generator, depth: int) -> Schema:
    return {"type": "string", "format": str(random.choice(FORMATS))}


def _integer(random: np.random.Generator, depth: int) -> Schema:
    least = int(random.integers(-1000, 1000))
    most = least + int(random.integers(1, 5000))
    match random.integers(4):
        case 0:
            return {"type": "integer", "exclusiveMinimum": least, "exclusiveMaximum": most + 2}
        case 1:
            return {"type": "integer", "minimum": least, "maximum": most + 7, "multipleOf": 7}
        case _:
            return {"type": "integer", "minimum": least, "maximum": most}


def _number(random: np.random.Generator, depth: int) -> Schema:
    least = int(random.integers(-200, 200)) / 4
    # Without a step a number may go on with digits for ever, and a model of random weights does.
    return {"type": "number", "minimum": least, "maximum": least + int(random.integers(1, 80)) / 4, "multipleOf": 0.25}


def _boolean(random: np.random.Generator, depth: int) -> Schema:
    return {"type": "boolean"}


def _null(random: np.random.Generator, depth: int) -> Schema:
    return {"type": "null"}


def _enum(random: np.random.Generator, depth: int) -> Schema:
    values = ["red", "green", 'a "quoted" blue', "☃", 7, -0.5, None, True, ["x", 1], {"k": "v"}]
    return {"enum": [values[place] for place in random.permutation(len(values))[: random.integers(1, 6)]]}


def _const(random: np.random.Generator, depth: int) -> Schema:
    constants: list[Any] = ["a constant", 42, None, False, {"a": [1, {"b": "\n"}]}, "<|end|><|im_end|>"]
    return {"const": constants[random.integers(len(constants))]}


def _several_types(random: np.random.Generator, depth: int) -> Schema:
    return {"type": ["string", "null", "boolean"], "maxLength": 3}


def _object(random: np.random.Generator, depth: int) -> Schema:
    names = [str(name) for name in random.permutation(NAMES)[: random.integers(1, 5)]]
    required = [name for name in names if random.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: random_schema(random, depth - 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _map(random: np.random.Generator, depth: int) -> Schema:
    """Keys that the model chooses."""
    values = random_schema(random, depth - 1)
    return {
        "type": "object",
        "patternProperties": {"^[a-c]{1,2}$": values},
        "additionalProperties": False,
        "maxProperties": int(random.integers(1, 4)),
    }


def _array(random: np.random.Generator, depth: int) -> Schema:
    least = int(random.integers(3))
    items = random_schema(random, depth - 1)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + int(random.integers(3))}


def _tuple(random: np.random.Generator, depth: int) -> Schema:
    first = [random_schema(random, depth - 1) for _ in range(random.integers(1, 4))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}


def _any_of(random: np.random.Generator, depth: int) -> Schema:
    return {"anyOf": [random_schema(random, depth - 1) for _ in range(random.integers(2, 4))]}


def _all_of(random: np.random.Generator, depth: int) -> Schema:
    return {"allOf": [_integer(random, depth), {"minimum": -2000}]}


def _list_by_reference(random: np.random.Generator, depth: int) -> Schema:
    """A list that holds itself: a node, and another behind it or none."""
    node = {
        "type": "object",
        "properties": {
            "value": random_schema(random, 0),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def _shared_by_reference(random: np.random.Generator, depth: int) -> Schema:
    return {
        "$defs": {"point": _object(random, 1)},
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    }
