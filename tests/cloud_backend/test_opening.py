"""Opening a cloud folder: the engine of its kind around the stock model, or an error that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from cloud_backend import opening
from cloud_backend.decoder import DecoderEngine
from cloud_backend.encoder import EncoderEngine
from cloud_backend.engine import AppendWork, EncodedRows, EncodeWork, HiddenRows
from cloud_backend.opening import ENGINES, dtype_of, load_model, open_context
from cloud_backend.translation import TranslationEngine
from cloud_backend.vision import ImageEncoderEngine, VisionEngine
from shared import wire
from shared.errors import BundleError
from shared.manifest import CloudManifest, Kind, read_manifest, write_manifest
from tests.checkpoints import SIZES
from tests.cloud_backend.folders import randomised, save_cloud

WIDTH, CONTEXT = SIZES["hidden_size"], SIZES["max_position_embeddings"]
SEQUENCE = np.random.default_rng(5).normal(size=(40, WIDTH)).astype(np.float32)


def test_max_position_embeddings_is_the_context(tiny: Path) -> None:
    assert open_context(tiny / "cloud", device="cpu")[1].context == CONTEXT


@pytest.mark.parametrize(("asked", "given_"), [(10, 10), (CONTEXT, CONTEXT), (CONTEXT + 1, CONTEXT)])
def test_a_context_can_be_made_shorter_and_never_longer(tiny: Path, asked: int, given_: int) -> None:
    assert open_context(tiny / "cloud", device="cpu", context=asked)[1].context == given_


@pytest.mark.parametrize("dtype", wire.FLOATS)
def test_the_engine_computes_in_the_dtype_asked_for(tiny: Path, dtype: Any) -> None:
    engine = open_context(tiny / "cloud", device="cpu", dtype=dtype)[1]
    (result,) = engine.run([AppendWork(engine.new_cache(), 0, row_in(dtype), 1, "hidden", 0, 1.0, dtype)])
    assert isinstance(result, HiddenRows)
    assert (engine.dtype, result.hidden.dtype.name) == (dtype, dtype)


def row_in(dtype: wire.FloatName) -> np.ndarray:
    return SEQUENCE[:1].astype(wire.DTYPES[dtype])


def test_the_engine_holds_no_embedding_table(tiny: Path) -> None:
    assert load_model(tiny / "cloud", "float32", "cpu").get_input_embeddings().weight is None


@pytest.mark.parametrize("scheme", ["permutation", "rotation"])
def test_a_folder_without_a_classifier_gives_hidden_states_and_holds_none(
    tiny_exports: Callable[..., Path], scheme: str
) -> None:
    manifest, engine = open_context(tiny_exports("llama-tied", scheme, "device") / "cloud", device="cpu")
    assert manifest.absent == ["lm_head.weight", "model.embed_tokens.weight"]
    assert engine.vocab_size == 0
    assert not [name for name, _ in engine._model.named_parameters() if "embed_tokens" in name or "lm_head" in name]
    (result,) = engine.run([AppendWork(engine.new_cache(), 0, SEQUENCE, 3, "hidden", 0, 1.0, "float32")])
    assert isinstance(result, HiddenRows) and result.hidden.shape == (3, WIDTH)


def test_a_classifier_that_is_missing_though_the_manifest_does_not_say_so_is_refused(
    tiny_exports: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_exports("llama-tied", head="device") / "cloud", tmp_path / "cloud")
    manifest = read_manifest(folder, CloudManifest)
    write_manifest(msgspec.structs.replace(manifest, absent=["model.embed_tokens.weight"]), folder)
    with pytest.raises(BundleError, match="1 tensors missing"):
        load_model(folder, "float32", "cpu")


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A cloud folder whose config.json was changed; its manifest is not asked."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 4), ("num_hidden_layers", 2), ("vocab_size", 321)], ids=str
)
def test_a_checkpoint_that_does_not_fit_its_architecture_is_refused(
    tiny: Path, tmp_path: Path, key: str, value: int
) -> None:
    folder = rewritten(shutil.copytree(tiny / "cloud", tmp_path / "cloud"), lambda config: config.update({key: value}))
    assert read_manifest(folder, CloudManifest)
    with pytest.raises(BundleError, match="does not fit"):
        load_model(folder, "float32", "cpu")


# --- kinds ---

KINDS = {
    "decoder": DecoderEngine,
    "encoder": EncoderEngine,
    "image-encoder": ImageEncoderEngine,
    "vision-decoder": VisionEngine,
    "encoder-decoder": TranslationEngine,
}


def test_there_is_an_engine_of_every_kind() -> None:
    assert {kind: engine for kind, (engine, _) in ENGINES.items()} == KINDS
    assert set(ENGINES) == set(get_args(Kind))


def bert(out: Path, *, left_out: tuple[str, ...] = (), **config: Any) -> Path:
    """The cloud folder of a tiny BERT."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = randomised(BertModel(BertConfig(**sizes, vocab_size=9, max_position_embeddings=6)))
    words = ["embeddings.word_embeddings.weight"]
    return save_cloud(model, out, "encoder", absent=words, left_out=left_out, **config) / "cloud"


@pytest.mark.parametrize("dtype", wire.FLOATS)
def test_an_encoder_computes_in_the_dtype_asked_for(tmp_path: Path, dtype: Any) -> None:
    engine = open_context(bert(tmp_path / "bert"), device="cpu", dtype=dtype)[1]
    rows = np.ones((3, 8), wire.DTYPES[dtype])
    (result,) = engine.run([EncodeWork(engine.new_cache(), rows, (2, 1), "hidden", dtype)])
    assert isinstance(result, EncodedRows)
    assert (engine.dtype, result.result.dtype.name) == (dtype, dtype)


@pytest.mark.parametrize("name", ["embeddings.position_embeddings.weight", "encoder.layer.0.output.dense.bias"])
def test_an_encoder_without_one_of_its_tensors_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="1 tensors missing, 0 unknown"):
        open_context(bert(tmp_path / "bert", left_out=(name,)), device="cpu")


@pytest.mark.parametrize(
    ("architectures", "seen"),
    [
        (["BertForMaskedLM"], "BertForMaskedLM"),  # a stock class, and no encoder that is served
        (["LlamaForCausalLM"], "LlamaForCausalLM"),  # of another kind
        (["os"], "os"),
        ([], "none"),
        (None, "none"),
        (["BertModel", "BertModel"], "BertModel, BertModel"),
    ],
    ids=str,
)
def test_an_architecture_that_is_not_of_its_kind_is_refused_by_name(
    tmp_path: Path, architectures: list[str] | None, seen: str
) -> None:
    folder = bert(tmp_path / "bert", architectures=architectures)
    with pytest.raises(BundleError, match=f"architectures: seen {seen}, wanted one encoder: BertModel or ") as caught:
        open_context(folder, device="cpu")
    assert caught.value.hint


@pytest.mark.parametrize("name", ["NoSuchForCausalLM", "AutoModelForCausalLM", "TextGenerationLMHeadModel"])
def test_an_architecture_that_is_no_model_class_of_transformers_is_refused(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny / "cloud", tmp_path / "cloud")
    rewritten(folder, lambda config: config.update(architectures=[name]))
    with pytest.raises(BundleError, match=f"seen {name}, wanted a model class of transformers"):
        load_model(folder, "float32", "cpu")


def test_an_encoder_that_is_said_to_be_a_decoder_is_refused(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    write_manifest(msgspec.structs.replace(read_manifest(folder, CloudManifest), kind="decoder"), folder)
    with pytest.raises(BundleError, match="seen BertModel, wanted one decoder"):
        open_context(folder, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_card_that_torch_does_not_see_is_not_passed_over(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(opening, "NVIDIA", tmp_path / "nvidiactl")
    with pytest.raises(BundleError, match="torch finds no CUDA device"):
        open_context(tiny / "cloud")
    assert open_context(tiny / "cloud", device="cpu")[1].device == "cpu"


@pytest.mark.parametrize(("capable", "computed"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_is_computed_where_the_processor_has_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capable: bool, computed: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    manifest = msgspec.structs.replace(read_manifest(tiny / "cloud", CloudManifest), dtype="bfloat16")
    assert dtype_of(manifest, "cpu") == computed
    assert dtype_of(manifest, "cuda") == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused_with_a_hint(tiny: Path) -> None:
    with pytest.raises(BundleError, match="cuda") as caught:
        open_context(tiny / "cloud", device="cuda")
    assert caught.value.hint and "--device cpu" in caught.value.hint
