"""A real model on llama.cpp: what STIP answers over a socket is what the unprotected file says to its own token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.prompts import PROMPTS
from device_app.assistant import Assistant
from examples.plain_gguf import write_plain_gguf
from examples.plain_llama import PlainLlama
from export.bundle import export_model
from tests.conftest import open_assistant, run_cloud_process

pytestmark = [pytest.mark.llama, pytest.mark.slow]

TOKENS = 64


@pytest.fixture(scope="module")
def assistant(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Assistant]:
    """Talks to a cloud of SmolLM2 in float32 on llama.cpp."""
    out = tmp_path_factory.mktemp("smollm2") / "export"
    export_model(str(smollm2_gguf), out, name="smollm2", drafts="none", gguf="f32")
    with run_cloud_process(out / "cloud", "--engine", "llama.cpp") as (url, _), open_assistant(out, url) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """llama.cpp's own loop over the same values, unprotected."""
    path = tmp_path_factory.mktemp("plain") / "model.gguf"
    write_plain_gguf(smollm2_gguf, path, "f32")
    return PlainLlama(path, kv_dtype="float32", threads=1)


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_greedy_ids_are_those_of_the_unprotected_file(assistant: Assistant, plain: PlainLlama, prompt: str) -> None:
    messages = [{"role": "user", "content": prompt}]
    bundle = assistant.bundle
    assert bundle.template is not None
    expected = plain(bundle.tokenizer.encode(bundle.template.render(messages)), TOKENS).ids
    answer = assistant.chat(messages, max_tokens=TOKENS).finish()
    assert answer.ids == expected[: len(answer.ids)]
    assert len(answer.ids) == TOKENS or answer.ids[-1] in bundle.manifest.end_ids
