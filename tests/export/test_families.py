"""The tables, through whole exports of tiny checkpoints in which every tensor is random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from device_app.bundle import Bundle
from export.families import LLAMA, family_of
from export.scheme import SchemeName
from export.shards import Shards
from export.spaces import Dropped, Fixed
from shared.errors import FamilyError
from tests.checkpoints import TINY, make_checkpoint
from tests.conftest import run_cloud

KINDS = list(TINY)
SCHEMES: list[SchemeName] = ["permutation", "rotation"]
IDS = [1, 17, 200, 3, 3, 90, 319, 42, 5, 6, 250, 17, 100, 7, 301, 2]


def revealed_logits(export: Path, dtype: torch.dtype) -> np.ndarray:
    """Logits [positions, vocab] of the cloud's half, loaded by plain transformers, fed and read with the device's."""
    bundle = Bundle.open(export / "device")
    hidden = torch.from_numpy(bundle.key.hide(bundle.embed(IDS)))[None].to(dtype)
    model = AutoModelForCausalLM.from_pretrained(export / "cloud", dtype=dtype)
    with torch.inference_mode():
        logits = model(inputs_embeds=hidden).logits[0].float().numpy()
    return bundle.key.reveal_rows(logits)


def plain_logits(checkpoint: Path, dtype: torch.dtype) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_logits_are_the_originals(
    kind: str, scheme: SchemeName, tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[..., Path]
) -> None:
    expected = plain_logits(tiny_checkpoints(kind), torch.float32)
    seen = revealed_logits(tiny_exports(kind, scheme), torch.float32)
    assert np.abs(seen - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (seen.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logits_agree_within_its_rounding(
    kind: str, scheme: SchemeName, tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[..., Path]
) -> None:
    # Permuting is exact in any dtype; what differs is the order of sums, hence the rounding of each. So the protected
    # model's distance from the float32 truth is another draw of the original's own: the two differ at most by the sum
    # of their distances (triangle inequality), and their mean distances are alike. A rotation computes new weights
    # before any is rounded: as many roundings, though all of them others, and folded gains save some. Seen over all
    # kinds and three draws of each: mean errors of 0.71 to 0.94 of the original's.
    truth = plain_logits(tiny_checkpoints(kind), torch.float32)
    plain = plain_logits(tiny_checkpoints(kind), torch.bfloat16)
    seen = revealed_logits(tiny_exports(kind, scheme), torch.bfloat16)
    plain_error, seen_error = np.abs(plain - truth), np.abs(seen - truth)
    assert 0.5 <= seen_error.mean() / plain_error.mean() <= 2.0
    # Unit roundoff of bfloat16 is 2⁻⁸; through 3 layers errors of single roundings add up to a few of it. Where all
    # roundings are others, the two errors are independent and may add (seen: up to 8.5 units).
    units = 8 if scheme == "permutation" else 16
    assert np.abs(seen - plain).max() <= units * 2**-8 * np.abs(truth).max()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3"])
def test_every_axis_that_may_move_has_moved(
    kind: str, scheme: SchemeName, tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[..., Path]
) -> None:
    # Stronger than the whole tensor: no single row and no single column is where it was, fixed points aside.
    original, cloud = Shards(tiny_checkpoints(kind)), Shards(tiny_exports(kind, scheme) / "cloud")
    for name in cloud.shapes:
        if name not in original.shapes or original.read(name).ndim != 2:
            continue
        before, after = original.read(name), cloud.read(name)
        assert (before == after).float().mean() < 0.1, name


def test_a_tensor_that_no_table_names_is_an_error() -> None:
    with pytest.raises(FamilyError, match=r"'model\.layers\.0\.adapter\.weight' is named by no row of the llama table"):
        LLAMA.axes("model.layers.0.adapter.weight")


@pytest.mark.parametrize("name", ["model.layers.x.mlp.up_proj.weight", "xmodel.norm.weight", "model.norm.weight.more"])
def test_a_name_fits_a_row_whole_or_not_at_all(name: str) -> None:
    with pytest.raises(FamilyError):
        LLAMA.axes(name)


def test_rows_fill_in_the_layer() -> None:
    assert LLAMA.axes("model.layers.12.mlp.down_proj.weight") == ("residual", "product[12]")
    (axis,) = LLAMA.axes("model.layers.3.self_attn.q_norm.weight")  # type: ignore[misc]
    assert isinstance(axis, Fixed)
    assert isinstance(LLAMA.axes("model.layers.3.self_attn.rotary_emb.inv_freq"), Dropped)


def test_an_architecture_without_a_table_is_named() -> None:
    from transformers import MambaConfig

    with pytest.raises(FamilyError, match="'mamba' is in no table; supported: llama, mistral, qwen2, qwen3"):
        family_of(MambaConfig())


ROTATED = ["llama-tied", "qwen2", "qwen3-tied", "mistral-window"]


@pytest.mark.parametrize(
    ("kind", "scheme"), [(kind, "permutation") for kind in KINDS] + [(kind, "rotation") for kind in ROTATED]
)
def test_the_stock_model_answers_over_the_wire_as_the_original_does(
    kind: str, scheme: SchemeName, tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[..., Path]
) -> None:
    from tests.conftest import open_assistant

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints(kind), dtype=torch.float32)
    expected = model.generate(
        torch.tensor([IDS]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    out = tiny_exports(kind, scheme)
    with run_cloud(out) as cloud, open_assistant(out, cloud.url) as assistant:
        ids = list(IDS)
        for _ in range(24):
            [row] = assistant._connection.rows(ids, top_k=64)
            ids.append(int(row.ids[row.values.argmax()]))
    assert ids == expected[0].tolist()


def test_a_checkpoint_in_bfloat16_keeps_its_dtype(tmp_path: Path) -> None:
    from export.bundle import export_model

    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama-tied", dtype=torch.bfloat16)
    report = export_model(str(checkpoint), tmp_path / "out")
    assert report.dtype == "bfloat16"
    assert set(Shards(tmp_path / "out" / "cloud").dtypes.values()) == {"BF16"}
    assert report.check.same_top_token + report.check.near_ties == report.check.positions
