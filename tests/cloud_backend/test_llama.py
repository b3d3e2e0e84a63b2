"""The engine on llama.cpp: what it counts, what it forgets, and files that it does not take."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import psutil
import pytest

from cloud_backend.engine import AppendWork, HiddenRows, LogitRows
from cloud_backend.kv_cache import PAGE
from cloud_backend.llama import opening
from cloud_backend.llama.engine import LlamaCache, LlamaEngine
from cloud_backend.llama.library import library
from cloud_backend.opening import open_context
from shared.errors import BundleError, UsageError
from shared.manifest import CloudManifest, file_entry, read_manifest, write_manifest
from shared.wire import Array
from tests.cloud_backend.device import close, table
from tests.cloud_backend.faults import failing, poisoning

EMBEDDINGS = table()


@pytest.fixture(scope="module")
def half(tiny_exports: Callable[..., Path]) -> Path:
    """The cloud folder of the tiny llama as GGUF."""
    return tiny_exports("llama", gguf="f32") / "cloud"


def opened(folder: Path, **options: Any) -> LlamaEngine:
    _, engine = open_context(folder, device="cpu", **options)
    assert isinstance(engine, LlamaEngine)
    return engine


def append(cache: Any, keep: int, embeddings: Array, *, rows: int = 1, **fields: Any) -> AppendWork:
    given = {"want": "logits", "top_k": 0, "temperature": 1.0, "dtype": "float32"} | fields
    return AppendWork(cache, keep, embeddings, rows, **given)


def run(engine: LlamaEngine, *works: AppendWork) -> list[Any]:
    for work in works:
        assert work.reserve()
    return engine.run(works)


def rows(engine: LlamaEngine, cache: Any, keep: int, embeddings: Array) -> Array:
    """The full row behind the last embedding."""
    (result,) = run(engine, append(cache, keep, embeddings))
    assert isinstance(result, LogitRows)
    return result.values


# --- sequences that come and go ---


@pytest.mark.llama
def test_a_session_without_a_sequence_number_waits_until_one_is_given_back(half: Path) -> None:
    engine = opened(half, kv_bytes=2**26)
    caches = [engine.new_cache() for _ in range(257)]
    assert [cache.reserve(1) for cache in caches] == [True] * 256 + [False]
    assert caches[-1].held == 0
    caches[3].clear()
    assert caches[-1].reserve(1)


@pytest.mark.llama
def test_a_number_that_another_session_had_begins_empty(half: Path) -> None:
    engine = opened(half)
    before, after = engine.new_cache(), engine.new_cache()
    expected = rows(engine, before, 0, EMBEDDINGS[:5])
    rows(engine, before, 5, EMBEDDINGS[5:40])
    number = before.sequence
    before.clear()
    close(rows(engine, after, 0, EMBEDDINGS[:5]), expected)
    assert (after.sequence, before.sequence) == (number, None)


@pytest.mark.llama
def test_what_is_cut_is_forgotten_before_the_next_step(half: Path) -> None:
    engine = opened(half)
    cache, other = engine.new_cache(), engine.new_cache()
    rows(engine, cache, 0, EMBEDDINGS[:40])
    cache.cut(10)
    rows(engine, other, 0, EMBEDDINGS[:3])  # a step of another session
    assert (cache.stored, list(engine._sequences.forgotten)) == (10, [])
    expected = rows(engine, engine.new_cache(), 0, np.concatenate([EMBEDDINGS[:10], EMBEDDINGS[50:53]]))
    close(rows(engine, cache, 10, EMBEDDINGS[50:53]), expected)


@pytest.mark.llama
def test_sessions_that_fill_all_pages_fill_no_more_than_all_cells(half: Path) -> None:
    engine = opened(half, kv_bytes=8 * PAGE * 3 * 2 * 2 * 8 * 4)
    assert engine.pool.pages == 8
    first = engine.new_cache()
    expected = rows(engine, first, 0, EMBEDDINGS[:PAGE])
    first.clear()
    random = np.random.default_rng(0)
    for _ in range(30):  # whoever goes leaves holes behind
        caches = [engine.new_cache() for _ in range(8)]
        for at in random.permutation(8):
            close(rows(engine, caches[at], 0, EMBEDDINGS[:PAGE]), expected)
        for cache in random.permutation(np.array(caches, object)):
            cache.clear()


@pytest.mark.llama
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_failed_leaves_nothing_of_it(half: Path, when: str) -> None:
    engine = opened(half)
    cache, other = engine.new_cache(), engine.new_cache()
    rows(engine, cache, 0, EMBEDDINGS[:20])
    expected = rows(engine, other, 0, EMBEDDINGS[:23])
    with failing(engine, lambda tokens: 9 in tokens):
        first, second = run(engine, append(cache, 15, EMBEDDINGS[50:59]), append(other, 23, EMBEDDINGS[23:25]))
    assert (first.code, cache.length, other.length) == ("internal", 15, 25)
    assert isinstance(second, LogitRows)
    if when == "before":
        cache.trim()
    close(rows(engine, cache, 15, EMBEDDINGS[15:23]), expected)


@pytest.mark.llama
@pytest.mark.parametrize("wanted", [0, 1])
def test_what_is_not_finite_in_the_memory_reaches_no_other_session(half: Path, wanted: int) -> None:
    engine = opened(half)
    culprit, other = engine.new_cache(), engine.new_cache()
    expected = rows(engine, other, 0, EMBEDDINGS[:23])
    rows(engine, culprit, 0, EMBEDDINGS[30:40])
    with poisoning(engine, tokens=7):
        (outcome,) = run(engine, append(culprit, 10, EMBEDDINGS[40:47], rows=wanted))
    assert (outcome.code, culprit.length) == ("internal", 10)
    (outcome,) = run(engine, append(other, 23, EMBEDDINGS[23:24]))
    assert (outcome.code, other.length) == ("out_of_step", 0)
    close(rows(engine, other, 0, EMBEDDINGS[:23]), expected)
    (outcome,) = run(engine, append(culprit, 10, EMBEDDINGS[40:47]))
    assert (outcome.code, culprit.length) == ("out_of_step", 0)


@pytest.mark.llama
def test_who_was_in_a_step_that_was_not_finite_comes_again_alone(half: Path) -> None:
    engine = opened(half)
    culprit, other = engine.new_cache(), engine.new_cache()
    expected = rows(engine, other, 0, EMBEDDINGS[:23])
    other.clear()
    with poisoning(engine, tokens=7):
        together = [append(other, 0, EMBEDDINGS[:23]), append(culprit, 0, EMBEDDINGS[40:47])]
        assert [outcome.code for outcome in run(engine, *together)] == ["out_of_step", "out_of_step"]
        first, second = run(engine, *together)
    close(first.values, expected)
    assert (second.code, culprit.length) == ("internal", 0)


@pytest.mark.llama
def test_the_log_says_with_what_status_a_step_failed_and_why(half: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = opened(half)
    cache = engine.new_cache()
    rows(engine, cache, 0, EMBEDDINGS[:5])
    cache.length = 9  # llama.cpp wants a sequence to go on where it ended
    (outcome,) = run(engine, append(cache, 9, EMBEDDINGS[:3]))
    assert outcome.code == "internal"
    assert "engine failed: llama_decode: -1" in caplog.text
    assert "WARNING" in caplog.text and "llama.cpp: " in caplog.text


# --- rows ---


@pytest.mark.llama
def test_a_request_longer_than_llama_cpp_takes_at_once_is_cut(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(half)

    def both(want: str) -> list[Array]:
        lengths = ((100, 60), (40, 1), (3, 3))
        works = [append(engine.new_cache(), 0, EMBEDDINGS[:n], rows=rows, want=want) for n, rows in lengths]
        return [one.hidden if want == "hidden" else one.values for one in run(engine, *works)]

    whole = [both("logits"), both("hidden")]
    monkeypatch.setattr(engine._context, "_most", 32)
    for seen, wanted in zip([both("logits"), both("hidden")], whole, strict=True):
        for one, other in zip(seen, wanted, strict=True):
            close(one, other)


@pytest.mark.llama
def test_the_last_embedding_again_takes_no_forward(half: Path) -> None:
    engine = opened(half)
    cache = engine.new_cache()
    (top,) = run(engine, append(cache, 0, EMBEDDINGS[:5], top_k=8))
    with failing(engine):
        (full,) = run(engine, append(cache, 4, EMBEDDINGS[4:5]))
    assert np.array_equal(np.take_along_axis(full.values, top.ids.astype(np.int64), -1), top.values)


@pytest.mark.llama
def test_rows_that_were_given_stay_what_they_were(half: Path) -> None:
    engine = opened(half)
    cache = engine.new_cache()
    given = rows(engine, cache, 0, EMBEDDINGS[:5])
    before = given.copy()
    rows(engine, cache, 5, EMBEDDINGS[5:9])
    assert np.array_equal(given, before)


@pytest.mark.llama
def test_an_export_whose_classifier_is_on_devices_gives_hidden_states(tiny_exports: Callable[..., Path]) -> None:
    engine = opened(tiny_exports("llama-tied", head="device", gguf="f32") / "cloud")
    assert engine.vocab_size == 0
    (result,) = run(engine, append(engine.new_cache(), 0, EMBEDDINGS[:9], rows=3, want="hidden"))
    assert isinstance(result, HiddenRows) and result.hidden.shape == (3, 48) and np.isfinite(result.hidden).all()


@pytest.mark.llama
def test_hidden_states_are_computed_only_where_some_are_wanted(half: Path) -> None:
    engine = opened(half)
    cache, wants = engine.new_cache(), list[str]()
    real = engine._context.decode
    engine._context.decode = lambda pieces, want: wants.append(want) or real(pieces, want)  # type: ignore
    first, second = (
        run(engine, append(cache, keep, EMBEDDINGS[keep : keep + 9], rows=rows, want="hidden"))[0]
        for keep, rows in ((0, 0), (9, 2))
    )
    assert (wants, first.hidden.shape, second.hidden.shape) == (["logits", "hidden"], (0, 48), (2, 48))


# --- what cannot be served ---


@pytest.fixture
def copied(half: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half, tmp_path / "cloud")


def sealed(folder: Path, **changes: Any) -> Path:
    """The folder with a manifest of its files as they are."""
    manifest = read_manifest(folder, CloudManifest)
    entries = {name: file_entry(folder / name) for name in manifest.files}
    write_manifest(msgspec.structs.replace(manifest, files=entries, **changes), folder)
    return folder


@pytest.mark.llama
def test_a_gguf_of_another_key_is_refused(copied: Path) -> None:
    with pytest.raises(BundleError, match="a GGUF of another key") as caught:
        opened(sealed(copied, key_id="0" * 32))
    assert caught.value.hint


def test_a_truncated_gguf_is_refused(copied: Path) -> None:
    path = copied / "model.gguf"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BundleError, match="bytes, wanted") as caught:
        opened(copied)
    assert caught.value.hint


@pytest.mark.llama
def test_a_gguf_that_was_truncated_before_its_manifest_was_written_is_refused(copied: Path) -> None:
    path = copied / "model.gguf"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BundleError, match=r"llama\.cpp cannot load it: .*(bounds|corrupted|incomplete)"):
        opened(sealed(copied))


@pytest.mark.llama
def test_a_type_of_tensors_that_this_llama_cpp_lacks_is_refused(copied: Path) -> None:
    path = copied / "model.gguf"
    reader = gguf.GGUFReader(path, "r+")
    kind = reader.tensors[3].field.parts[4]
    kind[0] = 4096
    reader.data.flush()
    with pytest.raises(BundleError, match=r"llama\.cpp cannot load it: .*type") as caught:
        opened(sealed(copied))
    assert "llama-cpp-python" in str(caught.value.hint)


@pytest.mark.llama
def test_a_gguf_of_other_sizes_than_its_config_is_refused(copied: Path) -> None:
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(BundleError, match="layers: seen 3, wanted 4"):
        opened(sealed(copied))


@pytest.mark.parametrize(
    ("engine", "gguf_kind", "hint"), [("torch", "f32", "--engine llama.cpp"), ("llama.cpp", None, "--engine torch")]
)
def test_an_engine_that_does_not_run_the_weights_is_refused(
    tiny_exports: Callable[..., Path], engine: Any, gguf_kind: str | None, hint: str
) -> None:
    with pytest.raises(BundleError, match="does not run") as caught:
        open_context(tiny_exports("llama", gguf=gguf_kind) / "cloud", engine=engine)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_missing_llama_cpp_says_how_to_install_it(half: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    library.cache_clear()
    try:
        with pytest.raises(UsageError, match="not installed") as caught:
            open_context(half, device=device)
    finally:
        library.cache_clear()
    assert caught.value.hint == "pip install 'stip[llama.cpp]'"


@pytest.mark.llama
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"device": "cuda"}], ids=str)
def test_what_llama_cpp_cannot_do_here_is_said_with_a_hint(
    half: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "gpus", list)
    with pytest.raises(UsageError) as caught:
        open_context(half, **options)
    assert caught.value.hint


@pytest.mark.llama
@pytest.mark.parametrize("kv_bytes", [2**42, 2**50, 10**30])
def test_kv_memory_that_no_machine_has_is_refused(half: Path, kv_bytes: int) -> None:
    with pytest.raises(UsageError, match="which cannot be allocated") as caught:
        opened(half, kv_bytes=kv_bytes)
    assert caught.value.hint == "a smaller --kv-bytes or --context"


@pytest.mark.llama
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is Linux's")
def test_kv_memory_that_llama_cpp_does_not_get_is_refused(half: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, before[1]))
    try:
        with pytest.raises(UsageError, match="which cannot be allocated") as caught:
            opened(half, kv_bytes=2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert caught.value.hint == "a smaller --kv-bytes or --context"


@pytest.mark.llama
def test_on_a_graphics_card_kv_memory_is_half_of_what_is_free_there(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_bytes = opened(half).pool.page_bytes
    monkeypatch.setattr(opening, "gpus", lambda: ["CUDA0"])
    monkeypatch.setattr(opening, "gpu_memory", lambda: 4 * page_bytes)
    _, engine = open_context(half)
    assert engine.pool is not None and engine.pool.pages == 2


@pytest.mark.llama
def test_a_cache_counts_as_llama_cpp_holds(half: Path) -> None:
    engine = opened(half)
    cache = engine.new_cache()
    assert isinstance(cache, LlamaCache)
    rows(engine, cache, 0, EMBEDDINGS[:40])
    assert (cache.length, cache.stored, cache.held) == (40, 40, 2)
