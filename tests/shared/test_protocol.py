"""PROTOCOL.md says what shared/wire.py does: every field with its default and choices, every code, the example."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

from shared import wire

TEXT = (Path(wire.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8")
NAMES = [kind.__name__ for _, kind in wire.messages()]


def section(name: str) -> str:
    """The text under `### name`."""
    return re.split(r"^##", TEXT.partition(f"\n### {name} ")[2], maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str) -> list[list[str]]:
    """Cells of the rows whose first cell is `code`."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


def fields(name: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table(section(name)) if len(row) == 5}


def struct_fields(name: str) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(getattr(wire, name)) if field.name != "tensors"}


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_in_its_table(name: str) -> None:
    assert set(fields(name)) == set(struct_fields(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_default_is_the_tables(name: str) -> None:
    seen: dict[str, Any] = {field: row[2].strip("`") for field, row in fields(name).items()}
    wanted = {field: "—" if info.required else json.dumps(info.default) for field, info in struct_fields(name).items()}
    assert seen == wanted


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Error"])
def test_every_choice_is_in_its_table(name: str) -> None:
    seen = {field: re.findall(r"`(\w+)`", row[1]) for field, row in fields(name).items() if row[0] == "string"}
    hints = get_type_hints(getattr(wire, name))
    wanted = {field: list(get_args(hints[field])) if get_origin(hints[field]) is Literal else [] for field in seen}
    assert seen == wanted


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_named_in_order(name: str) -> None:
    kind = getattr(wire, name)
    line = section(name).partition("Tensors:")[2].partition("\n")[0]
    named = [word for word in re.findall(r"`(\w+)`", line) if word in kind.TENSORS]
    assert tuple(named) == kind.TENSORS
    assert kind.TENSORS or "No tensors." in section(name)


def test_every_error_code_is_in_the_table_in_order() -> None:
    assert [row[0] for row in table(section("Error")) if len(row) == 3] == list(get_args(wire.ErrorCode))


def test_every_tag_is_named() -> None:
    assert all(f"Type `{tag}`." in section(kind.__name__) for tag, kind in wire.messages())


def test_every_dtype_is_in_the_table() -> None:
    sizes = {row[0]: int(row[1]) for row in table(TEXT) if row[0] in wire.DTYPES and len(row) == 3}
    assert sizes == {name: dtype.itemsize for name, dtype in wire.DTYPES.items()}


def test_the_worked_example_is_the_vector_and_its_offsets_are_right() -> None:
    lines = re.findall(r"^ ?(\d+)   ((?:[0-9a-f]{2} )+)", section("Worked").partition("```")[2], re.MULTILINE)
    frame = b""
    for offset, data in lines:
        assert int(offset) == len(frame)
        frame += bytes.fromhex(data)
    vector = json.loads((Path(wire.__file__).parent / "vectors" / "append_minimal.json").read_bytes())
    assert frame.hex() == vector["frame"]


def test_the_limits_are_the_codes() -> None:
    assert f"at most {wire.MAX_HEADER:,}" in TEXT
    assert f"more than {wire.MAX_TENSORS} tensors, or more than {wire.MAX_DIMENSIONS} dimensions" in TEXT
    assert f"Version: `{wire.SUBPROTOCOL}`" in TEXT
