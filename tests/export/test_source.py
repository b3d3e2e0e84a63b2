"""Where models come from, and clear words when they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from export.source import GgufSource, open_source
from shared.errors import SourceError


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
    with pytest.raises(SourceError, match=r"other\.gguf: seen the architecture 'mamba', wanted one of: gemma3, gpt2"):
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
