"""The report: JSON that comes back the same, a table that fits a terminal, and figures that do not flatter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.audit.report import (
    last_component,
    make_report,
    peak_memory,
    percent,
    read_json,
    summary,
    table,
    to_json,
    verdict,
    warnings,
)
from export.audit.scene import open_scene
from shared.errors import AuditError
from shared.manifest import DeviceManifest, read_manifest
from tests.export.audit.findings import CURVES, MEASURES, finding, report


def test_json_comes_back_the_same() -> None:
    written = report(*(finding(name, 0.5, figures=figures) for name, figures in CURVES.items()), measures=MEASURES)
    assert read_json(to_json(written)) == written


def test_json_takes_numpys_numbers_and_arrays() -> None:
    figures = {"one": np.float32(0.5), "count": np.int64(3), "many": np.arange(3), "wide": np.float64(0.25)}
    written = to_json(report(finding("a", 0.5, figures=figures)))
    assert read_json(written).findings[0].figures == {"one": 0.5, "count": 3, "many": [0, 1, 2], "wide": 0.25}


@pytest.mark.parametrize("data", [b"{}", b"\xff", b'{"format": "stip-audit-2"}', b"["])
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises(AuditError, match="stip-audit-1"):
        read_json(data)


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0.0 %"),
        (0.0001, "<0.1 %"),
        (0.017, "1.7 %"),
        (0.9994, "99.9 %"),
        (0.99951, "99.9 %"),
        (0.9999999, "99.9 %"),
        (1.0, "100 %"),
    ],
)
def test_a_percentage_is_never_rounded_up_to_all_or_down_to_nothing(share: float | None, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("recovered", "control", "said"),
    [
        (1.0, 1.0, "broken"),
        (0.1, 1.0, "leaks"),
        (0.01, 1.0, "holds"),
        (0.01, 0.98, "control failed"),
        (0.01, None, "control failed"),
        (0.01, float("nan"), "control failed"),
        (None, None, "not tried"),
    ],
)
def test_verdicts(recovered: float | None, control: float | None, said: str) -> None:
    assert verdict(finding("a", recovered, control)) == said


def test_a_failed_control_is_a_warning_and_not_in_the_summary() -> None:
    failed = report(finding("weak", 0.0, 0.5))
    assert warnings(failed) == ["WARNING Attack weak: control failed (50.0 %): this figure says nothing"]
    assert warnings(failed)[0] in table(failed)
    assert "says nothing" in summary(failed)[0]


def test_the_summary_names_the_strongest_attack_of_each_attacker_and_the_limit() -> None:
    sentences = summary(
        report(
            finding("one", 0.3),
            finding("two", 0.999, title="Sorted look-up"),
            finding("three", 0.01, knows="nothing more"),
        )
    )
    # What an attack could not do is left out: another may, with the same knowledge.
    assert sentences[:-1] == ["Broken by one who knows the embedding table: 99.9 % of tokens (Sorted look-up)."]
    assert "somebody may have a better one" in sentences[-1]


def test_the_table_fits_a_terminal_and_gives_the_reason_of_what_was_not_tried() -> None:
    long = "A title that goes on and on, " * 5
    shown = table(
        report(finding("a", 0.5, title=long, knows=long), finding("b", None, None, skipped="no public model"))
    )
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 120
    assert any("no public model" in line for line in lines)
    assert next(line for line in lines if line.startswith("Attack b")).split()[-5:] == ["–", "–", "–", "not", "tried"]
    assert all(line == line.rstrip() for line in lines)


def test_a_hostile_name_cannot_steer_the_terminal() -> None:
    shown = table(report(finding("a", 0.5, title="\x1b[2Jgone"), served_name="\x1b]0;owned\x07"))
    assert "\x1b" not in shown and "\x07" not in shown


@pytest.mark.parametrize(
    ("model", "name"),
    [("/home/someone/secret/base.gguf", "base.gguf"), ("owner/model", "model"), ("models/base/", "base"), ("x", "x")],
)
def test_a_model_is_named_without_its_folders(model: str, name: str) -> None:
    assert last_component(model) == name


def test_the_report_on_an_export(tiny: Path) -> None:
    manifest = read_manifest(tiny / "device", DeviceManifest)
    made = make_report(
        open_scene(tiny, None), [finding("a", 1.0)], {}, manifest=manifest, model="/a/secret/base", seconds=1.0
    )
    assert (made.scheme, made.head, made.dtype, made.model) == ("permutation", "cloud", "float32", "base")
    assert b"secret" not in to_json(made) and b"sec" in to_json(made)
    assert 2**24 < made.peak_memory_bytes <= peak_memory()
    assert read_json(to_json(made)) == made
