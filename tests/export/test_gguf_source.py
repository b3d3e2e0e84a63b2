"""A quantised GGUF file, transformed without computing a single value anew; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen3MoeConfig

from export import cli
from export.bundle import export_model
from export.gguf.half import GGUF_FILE
from export.gguf.layout import Form
from shared.errors import ExportError, FamilyError, SourceError
from shared.manifest import CloudManifest, read_manifest
from tests.checkpoints import OPT, make_checkpoint
from tests.export.test_gguf import Exported, export
from tests.gguf_models import BLOCKS, EXPERTS


@pytest.fixture(scope="module")
def moved(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """SmolLM2's blocks, moved."""
    return export(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "out", "source", drafts="none")


@pytest.mark.llama
def test_the_moved_file_holds_exactly_the_originals_quantised_values(moved: Exported) -> None:
    # Both files are read without this project's way back from llama.cpp's form: q and k rows by their own order.
    original, transformed, drawn = moved.source.file, moved.file, moved.scheme  # type: ignore[attr-defined]
    residual = torch.from_numpy(drawn.index("residual"))
    for layer in (0, 17, 29):
        query, value = (torch.from_numpy(drawn.index(f"{name}[{layer}]")) for name in ("query", "value"))
        attended, product = (torch.from_numpy(drawn.index(f"{name}[{layer}]")) for name in ("attended", "product"))
        [neighbours] = Form(("q",), heads=9).stored(torch.arange(576))
        rows = torch.argsort(neighbours)[query[neighbours]]
        for name, out, into in (
            ("attn_q", rows, residual),
            ("attn_v", value, residual),
            ("attn_output", residual, attended),
            ("ffn_up", product, residual),
            ("ffn_down", residual, product),
        ):
            full = f"blk.{layer}.{name}.weight"
            assert transformed.tensors[full].kind == original.tensors[full].kind
            assert torch.equal(transformed.read(full), original.read(full)[out][:, into]), full
    vocab = torch.from_numpy(drawn.index("vocab"))
    assert torch.equal(transformed.read("output.weight"), original.read("token_embd.weight")[vocab][:, residual])


@pytest.mark.llama
def test_every_tensor_of_the_moved_file_is_the_original_in_secret_coordinates(moved: Exported) -> None:
    from export.cloud_weights import cloud_weights

    weights = cloud_weights(moved.out / "cloud")
    for name in moved.plan.axes:
        original = moved.source.read(moved.plan.stored[name])
        assert torch.equal(weights.read(name), moved.expected(name, original)), name


@pytest.mark.llama
def test_the_moved_file_is_as_large_as_the_original_and_says_its_type(moved: Exported) -> None:
    assert moved.report.quantisation == "q4_1"
    assert read_manifest(moved.out / "cloud", CloudManifest).quantisation == "q4_1"
    source = moved.source.path.stat().st_size  # type: ignore[attr-defined]
    # The classifier was tied before, and zeros take the token table's place.
    assert (moved.out / "cloud" / GGUF_FILE).stat().st_size < 1.5 * source
    assert moved.report.check.max_difference < 1e-4 * moved.report.check.largest_logit
    assert moved.report.log2_keys is not None and moved.report.log2_keys_free is not None
    assert moved.report.log2_keys < moved.report.log2_keys_free


# --- memory ---

# A model of 256 MiB, whose largest tensor is of 4 MiB, written in a process of its own.
WRITING = """
import re, sys
from pathlib import Path
from export.cloud_half import plan_cloud, used_structures
from export.families import family_of
from export.gguf.half import plan_gguf
from export.gguf.writing import write_gguf_half
from export.schemes import draw
from export.source import open_source

source = open_source(sys.argv[1])
family = family_of(source.config)
plan = plan_cloud(source, family, "cloud")
made = plan_gguf(source, family, plan, "q8_0", "permutation", "key")
scheme = draw("permutation", used_structures(family.spaces(source.config), plan), blocks=made.blocks(plan))
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
write_gguf_half(source, scheme, plan, made, Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.alone
def test_writing_takes_memory_for_a_tensor_not_for_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}
    checkpoint = make_checkpoint(tmp_path / "model", LlamaConfig(**BLOCKS | sizes), shards="100MB")
    command = [sys.executable, "-c", WRITING, str(checkpoint), str(tmp_path)]
    grown = 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 64 * 2**20


# --- refusals ---


def refused(checkpoint: Path, tmp_path: Path, kind: type[ExportError], **options: Any) -> str:
    """The one line of the error that an export ends with, nothing left behind."""
    out = tmp_path / "outputs" / "out"
    with pytest.raises(kind) as caught:
        export_model(str(checkpoint), out, **options)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    assert caught.value.hint and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_rotation_of_quantised_values(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "llama", LlamaConfig(**BLOCKS))
    line = refused(checkpoint, tmp_path, FamilyError, gguf="q8_0", scheme="rotation")
    assert line.startswith("--gguf q8_0: seen the scheme rotation, wanted permutation")


def test_blocks_of_a_source_that_has_none(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "llama", LlamaConfig(**BLOCKS))
    line = refused(checkpoint, tmp_path, SourceError, gguf="source")
    assert line.startswith("--gguf source: seen a model of safetensors, wanted a quantised .gguf file")


def test_an_architecture_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "opt", OPTConfig(**OPT))
    line = refused(checkpoint, tmp_path, FamilyError, gguf="f32")
    assert line.startswith("architecture 'opt': has no form in GGUF here, wanted one of: llama, mistral, mixtral")


def test_gemma_3_whose_windows_llama_cpp_does_not_keep(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "gemma3", Gemma3TextConfig(**BLOCKS, sliding_window=8))
    assert refused(checkpoint, tmp_path, FamilyError, gguf="f32").startswith("architecture 'gemma3_text': has no form")


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (LlamaConfig(**BLOCKS | {"hidden_size": 48}), "hidden size: seen 48, wanted a multiple of 32"),
        (MistralConfig(**BLOCKS, sliding_window=8), "architecture 'mistral' as GGUF: sliding_window: seen 8, wanted"),
        (LlamaConfig(**BLOCKS, hidden_act="gelu"), "architecture 'llama' as GGUF: activation: seen 'gelu', wanted"),
        (Qwen3MoeConfig(**BLOCKS, **EXPERTS), "architecture 'qwen3_moe' as GGUF: norm_topk_prob: seen False, wanted"),
    ],
    ids=["blocks", "window", "activation", "experts"],
)
def test_a_config_that_llama_cpp_would_compute_otherwise(config: Any, line: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", config)
    assert refused(checkpoint, tmp_path, FamilyError, gguf="q8_0").startswith(line)


def test_heads_that_no_whole_blocks_fit(tmp_path: Path) -> None:
    config = LlamaConfig(**BLOCKS | {"num_attention_heads": 2, "num_key_value_heads": 2}, head_dim=48)
    checkpoint = make_checkpoint(tmp_path / "llama", config)
    assert "blocks" in refused(checkpoint, tmp_path, FamilyError, gguf="q8_0")


def test_matrices_that_cannot_be_quantised_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(**BLOCKS | {"intermediate_size": 80})  # two and a half blocks
    checkpoint = make_checkpoint(tmp_path / "llama", config)
    arguments = ["stip-export", "model", str(checkpoint), "--out", str(tmp_path / "out"), "--gguf", "q8_0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*arguments, "--drafts", "none"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    layers = range(config.num_hidden_layers)
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["unquantised"] == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers]
    said = f"float32    {len(layers)} matrices such as model.layers.0.mlp.down_proj.weight: "
    assert said in capsys.readouterr().out
