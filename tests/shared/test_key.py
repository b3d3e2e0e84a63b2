"""The user key: hiding and revealing undo each other, and its file stays its owner's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save

from shared.errors import BundleError
from shared.key import FORMAT, UserKey, new_key_id

needs_modes = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
permutations = st.integers(1, 40).flatmap(lambda size: st.permutations(range(size))).map(np.array)
keys = st.builds(UserKey, st.just("k"), permutations, permutations)
KEY = UserKey("00112233445566778899aabbccddeeff", np.array([2, 0, 3, 1]), np.array([4, 2, 0, 1, 3]))


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def write(path: Path, mode: int = 0o600, metadata: dict[str, str] | None = None, **tensors: Any) -> Path:
    """A key file by hand."""
    tensors = {"residual": np.arange(4, dtype=np.int32), "vocab": np.arange(5, dtype=np.int32)} | tensors
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    path.write_bytes(save(kept, metadata={"format": FORMAT, "key_id": "k"} if metadata is None else metadata))
    path.chmod(mode)
    return path


# --- laws ---


@settings(deadline=None)
@given(keys, st.integers(0, 4), st.data())
def test_reveal_hidden_undoes_hide(key: UserKey, rows: int, data: st.DataObject) -> None:
    plain = data.draw(arrays.arrays(np.float32, (rows, key.residual.size), elements=st.floats(width=32)))
    assert np.array_equal(key.reveal_hidden(key.hide(plain)), plain, equal_nan=True)


@settings(deadline=None)
@given(keys, st.integers(0, 4), st.data())
def test_hide_undoes_reveal_hidden(key: UserKey, rows: int, data: st.DataObject) -> None:
    permuted = data.draw(arrays.arrays(np.float16, (rows, key.residual.size), elements=st.floats(width=16)))
    assert np.array_equal(key.hide(key.reveal_hidden(permuted)), permuted, equal_nan=True)


@settings(deadline=None)
@given(keys, st.data())
def test_a_revealed_row_has_at_each_revealed_id_the_value_of_the_permuted_id(key: UserKey, data: st.DataObject) -> None:
    permuted = data.draw(arrays.arrays(np.float32, (2, key.vocab.size), elements=st.floats(-1e6, 1e6, width=32)))
    ids = key.reveal_ids(np.arange(key.vocab.size, dtype=np.uint32))
    assert np.array_equal(key.reveal_rows(permuted)[:, ids], permuted)


@settings(deadline=None)
@given(keys)
def test_every_plain_id_is_revealed_from_exactly_one_permuted_id(key: UserKey) -> None:
    assert sorted(key.reveal_ids(np.arange(key.vocab.size))) == list(range(key.vocab.size))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hiding_keeps_the_dtype(dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert KEY.hide(np.ones((2, 4), kind)).dtype == kind


def test_hiding_leaves_the_embeddings_as_they_were() -> None:
    plain = np.arange(8.0).reshape(2, 4)
    KEY.hide(plain)
    assert np.array_equal(plain, np.arange(8.0).reshape(2, 4))


def test_embeddings_of_another_width_are_not_hidden() -> None:
    with pytest.raises(BundleError):
        KEY.hide(np.ones((1, 5)))


@pytest.mark.parametrize(
    "index",
    [[0, 0], [1, 2], [0, 2], [-1, 0], [0, 1, 1], [[0, 1]]],
    ids=["twice", "from 1", "a gap", "negative", "too many", "two dimensions"],
)
@pytest.mark.parametrize("name", ["residual", "vocab"])
def test_an_index_that_is_no_permutation_is_refused(name: str, index: list[Any]) -> None:
    good = {"residual": np.arange(2), "vocab": np.arange(2)}
    with pytest.raises(BundleError, match=f"{name} is not a permutation"):
        UserKey("k", **(good | {name: np.array(index)}))


def test_a_key_shows_its_id_alone() -> None:
    assert f"{KEY!r} {KEY!s} {[KEY]}" == " ".join(
        ["UserKey(key_id='00112233445566778899aabbccddeeff')"] * 2 + [f"[{KEY}]"]
    )


def test_key_ids_are_128_random_bits() -> None:
    ids = {new_key_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(bytes.fromhex(key_id)) == 16 for key_id in ids)


# --- the file ---


def test_a_saved_key_loads(tmp_path: Path) -> None:
    path = tmp_path / "key.safetensors"
    KEY.save(path)
    key = UserKey.load(path)
    assert (key.key_id, key.residual.tolist(), key.vocab.tolist()) == (KEY.key_id, [2, 0, 3, 1], [4, 2, 0, 1, 3])


def test_a_saved_key_holds_the_two_permutations_and_nothing_else(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key.safetensors")
    assert set(load_file(tmp_path / "key.safetensors")) == {"residual", "vocab"}


@needs_modes
def test_a_key_is_saved_for_its_owner_alone_whatever_the_umask(tmp_path: Path, no_umask: None) -> None:
    KEY.save(tmp_path / "key.safetensors")
    assert stat.S_IMODE((tmp_path / "key.safetensors").stat().st_mode) == 0o600


def test_saving_never_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key.safetensors"
    path.write_bytes(b"another key")
    with pytest.raises(FileExistsError):
        KEY.save(path)
    assert path.read_bytes() == b"another key"


@needs_modes
def test_saving_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "key.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        KEY.save(tmp_path / "key.safetensors")
    assert not (tmp_path / "elsewhere").exists()


@needs_modes
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_key_that_others_can_touch_is_refused_with_the_command_that_mends_it(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "key.safetensors", mode)
    with pytest.raises(BundleError, match=f"seen mode {mode:04o}, wanted 0600") as caught:
        UserKey.load(path)
    assert caught.value.hint == f"chmod 600 {path}"


@needs_modes
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_of_its_owner_alone_loads(tmp_path: Path, mode: int) -> None:
    assert UserKey.load(write(tmp_path / "key.safetensors", mode)).key_id == "k"


@pytest.mark.parametrize("metadata", [{"format": "stip-key-2", "key_id": "k"}, {"key_id": "k"}, {}])
def test_another_format_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    with pytest.raises(BundleError, match=f"wanted '{FORMAT}'"):
        UserKey.load(write(tmp_path / "key.safetensors", metadata=metadata))


@pytest.mark.parametrize("length", [0, 7, 8, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "key.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BundleError, match=r"key file .*key\.safetensors: "):
        UserKey.load(path)


def test_a_file_that_lacks_the_residual_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="residual"):
        UserKey.load(write(tmp_path / "key.safetensors", residual=None))


def test_a_key_without_a_vocabulary_hides_and_reveals_hidden_states_alone(tmp_path: Path) -> None:
    UserKey("k", KEY.residual, None).save(tmp_path / "key.safetensors")
    key = UserKey.load(tmp_path / "key.safetensors")
    assert key.vocab is None and key.vocab_size == 0
    assert np.array_equal(key.hide(np.arange(4.0)[None]), [[2.0, 0.0, 3.0, 1.0]])
    for reveal in (key.reveal_ids, key.reveal_rows):
        with pytest.raises(BundleError, match="it reveals no logits"):
            reveal(np.zeros((1, 5), np.int64))


def rotating(size: int) -> UserKey:
    basis = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0]
    return UserKey("k", basis.astype(np.float32), np.arange(5))


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_basis_reveals_what_it_hid(size: int, dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    key, plain = rotating(size), np.random.default_rng(0).normal(size=(3, size)).astype(kind)
    hidden = key.hide(plain)
    assert hidden.dtype == np.float32 and hidden.shape == plain.shape
    assert np.allclose(np.linalg.norm(hidden, axis=1), np.linalg.norm(plain.astype(np.float32), axis=1), rtol=1e-5)
    assert np.allclose(key.reveal_hidden(hidden), plain.astype(np.float32), atol=1e-5)


@pytest.mark.parametrize("size", [64, 576])
def test_a_row_is_hidden_to_the_same_bits_alone_and_among_others(size: int) -> None:
    rows = np.random.default_rng(1).normal(size=(200, size)).astype(np.float32)
    together = rotating(size).hide(rows)
    assert all(np.array_equal(rotating(size).hide(rows[at : at + 1])[0], together[at]) for at in range(0, 200, 20))


def test_a_basis_survives_its_file(tmp_path: Path) -> None:
    rotating(16).save(tmp_path / "key.safetensors")
    assert np.array_equal(UserKey.load(tmp_path / "key.safetensors").residual, rotating(16).residual)


@pytest.mark.parametrize(
    "basis",
    [np.ones((4, 4)), 2 * np.eye(4), np.eye(4, 5), np.full((4, 4), np.nan), np.eye(4)[None]],
    ids=["of rank one", "twice as long", "not square", "not numbers", "three dimensions"],
)
def test_a_matrix_that_is_not_orthogonal_is_refused(tmp_path: Path, basis: np.ndarray) -> None:
    path = write(tmp_path / "key.safetensors", residual=basis.astype(np.float32))
    with pytest.raises(BundleError, match="residual is not"):
        UserKey.load(path)


@pytest.mark.parametrize("name", ["residual", "vocab"])
def test_a_file_whose_index_is_no_permutation_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match=f"{name} is not a permutation"):
        UserKey.load(write(tmp_path / "key.safetensors", **{name: np.array([0, 2, 2, 3], np.int32)}))


def test_a_missing_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        UserKey.load(tmp_path / "key.safetensors")
    assert caught.value.hint == "is this the device folder of an export?"


def test_a_file_without_a_key_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        UserKey.load(write(tmp_path / "key.safetensors", metadata={"format": FORMAT}))


def test_a_file_whose_index_is_not_of_integers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        UserKey.load(write(tmp_path / "key.safetensors", residual=np.arange(4, dtype=np.float32) + 0.5))
