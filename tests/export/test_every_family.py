"""Whole exports of every family, from tiny checkpoints in which every tensor is random: the function stays, nothing
else does."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.bundle import export_model
from export.check import TOLERANCE
from export.cloud_half import plan_cloud
from export.families import FAMILIES, family_of
from export.scheme import SchemeName
from export.shards import Shards
from export.source import Source, open_source
from export.spaces import Each, Gain, OnDevice, Stream, of_each, spaces_of
from shared.key import UserKey
from tests.checkpoints import ALL, EVERY, make_checkpoint
from tests.export.random_configs import RANDOM
from tests.thorough import examples

SCHEMES: list[SchemeName] = ["permutation", "rotation"]


def test_the_tiny_checkpoints_are_of_every_class_that_is_served(tiny_checkpoints: Callable[[str], Path]) -> None:
    configs = [open_source(str(tiny_checkpoints(kind))).config for kind in EVERY]
    served = {stock for family in FAMILIES for stock in family.classes.values()}
    assert {config.architectures[0] for config in configs} == served
    assert {config.model_type for config in configs} == {name for family in FAMILIES for name in family.model_types}


# --- the function stays ---


@pytest.mark.parametrize("kind", RANDOM)
@settings(
    max_examples=examples(4), deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(data=st.data(), scheme=st.sampled_from(SCHEMES))
def test_any_model_of_a_family_computes_what_it_did(kind: str, data: st.DataObject, scheme: SchemeName) -> None:
    config = RANDOM[kind](data.draw)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_checkpoint(Path(scratch) / "checkpoint", config)
        check = export_model(str(checkpoint), Path(scratch) / "out", scheme=scheme).check
    assert check.max_difference <= TOLERANCE * max(1.0, check.largest_logit)
    assert check.same_top_token + check.near_ties == check.positions
    assert check.positions >= 8


# --- nothing else does ---


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ALL)
def test_no_row_of_any_tensor_is_in_the_cloud_as_it_was(
    kind: str, scheme: SchemeName, tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[..., Path]
) -> None:
    source, out = open_source(str(tiny_checkpoints(kind))), tiny_exports(kind, scheme)
    unmoved = json.loads((out / "export.json").read_text())["unmoved"]
    cloud = Shards(out / "cloud")
    held = {row for name in cloud.shapes if name not in unmoved for row in _rows(cloud.read(name))}
    for name in source.shapes:
        if name not in unmoved:
            assert held.isdisjoint(_rows(source.read(name))), f"a row of {name} is in the cloud untransformed"
        assert name not in unmoved or torch.equal(cloud.read(name), source.read(name))
    if scheme == "rotation":  # gains are in what reads them, and nothing of them is where they were
        gains = [name for name in cloud.shapes if _folded_gain(source, name)]
        assert all((cloud.read(name) == cloud.read(name)[0]).all() for name in gains)
    # Listed are the norms inside heads, which RoPE fixes.
    assert set(unmoved) == {name for name in source.shapes if name.endswith(("q_norm.weight", "k_norm.weight"))}
    assert all("RoPE" in reason for reason in unmoved.values())


def _folded_gain(source: Source, name: str) -> bool:
    """Whether a tensor is the weight of a norm before a stream that may turn."""
    family = family_of(source.config)
    row = family.axes(name)
    streams = {one.name for one in family.spaces(source.config) if isinstance(one, Stream) and one.norm != "post"}
    return isinstance(row, tuple) and isinstance(row[0], Gain) and row[0].space in streams


def _rows(tensor: torch.Tensor) -> Iterator[bytes]:
    """Rows of at least four values; of fewer some stay where they were by chance."""
    rows = tensor.reshape(-1, tensor.shape[-1]).numpy()
    return (row.tobytes() for row in rows if row.size >= 4 and np.unique(row).size > 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", EVERY)
def test_the_cloud_has_zeros_or_nothing_in_place_of_what_devices_have(
    kind: str, scheme: SchemeName, tiny_checkpoints: Callable[[str], Path], tiny_exports: Callable[..., Path]
) -> None:
    source, cloud = open_source(str(tiny_checkpoints(kind))), Shards(tiny_exports(kind, scheme) / "cloud")
    family = family_of(source.config)
    plan = plan_cloud(source, family, "cloud")
    for name in [*source.shapes, *plan.zeros]:
        row = family.axes(name)
        if name == family.embedding or row == OnDevice():
            assert name not in cloud.shapes
        elif row == OnDevice(zeros=True):
            assert not cloud.read(name).any()
        elif name in cloud.shapes and not isinstance(row[0], Gain):  # a gain that is taken out of Gemma's norm is 0
            assert cloud.read(name).any(), f"{name} is all zeros"
    assert cloud.shapes.keys() == plan.axes.keys() | plan.zeros.keys()
    tables = {
        name for name in source.shapes if re.search(r"position|wpe|patch|token_type|cls_token|class_emb|wte", name)
    }
    assert not any(cloud.read(name).any() for name in tables & cloud.shapes.keys())


@pytest.fixture(scope="module")
def twice(
    tiny_checkpoints: Callable[[str], Path],
    tiny_exports: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, SchemeName], tuple[Path, Path]]:
    """Gives two exports of one checkpoint."""
    made: dict[tuple[str, SchemeName], Path] = {}

    def exported(kind: str, scheme: SchemeName) -> tuple[Path, Path]:
        if (kind, scheme) not in made:
            made[kind, scheme] = tmp_path_factory.mktemp("again") / kind
            export_model(str(tiny_checkpoints(kind)), made[kind, scheme], scheme=scheme)
        return tiny_exports(kind, scheme), made[kind, scheme]

    return exported


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", EVERY)
def test_two_exports_of_a_model_share_no_secret(
    kind: str,
    scheme: SchemeName,
    tiny_checkpoints: Callable[[str], Path],
    twice: Callable[[str, SchemeName], tuple[Path, Path]],
) -> None:
    first, second = twice(kind, scheme)
    keys = [UserKey.load(out / "device" / "key.safetensors") for out in (first, second)]
    for secret in ("residual", "vocab", "encoder"):
        one, other = (getattr(key, secret) for key in keys)
        # There are but 119 ways to move 5 classes.
        assert (one is None and other is None) or one.size == 5 or not np.array_equal(one, other)
    source = open_source(str(tiny_checkpoints(kind)))
    plan = plan_cloud(source, family_of(source.config), "cloud")
    ones, others = Shards(first / "cloud"), Shards(second / "cloud")
    for name in plan.axes:
        if _moves_in_many_ways(source, name) and not (scheme == "rotation" and _folded_gain(source, name)):
            assert not torch.equal(ones.read(name), others.read(name)), name


def _moves_in_many_ways(source: Source, name: str) -> bool:
    """Whether an axis of a tensor is in a space of many features: heads, experts and classes are few."""
    axes = family_of(source.config).axes(name)
    assert isinstance(axes, tuple)
    axes = next(of_each(axes, 1)) if isinstance(axes[0], Each) else axes
    return any(not re.match(r".*(query|key|experts|classes)\b", space) for axis in axes for space in spaces_of(axis))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", EVERY)
def test_two_exports_of_a_model_look_the_same_from_outside(
    kind: str, scheme: SchemeName, twice: Callable[[str, SchemeName], tuple[Path, Path]]
) -> None:
    # All that may differ is random: the key's id, the name made of it, values, and the digests of those.
    first, second = (out / "cloud" for out in twice(kind, scheme))
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    for name in files:
        if name == "stip.json":
            assert _without_draws(first / name) == _without_draws(second / name)
        elif name.endswith(".safetensors"):
            assert _header(first / name) == _header(second / name)
            assert (first / name).stat().st_size == (second / name).stat().st_size
        else:
            assert (first / name).read_bytes() == (second / name).read_bytes()


def _without_draws(path: Path) -> dict[str, object]:
    manifest = json.loads(path.read_text())
    files = {name: entry["bytes"] for name, entry in manifest.pop("files").items() if name != "config.json"}
    return {key: value for key, value in manifest.items() if key not in ("key_id", "served_name", "digest")} | files


def _header(path: Path) -> tuple[dict[str, str], str]:
    """The metadata without the key's id, and the tensors' names, dtypes, shapes and places."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata.pop("key_id")
    return metadata, json.dumps(header)
