"""An audit of an export whose cloud has quantised weights: the attacks read those, and one more applies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from export.audit import hidden, scene
from export.audit.corpus import Text
from export.audit.report import Report, audited
from export.audit.run import ATTACKS, audit
from export.audit.scene import open_scene, unprotected
from export.bundle import export_model
from export.gguf.file import rounded
from tests.checkpoints import make_checkpoint
from tests.export.audit.test_kinds import LONG
from tests.gguf_models import MODELS

# What is read off rows that are rounded in blocks; the others read what travels.
FROM_WEIGHTS = {"base-sorted-entries", "base-norms", "base-moments", "base-singular-values", "tied-head"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny llama as `model`, and its exports as `q8_0` and `f16`."""
    folder = tmp_path_factory.mktemp("gguf")
    make_checkpoint(folder / "model", MODELS["llama"])
    export_model(str(folder / "model"), folder / "q8_0", gguf="q8_0", drafts="none")
    export_model(str(folder / "model"), folder / "f16", gguf="f16", drafts="none")
    return folder


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


def test_quantised_weights_are_attacked_like_others_and_by_their_blocks(out: Path) -> None:
    report: Report = audit(out / "q8_0", str(out / "model"), [one.name for one in ATTACKS if one.name not in LONG])
    tried = {finding.name: finding for finding in report.findings if finding.skipped is None}
    assert FROM_WEIGHTS | {"table-sorted-entries", "table-blocks", "hidden-vocabulary"} <= tried.keys()
    assert all(finding.control is not None and finding.control >= 0.99 for finding in tried.values())
    assert all((tried[name].recovered or 0) >= 0.99 for name in FROM_WEIGHTS | {"table-sorted-entries", "table-blocks"})
    assert tried["table-blocks"].figures["features_in_a_block"] == 32
    assert report.quantisation == "q8_0"
    assert "float32, weights q8_0 (GGUF); against the public model" in audited(report)
    assert "<dt>weights</dt><dd>q8_0 (GGUF)" in (out / "q8_0" / "audit.html").read_text()


def test_the_control_s_weights_are_rounded_like_the_export_s(out: Path) -> None:
    export_model(str(out / "model"), out / "q4_0", gguf="q4_0", drafts="none")
    scene = open_scene(out / "q4_0", str(out / "model"))
    control, name = unprotected(scene).weights, "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(control.read(name), rounded(scene.public.read(name).flip(0, 1), Kind.Q4_0))
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(control.read(norm), scene.public.read(norm).flip(0))


def test_of_floats_no_features_lie_together(out: Path) -> None:
    assert open_scene(out / "f16", None).target.block == 0
    assert open_scene(out / "q8_0", None).target.block == 32
