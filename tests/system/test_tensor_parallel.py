"""SmolLM2 shared by two processes. Its 9 heads over 3 do not divide by 2: the feed-forward and the classifier do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import open_assistant, run_cloud, run_cloud_process

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Say the days of the week, twice.",
)
TOKENS = 32


def answered(export: Path, url: str) -> list[list[int]]:
    """Ids of the answer to each prompt, all asked at once."""

    def ask(prompt: str) -> list[int]:
        with open_assistant(export, url) as assistant:
            return assistant.chat([{"role": "user", "content": prompt}], max_tokens=TOKENS).finish().ids

    with ThreadPoolExecutor(len(PROMPTS)) as together:
        return list(together.map(ask, PROMPTS))


@pytest.mark.ranks
def test_two_processes_give_the_ids_of_one(smollm2: Path) -> None:
    with run_cloud(smollm2) as alone:
        wanted = answered(smollm2, alone.url)
    options = ("--tensor-parallel", 2, "--kv-bytes", "64M", "--dtype", "float32")
    with run_cloud_process(smollm2 / "cloud", *options) as (url, _):
        assert answered(smollm2, url) == wanted
