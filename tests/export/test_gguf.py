"""Transformed models as GGUF: every architecture that llama.cpp runs too, in floats and quantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from export import bundle
from export.bundle import Report, export_model
from export.check import run_onnx
from export.cloud_half import CloudPlan, plan_cloud
from export.cloud_weights import cloud_weights
from export.families import family_of
from export.gguf.file import GgufFile, decoded, encoded
from export.gguf.half import GGUF_FILE, GgufName
from export.gguf.layout import LAYOUTS, Form, Forms
from export.gguf.settings import described, frequency_factors
from export.permutation import Permutation
from export.source import Source, open_source
from export.stock import empty_model
from shared.key import UserKey
from shared.manifest import CloudManifest, check_files, read_manifest
from tests.checkpoints import make_checkpoint
from tests.gguf_models import MODELS, llama_cpp_logits

KINDS: list[GgufName] = ["f32", "q8_0"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a checkpoint of a kind of MODELS, made once."""
    made: dict[str, Path] = {}

    def checkpoint(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / kind, MODELS[kind])
        return made[kind]

    return checkpoint


@dataclass(frozen=True, eq=False)
class Exported:
    """An export, and the secrets that it drew, which nothing stores."""

    out: Path
    report: Report
    source: Source
    scheme: Permutation
    plan: CloudPlan

    @property
    def file(self) -> GgufFile:
        return GgufFile(self.out / "cloud" / GGUF_FILE)

    def expected(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """A tensor of the stock model, of which the export stores these values, in secret coordinates."""
        return self.scheme.act(name, stored, self.plan.axes[name], self.source.read)


def export(source: Path, out: Path, gguf: GgufName, **options: Any) -> Exported:
    """Exports, and keeps what was drawn."""
    drawn: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        draw = bundle.draw
        patch.setattr(bundle, "draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[0])
        report = export_model(str(source), out, gguf=gguf, **options)
    opened = open_source(str(source))
    plan = plan_cloud(opened, family_of(opened.config), options.get("head", "cloud"))
    return Exported(out, report, opened, drawn[0], plan)


@pytest.fixture(scope="module")
def exports(
    checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, GgufName], Exported]:
    """Gives the export of a kind of MODELS as a type, made once."""
    made: dict[tuple[str, GgufName], Exported] = {}

    def exported(kind: str, gguf: GgufName) -> Exported:
        if (kind, gguf) not in made:
            made[kind, gguf] = export(checkpoints(kind), tmp_path_factory.mktemp("gguf") / "out", gguf, drafts="none")
        return made[kind, gguf]

    return exported


def test_every_layout_is_tried() -> None:
    assert {config.model_type for config in MODELS.values()} == set(LAYOUTS)


# --- forms ---


@pytest.mark.parametrize("kind", MODELS)
def test_a_tensor_comes_back_from_llama_cpps_form_as_it_was(kind: str) -> None:
    form, places = Forms(MODELS[kind]), list[str]()
    for name, tensor in served(MODELS[kind]).items():
        values, one = torch.randn(tensor.shape), form(name)
        parts = one.stored(values)
        assert [tuple(part.shape) for part in parts] == one.shapes(tuple(values.shape))
        assert torch.equal(one.stock(parts), values), name
        places += one.names
    assert len(places) == len(set(places)), "two tensors in one place"


def served(config: Any) -> dict[str, torch.Tensor]:
    config = AutoConfig.for_model(**config.to_dict())
    config.tie_word_embeddings = False
    config.architectures = [family_of(config).served_class(config)]
    state: dict[str, torch.Tensor] = empty_model(config).state_dict()
    return state


def test_rotary_halves_become_neighbours() -> None:
    rows = torch.arange(8)
    [stored] = Form(("attn_q",), heads=2).stored(rows)
    assert stored.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# --- values ---


@pytest.mark.parametrize("gguf", KINDS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_file_holds_the_originals_values_in_secret_coordinates(
    kind: str, gguf: GgufName, exports: Callable[[str, GgufName], Exported]
) -> None:
    made = exports(kind, gguf)
    weights, form, file = cloud_weights(made.out / "cloud"), Forms(made.source.config), made.file
    assert set(weights.shapes) == made.plan.axes.keys() | made.plan.zeros.keys()
    for name in made.plan.axes:
        original, one = made.source.read(made.plan.stored[name]), form(name)
        kinds = [file.tensors[part].kind for part in one.names]
        parts = zip(one.stored(original), kinds, strict=True)
        stored = one.stock([decoded(encoded(part, kind), kind).view(part.shape) for part, kind in parts])
        assert torch.equal(weights.read(name), made.expected(name, stored)), name
        assert gguf == "f32" or (stored.ndim == 1) == torch.equal(stored, original) or "gate" in name
    for name in made.plan.zeros:
        assert not weights.read(name).any()


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("gguf", ["f16", "bf16", "q5_0", "q5_1", "q4_0", "q4_1"])
def test_every_type_is_written(kind: str, gguf: GgufName, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    made = export(checkpoints(kind), tmp_path / "out", gguf, drafts="none")
    assert made.report.quantisation == gguf
    kinds = {name: tensor.kind.name.lower() for name, tensor in made.file.tensors.items()}
    assert {kinds[name] for name in kinds if "attn_output.weight" in name} == {gguf}
    assert kinds["output.weight"] == ("q8_0" if gguf.startswith(("q4", "q5")) else gguf)
    assert {kinds[name] for name in kinds if "norm" in name or "bias" in name} == {"f32"}


def test_nothing_is_rounded_but_what_the_type_rounds(exports: Callable[[str, GgufName], Exported]) -> None:
    # The check compares with the original of the same quantised values.
    assert (
        exports("llama", "q8_0").report.check.max_difference
        < 1e-5 * exports("llama", "q8_0").report.check.largest_logit
    )


@pytest.mark.parametrize("gguf", ["f32", "f16"])
def test_a_rotated_model_goes_into_floats(gguf: GgufName, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    report = export_model(str(checkpoints("llama")), tmp_path / "out", scheme="rotation", gguf=gguf)
    assert report.check.rounded == (gguf == "f16")


# --- files as sources ---

READ_BY_TRANSFORMERS = [kind for kind in MODELS if MODELS[kind].model_type not in ("smollm3", "phi")]


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_a_file_of_any_architecture_is_read_as_it_was_written(
    kind: str, exports: Callable[[str, GgufName], Exported]
) -> None:
    made = exports(kind, "f32")
    source = open_source(str(made.file.path))
    weights, was, now = cloud_weights(made.out / "cloud"), made.source.config, source.config
    for name in weights.shapes.keys() - made.plan.zeros.keys():
        assert torch.equal(source.read(name), weights.read(name)), name
    assert described(now, 320) == pytest.approx(described(was, 320))
    assert all(getattr(now, name, None) == getattr(was, name, None) for name in ("layer_types", "norm_topk_prob"))
    before, after = frequency_factors(was), frequency_factors(now)
    assert after is None if before is None else torch.equal(after, before)


# --- what else is in the file ---


def test_the_metadata_says_sizes_and_the_key_and_no_more(exports: Callable[[str, GgufName], Exported]) -> None:
    made = exports("llama", "q8_0")
    reader = gguf.GGUFReader(made.out / "cloud" / GGUF_FILE)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert set(fields) == {
        "general.architecture",
        "general.file_type",
        "general.quantization_version",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.attention.value_length",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.rope.dimension_count",
        "llama.rope.freq_base",
        "llama.vocab_size",
        "stip.key_id",
        "tokenizer.ggml.model",
    }
    assert fields["tokenizer.ggml.model"] == "none"
    assert fields["stip.key_id"] == made.report.key_id


@pytest.mark.parametrize("kind", MODELS)
def test_no_metadata_names_the_model_or_its_tokens(kind: str, exports: Callable[[str, GgufName], Exported]) -> None:
    metadata = exports(kind, "f32").file.metadata
    architecture = LAYOUTS[MODELS[kind].model_type].name
    own = {"general.architecture", "general.file_type", "general.quantization_version", "stip.key_id"}
    assert all(key in own or key.startswith((f"{architecture}.", "GGUF.")) for key in metadata)
    assert not any("token" in key or "name" in key for key in metadata)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_devices_add_is_zero(kind: str, exports: Callable[[str, GgufName], Exported]) -> None:
    file = exports(kind, "f32").file
    assert file.tensors["token_embd.weight"].shape == (320, 64)
    assert not file.raw("token_embd.weight").any()
    assert kind != "gpt2" or not file.raw("position_embd.weight").any()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_with_the_classifier_on_devices_the_cloud_has_none(
    kind: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    file = export(checkpoints(kind), tmp_path / "out", "q8_0", head="device").file
    architecture = LAYOUTS[MODELS[kind].model_type].name
    assert "output.weight" not in file.tensors
    assert file.tensors["token_embd.weight"].shape == (1, 64)
    assert not file.raw("token_embd.weight").any()
    assert file.metadata[f"{architecture}.vocab_size"] == 1


def test_the_clouds_folder_holds_one_file_of_weights(exports: Callable[[str, GgufName], Exported]) -> None:
    made = exports("llama", "q8_0")
    cloud = made.out / "cloud"
    assert sorted(path.name for path in cloud.iterdir()) == ["config.json", GGUF_FILE, "stip.json"]
    manifest = read_manifest(cloud, CloudManifest)
    assert (manifest.weights, manifest.quantisation) == ("gguf", "q8_0")
    assert manifest.files[GGUF_FILE].header_sha256
    check_files(cloud, manifest, contents=True)
    assert made.file.metadata["stip.key_id"] == manifest.key_id


def test_the_report_says_what_blocks_cost(exports: Callable[[str, GgufName], Exported]) -> None:
    quantised = json.loads((exports("llama", "q8_0").out / "export.json").read_text())
    assert quantised["quantisation"] == "q8_0"
    assert quantised["log2_keys"] < quantised["log2_keys_free"]
    plain = json.loads((exports("llama", "f32").out / "export.json").read_text())
    assert plain["quantisation"] == "f32" and plain["log2_keys_free"] is None
    assert plain["log2_keys"] == quantised["log2_keys_free"]


# --- llama.cpp itself ---


@pytest.mark.llama
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_what_the_stock_model_does(
    kind: str, checkpoints: Callable[[str], Path], exports: Callable[[str, GgufName], Exported]
) -> None:
    made = exports(kind, "f32")
    ids = np.random.default_rng(0).integers(0, 320, 48)
    model = AutoModelForCausalLM.from_pretrained(checkpoints(kind), dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    device = made.out / "device"
    key = UserKey.load(device / "key.safetensors")
    sent = key.hide(run_onnx(device / "embedding.onnx", ids=ids, positions=np.arange(ids.size)))
    seen = key.reveal_rows(llama_cpp_logits(made.out / "cloud" / GGUF_FILE, sent))
    # llama.cpp looks GELU up in a table of float16.
    tolerance = 1e-2 if "silu" not in LAYOUTS[made.source.config.model_type].activations else 1e-4
    worst = np.abs(seen - expected).max() / np.abs(expected).max()
    assert worst < tolerance, worst
    assert (seen.argmax(-1) == expected.argmax(-1)).mean() > 0.97


@pytest.mark.llama
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_llama_cpp_loads_what_is_quantised_or_has_no_classifier(
    kind: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    head = "cloud" if kind == "mixtral" else "device"
    out = export(checkpoints(kind), tmp_path / "out", "q4_0", head=head, drafts="none").out
    logits = llama_cpp_logits(out / "cloud" / GGUF_FILE, np.ones((3, 64), np.float32))
    assert logits.shape == (3, 320 if head == "cloud" else 1)
    assert np.isfinite(logits).all() and logits.any() == (head == "cloud")
