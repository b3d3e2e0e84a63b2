"""The table that devices draft from holds what the stock model says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from device_app.bundle import Bundle
from device_app.successors import SUCCESSORS
from export.bundle import export_model

KINDS = ["llama", "gpt2", "gemma", "gemma2", "gemma3", "opt", "phi", "mixtral", "llava"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_successor_is_the_stock_models_most_likely_next_token(
    kind: str, tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[[str], Path]
) -> None:
    bundle = Bundle.open(tiny_exports(kind) / "device")
    table, manifest = bundle.successors, bundle.manifest
    config = transformers.AutoConfig.from_pretrained(tiny_checkpoints(kind))
    model = getattr(transformers, config.architectures[0]).from_pretrained(tiny_checkpoints(kind), dtype=torch.float32)
    text = config.get_text_config()
    begin = manifest.prefix_ids or [text.bos_token_id if isinstance(text.bos_token_id, int) else text.eos_token_id]
    ids = [token for token in range(len(table.rows)) if token != getattr(config, "image_token_id", None)]
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.tensor([[*begin, token] for token in ids])).logits[:, -1]
        logits[:, manifest.banned_ids] = -torch.inf
    chosen = torch.from_numpy(table.rows[ids, 0].astype(np.int64))
    margin = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
    assert margin.max() <= 2e-4  # the same token, or one that rounding makes as good
    assert len(ids) >= len(table.rows) - 1 > 100


def test_an_export_without_a_table_opens_and_drafts_from_text_alone(
    tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    export_model(str(tiny_checkpoints("llama")), tmp_path / "out", drafts="none")
    bundle = Bundle.open(tmp_path / "out" / "device")
    assert SUCCESSORS not in bundle.manifest.files
    assert bundle.successors.after(5) is None


def test_the_table_is_the_same_in_every_export(
    tiny_checkpoints: Callable[[str], Path], tiny: Path, tmp_path: Path
) -> None:
    export_model(str(tiny_checkpoints("llama")), tmp_path / "out")
    assert (tmp_path / "out" / "device" / SUCCESSORS).read_bytes() == (tiny / "device" / SUCCESSORS).read_bytes()


@pytest.mark.parametrize("kind", ["bert", "vit", "marian"])
def test_models_that_go_on_from_no_text_have_none(kind: str, tiny_exports: Callable[[str], Path]) -> None:
    assert not (tiny_exports(kind) / "device" / SUCCESSORS).exists()
