"""Every axis of every table matters: with one of them in a wrong space, the model is another one.

Each row of a tiny checkpoint, in all its layers at once, is moved by axes of which one is wrong; the stock model then
runs in memory, fed and read as by a device. A table that is wrong anywhere could not pass the check of an export.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig

from export import bundle, check
from export.bundle import export_model
from export.check import TOLERANCE
from export.cloud_half import plan_cloud, used_structures, write_cloud
from export.device_half import write_device
from export.families import Family, family_of
from export.outputs import from_sent, plain
from export.scheme import SchemeName
from export.schemes import draw
from export.source import open_source
from export.spaces import After, Axis, Each, Features, Fixed, Fused, Gain, Gated, Heads, Shift, Structure, spaces_of
from shared.errors import EquivalenceError, FamilyError
from tests.checkpoints import EVERY

SCHEMES: list[SchemeName] = ["permutation", "rotation"]
SIZES = 400  # most features of a tiny space
Axes = tuple[Axis, ...]

# Where a wrong space changes nothing, and why. What is not listed must be caught, and what is listed must not.
SOFTMAX = "a key's bias adds the same to a query's scores of all positions, which softmax takes out again"
UNUSED = "the stock LLaVA takes its features from before CLIP's last norm"
HARMLESS = {
    r"transformer\.h\.{i}\.attn\.c_attn\.bias: key\[{i}\]": SOFTMAX,
    r"model\.decoder\.layers\.{i}\.self_attn\.k_proj\.bias: (decoder\.)?key\[{i}\]": SOFTMAX,  # OPT, Marian
    r"model\.decoder\.layers\.{i}\.encoder_attn\.k_proj\.bias: cross\.key\[{i}\]": SOFTMAX,
    r"model\.encoder\.layers\.{i}\.self_attn\.k_proj\.bias: encoder\.key\[{i}\]": SOFTMAX,
    r"(bert\.|roberta\.)?encoder\.layer\.{i}\.attention\.self\.key\.bias: key\[{i}\]": SOFTMAX,
    r"(distilbert\.)?transformer\.layer\.{i}\.attention\.k_lin\.bias: key\[{i}\]": SOFTMAX,
    r"vit\.layers\.{i}\.attention\.k_proj\.bias: key\[{i}\]": SOFTMAX,
    r"model\.vision_tower\.encoder\.layers\.{i}\.self_attn\.k_proj\.bias: vision\.key\[{i}\]": SOFTMAX,
    r"model\.vision_tower\.post_layernorm\.(weight|bias): encoder.*": UNUSED,
}


def wrong(size: int) -> str:
    """Name of a space of this size that no table knows."""
    return f"wrong[{size}]"


class Transformed:
    """A tiny model in secret coordinates, some of whose tensors may be moved otherwise."""

    def __init__(self, checkpoint: Path, scheme: SchemeName, out: Path) -> None:
        self.source = source = open_source(str(checkpoint))
        self.family = family = family_of(source.config)
        structures = family.spaces(source.config)
        self.plan = plan_cloud(source, family, "cloud")
        # The wrong ones are drawn last, so that the others are as without them.
        fresh = [Features(wrong(size), size) for size in range(1, SIZES)]
        drawn = [*used_structures(structures, self.plan), *fresh]
        self.scheme = draw(scheme, drawn, random.Random(0).randbytes)
        self.sizes = _sizes(structures)
        cloud, device = out / "cloud", out / "device"
        cloud.mkdir(parents=True)
        device.mkdir()
        write_cloud(source, family, self.scheme, self.plan, torch.float32, cloud, "key", 2**30)
        samples = write_device(source, family, self.scheme, torch.float32, device, "key", "cloud").samples
        self.key = self.scheme.user_key("key")
        self.sent = check._sent(device, samples, self.key)
        stock = getattr(transformers, source.config.architectures[0])
        with torch.inference_mode():
            self.expected = plain(samples.inputs(), pooled=True)(stock.from_pretrained(checkpoint)).numpy()
        self.model = stock.from_pretrained(cloud, config=AutoConfig.from_pretrained(cloud))
        self.weights = self.model.state_dict()

    @torch.inference_mode()
    def difference(self, otherwise: Mapping[str, Axes]) -> float:
        """The greatest difference of any result from the original's, in units of what an export's check lets pass,
        where these tensors are moved by other axes than the table's."""
        kept = {name: self.weights[name].clone() for name in otherwise}
        for name, axes in otherwise.items():
            tensor = self.source.read(self.plan.stored[name])
            self.weights[name].copy_(self.scheme.act(name, tensor, axes, self.source.read))
        rows = check._revealed(self.key, from_sent(self.family, self.sent, pooled=True)(self.model).numpy())
        for name, values in kept.items():
            self.weights[name].copy_(values)
        return float(np.abs(rows - self.expected).max() / (TOLERANCE * max(1.0, np.abs(self.expected).max())))

    def mistakes(self) -> Iterator[tuple[str, dict[str, Axes]]]:
        """For every row and axis, what is wrong and the tensors' axes then, those of all layers together."""
        found: dict[str, dict[str, Axes]] = defaultdict(dict)
        for name, axes in self.plan.axes.items():
            row = re.sub(r"\.\d+\.", ".{i}.", name)
            for at, axis in enumerate(axes):
                for number, (label, other) in enumerate(self._otherwise(axis)):
                    label = re.sub(r"\[\d+\]", "[{i}]", label, count=1)
                    found[f"{row}: {label} ({at}.{number})"][name] = (*axes[:at], other, *axes[at + 1 :])
        yield from found.items()

    def _otherwise(self, axis: Axis) -> list[tuple[str, Axis]]:
        """An axis with one of its spaces wrong, or with no thought of the norm before it."""
        if isinstance(axis, Fixed):
            return []
        spaces = spaces_of(axis)
        fresh = [wrong(self.sizes[space.replace("{e}", "0")]) for space in spaces]
        if isinstance(axis, Fused):
            parts = [(*spaces[:at], other, *spaces[at + 1 :]) for at, other in enumerate(fresh)]
            return [(space, Fused(part)) for space, part in zip(spaces, parts, strict=True)]
        if isinstance(axis, str):
            return [(axis, fresh[0])]
        moved: list[tuple[str, Axis]] = [(axis.space, replace(axis, space=fresh[0]))]
        if not isinstance(axis, Each) and self.scheme.folded((After(axis.space, ""),)):
            moved.append((f"{axis.space}, {'read from' if isinstance(axis, After) else 'in'} the norm", axis.space))
        return moved


def _sizes(structures: list[Structure]) -> dict[str, int]:
    """The size of every space."""
    sizes: dict[str, int] = {}
    for one in structures:
        if isinstance(one, Heads):
            sizes |= dict.fromkeys((one.query, one.attended), one.query_heads * one.dim)
            sizes |= dict.fromkeys((one.key, one.value), one.key_value_heads * one.dim)
        elif isinstance(one, Gated):
            sizes |= dict.fromkeys((one.gate, one.up, one.product), one.size)
        else:
            sizes[one.name] = one.size
    return sizes


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", EVERY)
def test_an_axis_in_a_wrong_space_is_caught(
    kind: str, scheme: SchemeName, tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Transformed(tiny_checkpoints(kind), scheme, tmp_path)
    assert model.difference({}) <= 1
    caught = {label: model.difference(axes) > 1 for label, axes in model.mistakes()}
    harmless = {label for label in caught if any(re.match(known, label) for known in HARMLESS)}
    assert {label for label, seen in caught.items() if not seen} == harmless


def test_every_exception_is_needed(tiny_checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    labels: set[str] = set()
    for kind in ("gpt2", "opt", "bert", "bert-classifier", "distilbert", "vit", "llava", "marian"):
        labels |= {label for label, _ in Transformed(tiny_checkpoints(kind), "permutation", tmp_path / kind).mistakes()}
    assert [known for known in HARMLESS if not any(re.match(known, label) for label in labels)] == []


WRONG_ROWS: dict[str, tuple[str, Axes]] = {  # one for each kind of model, and for each kind of axis
    "llama-biases": ("model.layers.{i}.self_attn.o_proj.weight", ("residual", "query[{i}]")),
    "gpt2": ("transformer.h.{i}.ln_2.bias", (Shift("residual", "transformer.h.{i}.ln_1.weight"),)),
    "qwen2-moe": ("model.layers.{i}.mlp.shared_expert_gate.weight", (Fixed("one row"), "residual")),
    "mixtral": (
        "model.layers.{i}.mlp.experts.down_proj",
        (Each("experts[{i}]"), "residual", "gate[{i}][{e}]"),
    ),
    "gemma": ("model.norm.weight", (Gain("residual"),)),
    "vit": ("classifier.weight", ("classes", "residual")),
    "llava": ("model.multi_modal_projector.linear_1.weight", ("projector", "vision.ffn[0]")),
    "marian": ("model.decoder.layers.{i}.encoder_attn.k_proj.weight", ("cross.key[{i}]", "residual")),
    "bert": ("pooler.dense.bias", ("classifier",)),
}


@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_a_table_with_a_wrong_row_exports_nothing(
    kind: str, tiny_checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, axes = WRONG_ROWS[kind]
    family = family_of(EVERY[kind])
    assert name in family.tensors

    def wrong_table(config: Any) -> Family:
        return replace(family, tensors={**family.tensors, name: axes})

    monkeypatch.setattr(bundle, "family_of", wrong_table)
    # LLaVA's is of another size, which is seen before anything runs.
    with pytest.raises(FamilyError if kind == "llava" else EquivalenceError):
        export_model(str(tiny_checkpoints(kind)), tmp_path / "outputs" / "out", scheme="rotation")
    assert list((tmp_path / "outputs").iterdir()) == []
