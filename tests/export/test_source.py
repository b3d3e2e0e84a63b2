"""Where models come from, and clear words when they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, PretrainedConfig

from export.gguf.config import mended
from export.gguf.file import GgufFile, Metadata
from export.source import GgufSource, open_source
from shared.errors import SourceError


def written(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.llama
def test_a_gguf_file_gives_what_transformers_loads_from_it(smollm2_gguf: Path) -> None:
    source = open_source(str(smollm2_gguf))
    assert isinstance(source, GgufSource)
    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    state = model.state_dict()
    assert set(state) - set(source.shapes) == {"lm_head.weight"}
    for name in source.shapes:
        assert torch.equal(source.read(name), state[name]), name


def test_a_hub_id_is_read_from_the_cache(
    tiny_checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The layout that huggingface_hub keeps; offline, it answers from there.
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_checkpoints("llama"), snapshot)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_source("org/tiny").config.model_type == "llama"


def test_a_hub_id_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="'org/none': cannot be had from the hub") as caught:
        open_source("org/none")
    assert caught.value.hint and "local folder" in caught.value.hint


@pytest.mark.parametrize("path", ["./nothing-here", "/nothing/at/all", "none.gguf"])
def test_a_path_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(SourceError, match="no such"):
        open_source(path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        open_source(str(tmp_path))


def test_an_architecture_unknown_to_transformers_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "martian"}))
    with pytest.raises(SourceError, match="martian"):
        open_source(str(tmp_path))


def test_a_checkpoint_in_another_format_gets_a_hint(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(tiny_checkpoints("llama") / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"no \.safetensors file") as caught:
        open_source(str(tmp_path))
    assert caught.value.hint and "save_pretrained" in caught.value.hint


def test_a_truncated_gguf_is_named(smollm2_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_gguf.read_bytes()[:1_000_000])
    with pytest.raises(SourceError, match=r"cut\.gguf"):
        open_source(str(cut))


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"hello" * 100)
    with pytest.raises(SourceError, match=r"fake\.gguf"):
        open_source(str(tmp_path / "fake.gguf"))


def test_integer_tensors_are_refused_by_name(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copy(tiny_checkpoints("llama") / "config.json", tmp_path)
    save_file({"model.norm.weight": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.norm\.weight \(I8\)"):
        open_source(str(tmp_path))


def test_a_folder_without_tokenizer_is_named(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    for path in tiny_checkpoints("llama").iterdir():
        if "token" not in path.name:
            shutil.copy(path, tmp_path)
    with pytest.raises(SourceError, match="no tokenizer"):
        open_source(str(tmp_path)).tokenizer()


def test_a_gguf_file_of_another_architecture_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    # Taken as another architecture's, tensors would be another model's.
    other = tmp_path / "other.gguf"
    other.write_bytes(smollm2_gguf.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(SourceError, match=r"other\.gguf: seen the architecture 'mamba', wanted one of: gpt2, llama"):
        open_source(str(other))


def test_a_chat_template_may_be_the_processor_s(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoints("llava"), tmp_path / "llava")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert open_source(str(folder)).tokenizer().chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert open_source(str(folder)).tokenizer().chat_template == template


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_words_that_must_not_be_generated_are_read_from_where_they_stand(
    file: str, tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoints("marian"), tmp_path / "marian")
    settings = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(settings | {"bad_words_ids": [[9], [4, 5], [3]]}))
    assert open_source(str(folder)).banned_ids() == [3, 9]


# --- where generation ends ---

VOCABULARY = ("a", "<|endoftext|>", "<|im_end|>", "<|eom_id|>")


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ({"eos": 1}, {1, 2, 3}),  # what ends a turn is known by its text
        ({"eos": 1, "eot": 0}, {0, 1}),  # the file says it
        ({"eos": 1, "eot": 2, "eom": 3}, {1, 2, 3}),
    ],
)
def test_a_gguf_file_ends_at_a_text_s_end_and_at_a_turn_s(said: dict[str, int], ends: set[int], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "ends.gguf", "llama")
    writer.add_token_list(VOCABULARY)
    for which, token in said.items():
        writer.add_uint32(f"tokenizer.ggml.{which}_token_id", token)
    written(writer)
    assert GgufFile(tmp_path / "ends.gguf").end_ids == ends


def test_the_model_of_a_gguf_file_ends_at_all_of_them(smollm2_gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(smollm2_gguf.read_bytes().replace(b"ggml.bos_token_id", b"ggml.eot_token_id"))
    assert open_source(str(smollm2_gguf)).end_ids() == [2]
    assert open_source(str(other)).end_ids() == [1, 2]


# --- what is damaged ---


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}'])
def test_a_tokenizer_that_cannot_be_read_is_the_source_s_fault(
    text: str, tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoints("llama"), tmp_path / "llama")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(SourceError, match="llama: its tokenizer cannot be read: ") as caught:
        open_source(str(folder)).tokenizer()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "{}}", "3", '[{"name": "0"}]', '["Pooling"]'])
def test_a_list_of_modules_that_cannot_be_read_is_named(
    text: str, tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoints("bert"), tmp_path / "bert")
    (folder / "modules.json").write_text(text)
    with pytest.raises(SourceError, match=r"modules\.json: "):
        open_source(str(folder)).pooling()


def test_settings_that_are_no_object_are_named(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoints("llama"), tmp_path / "llama")
    source = open_source(str(folder))
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(SourceError, match=r"generation_config\.json: seen a list, wanted an object"):
        source.end_ids()


def test_a_gguf_file_that_shrinks_or_goes_is_the_source_s_fault(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("weight", np.zeros((4, 4), np.float32))
    written(writer)
    file = GgufFile(path)
    with path.open("rb+") as opened:
        opened.truncate(path.stat().st_size - 32)
    with pytest.raises(SourceError, match=r"model\.gguf: tensor weight: seen 32 bytes, wanted 64"):
        file.raw("weight")
    path.unlink()
    with pytest.raises(SourceError, match=r"model\.gguf: tensor weight: No such file"):
        file.raw("weight")


def test_a_gguf_file_that_does_not_say_its_architecture_is_named(smollm2_gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(smollm2_gguf.read_bytes().replace(b"general.architecture", b"general.architektur_"))
    with pytest.raises(SourceError, match=r"other\.gguf: its metadata has no general\.architecture"):
        open_source(str(other))


@pytest.mark.parametrize(
    ("config", "said", "key"),
    [
        (GPT2Config(), {}, r"feed_forward_length"),
        (LlamaConfig(), {"rope.scaling.type": "linear"}, r"rope\.scaling\.factor"),
    ],
)
def test_a_gguf_file_without_a_setting_is_named_with_it(
    config: PretrainedConfig, said: dict[str, Any], key: str
) -> None:
    with pytest.raises(SourceError, match=rf"model\.gguf: its metadata has no {key}"):
        mended(config, Metadata(Path("model.gguf"), said), (), None)


@pytest.mark.parametrize("pattern", [[True, False], 0])
def test_a_pattern_of_windows_that_is_no_period_is_not_taken_for_one(pattern: Any) -> None:
    stock = Gemma3TextConfig().layer_types
    said = Metadata(Path("model.gguf"), {"attention.sliding_window_pattern": pattern})
    assert mended(Gemma3TextConfig(), said, (), None).layer_types == stock
