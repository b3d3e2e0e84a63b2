"""An audit of every kind of model: what runs is right where nothing protects, and what does not apply says why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from export.audit import hidden, run, scene
from export.audit.attack import carry_out
from export.audit.base import reading_rows
from export.audit.corpus import Text
from export.audit.measures import measure
from export.audit.report import Report, audited, read_json
from export.audit.run import ATTACKS, audit
from export.audit.scene import open_scene
from export.families import family_of
from export.scheme import SchemeName
from shared.errors import AuditError
from shared.manifest import Kind
from tests.checkpoints import ALL
from tests.export.audit.conftest import KindExports, Scenes, named

SCHEMES: list[SchemeName] = ["permutation", "rotation"]
# Long, and on nothing that differs between kinds beyond what the others stand on.
LONG = {"base-fine-tuned", "noise", "unauthorized-use", "theft-own-table", "theft-fine-tuning", "traffic-frequency"}
READ = {"table-norms", "table-gram", "known-prompt", "base-norms", "base-moments"}  # under both schemes
TRIED_ON_TEXT = READ | {"known-text", "lengths-and-timing", "table-sorted-entries", "base-sorted-entries"}
TRIED_ON_TEXT |= {"base-singular-values"}
TRIED_ON_DECODERS = TRIED_ON_TEXT | {"hidden-vocabulary", "user-full-logits"}
TRIED_ON_IMAGES = {"image-class-token", "image-base-norms"}
TRIED: dict[str, set[str]] = {
    "gpt2": TRIED_ON_DECODERS | {"tied-head"},
    "opt": TRIED_ON_DECODERS | {"tied-head"},
    "phi": TRIED_ON_DECODERS,
    "phi3": TRIED_ON_DECODERS | {"base-arrows"},
    "gemma": TRIED_ON_DECODERS | {"base-arrows", "tied-head"},
    "gemma2": TRIED_ON_DECODERS | {"base-arrows", "tied-head"},
    "mixtral": TRIED_ON_DECODERS | {"base-arrows"},
    "bert": TRIED_ON_TEXT,
    "marian": TRIED_ON_TEXT,
    "vit": TRIED_ON_IMAGES | {"base-singular-values"},
    "llava": TRIED_ON_DECODERS | TRIED_ON_IMAGES | {"base-arrows"},
}


@pytest.fixture(scope="module", autouse=True)
def a_short_text() -> Iterator[None]:
    read = scene.read_text

    def short(tokenizer: Path) -> Text:
        whole = read(tokenizer)
        cut = {"secret": whole.secret[:3_000], "public": whole.public[:3_000], "paragraphs": whole.paragraphs[:50]}
        return replace(whole, **cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene, "read_text", short)
        patch.setattr(hidden, "PREFIX", 2)
        yield


def test_every_kind_of_model_is_tried() -> None:
    assert {family_of(ALL[kind]).kind for kind in TRIED} == set(get_args(Kind))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", TRIED)
def test_an_audit_runs_what_applies_and_says_why_the_rest_does_not(
    kind: str, scheme: SchemeName, kind_exports: KindExports
) -> None:
    where = kind_exports(kind, scheme)
    report: Report = audit(where / "out", str(where / "model"), [one.name for one in ATTACKS if one.name not in LONG])
    assert read_json((where / "out" / "audit.json").read_bytes()) == report
    tried = {finding.name: finding for finding in report.findings if finding.skipped is None}
    assert tried.keys() == TRIED[kind]
    assert all(finding.skipped for finding in report.findings if finding.name not in tried)
    assert all(finding.control is not None and finding.control >= 0.99 for finding in tried.values())
    assert all((tried[name].recovered or 0) >= 0.99 for name in READ & tried.keys())
    if "table-sorted-entries" in tried:
        # Where a norm's gain sits between norm and stream, a rotation only reorders it.
        turned = scheme == "rotation" and kind not in ("gemma2", "bert", "marian")
        read = tried["table-sorted-entries"].recovered
        assert read is not None and (read < 0.5 if turned else read == 1.0)


def test_an_audit_of_a_model_that_takes_no_text_measures_what_there_is(
    kind_exports: KindExports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure", lambda seen: measure(seen, widths=(128,)))
    where = kind_exports("vit", "rotation")
    report = audit(where / "out", str(where / "model"))
    assert "no text" in report.measures["traffic"]["skipped"] and report.measures["parameters"]
    assert "class token" in (where / "out" / "audit.html").read_text()
    assert audited(report).startswith("vit: scheme rotation, image-encoder, float32; against")


def test_tables_of_zeros_are_not_measured_as_parameters(scenes: Scenes) -> None:
    names = {one["name"] for one in measure(scenes("gpt2"), widths=(128,))["parameters"]}
    assert "transformer.ln_f.weight" in names and "transformer.wpe.weight" not in names


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "table-sorted-entries"), ("vit", "image-class-token")])
def test_without_the_public_model_what_travels_is_attacked_all_the_same(kind: str, name: str, scenes: Scenes) -> None:
    finding = carry_out(named(ATTACKS, name), scenes(kind, base=False))
    assert finding.recovered == finding.control == 1.0


def test_a_model_of_another_family_is_refused(kind_exports: KindExports) -> None:
    with pytest.raises(AuditError, match="seen the architecture 'vit', wanted one of the gpt2 table"):
        open_scene(kind_exports("gpt2", "permutation") / "out", str(kind_exports("vit", "permutation") / "model"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("kind", "rows"), [("gpt2", 192), ("phi3", 80), ("gemma", 80), ("mixtral", 320), ("bert", 80), ("marian", 80)]
)
def test_rows_that_read_the_stream_are_the_same_function_on_both_sides(
    kind: str, rows: int, scheme: SchemeName, scenes: Scenes
) -> None:
    pairs = reading_rows(scenes(kind, scheme))
    assert len(pairs) == (2 if kind in ("bert", "marian") else 3)
    for pair in pairs:
        assert pair.public.shape == pair.hidden.shape == (rows, 48)
        lengths = [np.sort(np.linalg.norm(side, axis=1)) for side in (pair.public, pair.hidden)]
        assert np.allclose(*lengths, rtol=1e-4)
