"""The engine against the stock model: the same logits whatever the pieces, the cuts and the length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from cloud_backend.answers import logit_rows
from cloud_backend.decoder import DecoderEngine
from cloud_backend.engine import AppendWork, HiddenRows, LogitRows
from cloud_backend.kv_cache import PAGE, KVCache
from cloud_backend.llama.engine import LlamaEngine
from cloud_backend.opening import open_context
from export.bundle import export_model
from export.gguf.half import GgufName
from shared import wire
from tests.checkpoints import SIZES, randomise
from tests.conftest import ENGINES
from tests.thorough import examples

KINDS = {"torch": ["llama", "mistral-window", "qwen2", "qwen3"], "llama.cpp": ["llama", "qwen2", "qwen3", "gpt2"]}
WIDTH, VOCAB, CONTEXT = (SIZES[name] for name in ("hidden_size", "vocab_size", "max_position_embeddings"))
TOLERANCE = 1e-4  # float32: the order of sums differs with the pieces
SEQUENCE = np.random.default_rng(5).normal(size=(40, WIDTH)).astype(np.float32)
SEED = 7  # so that two exports of a model have one key
every_kind = pytest.mark.parametrize(
    ("engines", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.llama] if name == "llama.cpp" else [])
        for name, kinds in KINDS.items()
        for kind in kinds
    ],
    indirect=["engines"],
)
both_engines = pytest.mark.parametrize("engines", ENGINES, indirect=True)


@pytest.fixture(scope="module")
def exports(
    tiny_checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, GgufName | None], Path]:
    """Gives the cloud folder of a kind, in safetensors or as GGUF, always under the same key."""
    made: dict[tuple[str, GgufName | None], Path] = {}

    def exported(kind: str, gguf: GgufName | None) -> Path:
        if (kind, gguf) not in made:
            out = tmp_path_factory.mktemp("seeded") / kind
            export_model(str(tiny_checkpoints(kind)), out, name=kind, gguf=gguf, drafts="none", seed=SEED)
            made[kind, gguf] = out
        return made[kind, gguf] / "cloud"

    return exported


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest, exports: Callable[[str, GgufName | None], Path]) -> Callable[[str], Any]:
    """Gives the engine of a kind: torch's, or llama.cpp's."""
    made: dict[str, Any] = {}
    weights: GgufName | None = "f32" if request.param == "llama.cpp" else None

    def engine(kind: str) -> Any:
        if kind not in made:
            _, made[kind] = open_context(exports(kind, weights), engine=request.param, device="cpu", kv_bytes=2**26)
        return made[kind]

    return engine


@pytest.fixture(scope="module")
def stock(exports: Callable[[str, GgufName | None], Path]) -> Callable[[str], Any]:
    """The stock model of an exported cloud folder, as plain transformers loads it."""
    made: dict[str, Any] = {}

    def model(kind: str) -> Any:
        if kind not in made:
            made[kind] = AutoModelForCausalLM.from_pretrained(exports(kind, None), dtype=torch.float32).eval()
        return made[kind]

    return model


def tolerance(kind: str, engine: Any) -> float:
    """llama.cpp looks GELU up in a table of float16."""
    return 2e-2 if kind == "gpt2" and isinstance(engine, LlamaEngine) else TOLERANCE


@torch.inference_mode()
def whole(model: Any, embeddings: np.ndarray) -> np.ndarray:
    """The stock model's logits [n, vocab] for the whole sequence in one forward, with no cache."""
    states = torch.from_numpy(embeddings.copy())[None]
    return np.asarray(model(inputs_embeds=states, use_cache=False).logits[0].float())


def run(
    engine: Any,
    cache: KVCache,
    keep: int,
    embeddings: np.ndarray,
    *,
    rows: int | None = None,
    want: Literal["logits", "hidden"] = "logits",
    top_k: int = 0,
    temperature: float = 1.0,
    dtype: wire.FloatName | None = None,
) -> Any:
    rows = len(embeddings) if rows is None else rows
    work = AppendWork(cache, keep, embeddings, rows, want, top_k, temperature, dtype or engine.dtype)
    return engine.run([work])[0]


def llama(seed: int = 0, **changes: Any) -> Any:
    """A small stock model that never was on a disk."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | changes), dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


# --- the same logits ---

# Each piece: how many embeddings, and how many of those held are cut first; or the last embedding again.
plans = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12) | st.just(0)) | st.none(), min_size=1, max_size=8)


@every_kind
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans, seed=st.integers(0, 2**32 - 1))
def test_any_pieces_and_cuts_give_the_logits_of_one_whole_forward(
    engines: Callable[[str], Any],
    stock: Callable[[str], Any],
    kind: str,
    plan: list[tuple[int, int] | None],
    seed: int,
) -> None:
    engine, random = engines(kind), np.random.default_rng(seed)
    cache, held = engine.new_cache(), np.empty((0, WIDTH), np.float32)
    for step in plan:
        size, cut = step or (1, 1)
        keep = max(0, len(held) - cut)
        piece = random.normal(size=(size, WIDTH)).astype(np.float32)
        if step is None and len(held):
            piece = held[-1:]
        held = np.concatenate([held[:keep], piece])
        if len(held) > engine.context:
            break
        result = run(engine, cache, keep, piece)
        np.testing.assert_allclose(result.values, whole(stock(kind), held)[keep:], rtol=0, atol=tolerance(kind, engine))


@every_kind
def test_one_by_one_gives_the_logits_of_one_whole_forward(
    engines: Callable[[str], Any], stock: Callable[[str], Any], kind: str
) -> None:
    engine = engines(kind)
    cache = engine.new_cache()
    rows = [run(engine, cache, at, SEQUENCE[at : at + 1]).values[0] for at in range(len(SEQUENCE))]
    np.testing.assert_allclose(rows, whole(stock(kind), SEQUENCE), rtol=0, atol=tolerance(kind, engine))


def test_the_window_of_the_sliding_model_matters_at_this_length(stock: Callable[[str], Any]) -> None:
    # Else the cases above would not tell whether the engine applies it.
    far = SEQUENCE.copy()
    far[0] += 1.0
    assert np.array_equal(whole(stock("mistral-window"), far)[-1], whole(stock("mistral-window"), SEQUENCE)[-1])
    assert not np.allclose(whole(stock("llama"), far)[-1], whole(stock("llama"), SEQUENCE)[-1], atol=TOLERANCE)


@both_engines
def test_two_sequences_side_by_side_do_not_mix(engines: Callable[[str], Any], stock: Callable[[str], Any]) -> None:
    engine = engines("llama")
    caches = [engine.new_cache(), engine.new_cache()]
    sequences = [SEQUENCE[:12], SEQUENCE[20:32]]
    rows: list[list[np.ndarray]] = [[], []]
    for at in range(12):
        for k in (0, 1):
            rows[k].append(run(engine, caches[k], at, sequences[k][at : at + 1]).values[0])
    for k in (0, 1):
        np.testing.assert_allclose(rows[k], whole(stock("llama"), sequences[k]), rtol=0, atol=TOLERANCE)


@both_engines
def test_rows_are_those_of_the_last_embeddings(engines: Callable[[str], Any]) -> None:
    engine = engines("llama")
    all_rows = run(engine, engine.new_cache(), 0, SEQUENCE).values
    last = run(engine, engine.new_cache(), 0, SEQUENCE, rows=3).values
    np.testing.assert_allclose(last, all_rows[-3:], rtol=0, atol=TOLERANCE)


@both_engines
@pytest.mark.parametrize("top_k", [0, 5])
def test_no_rows_still_fill_the_cache(engines: Callable[[str], Any], top_k: int) -> None:
    engine = engines("llama")
    cache = engine.new_cache()
    result = run(engine, cache, 0, SEQUENCE, rows=0, top_k=top_k)
    assert (len(result.values), len(result.ids), result.log_sum_exp.shape, cache.length) == (0, 0, (0, 2), 40)


@both_engines
def test_hidden_rows_are_what_the_classifier_reads(engines: Callable[[str], Any], stock: Callable[[str], Any]) -> None:
    engine, model = engines("llama"), stock("llama")
    result = run(engine, engine.new_cache(), 0, SEQUENCE, rows=4, want="hidden")
    assert isinstance(result, HiddenRows)
    with torch.inference_mode():
        logits = model.lm_head(torch.from_numpy(result.hidden)).numpy()
    np.testing.assert_allclose(logits, whole(model, SEQUENCE)[-4:], rtol=0, atol=TOLERANCE)


# --- the full row after its top ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("before", [0, 1, 30])
def test_the_last_embedding_again_gives_the_very_row_whose_top_was_sent(dtype: Any, before: int) -> None:
    engine = DecoderEngine(llama().to(getattr(torch, dtype)), dtype, CONTEXT)
    embeddings, cache = SEQUENCE.astype(wire.DTYPES[dtype]), engine.new_cache()
    if before:
        run(engine, cache, 0, embeddings[:before], rows=0)
    top = run(engine, cache, before, embeddings[before : before + 5], rows=1, top_k=8)
    full = run(engine, cache, before + 4, embeddings[before + 4 : before + 5])
    assert np.array_equal(np.take_along_axis(full.values, top.ids.astype(np.int64), -1), top.values)


def forwards(model: Any) -> list[int]:
    """A list that grows with every forward of the model."""
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_the_last_embedding_again_takes_no_forward() -> None:
    model = llama()
    engine, seen = DecoderEngine(model, "float32", CONTEXT), forwards(model)
    cache = engine.new_cache()
    run(engine, cache, 0, SEQUENCE[:5], rows=1)
    run(engine, cache, 4, SEQUENCE[4:5])
    assert (len(seen), cache.length) == (1, 5)


@pytest.mark.parametrize(
    ("keep", "piece"),
    [(4, SEQUENCE[5:6]), (5, SEQUENCE[4:5]), (3, SEQUENCE[4:5]), (4, SEQUENCE[4:6]), (0, SEQUENCE[4:5])],
    ids=["another", "appended", "one earlier", "with another", "alone"],
)
def test_anything_but_the_last_embedding_again_takes_a_forward(keep: int, piece: np.ndarray) -> None:
    engine = DecoderEngine(llama(), "float32", CONTEXT)
    cache = engine.new_cache()
    run(engine, cache, 0, SEQUENCE[:5], rows=1)
    result = run(engine, cache, keep, piece)
    expected = whole(llama(), np.concatenate([SEQUENCE[:keep], piece]))[keep:]
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=TOLERANCE)


def test_the_last_embedding_again_after_a_cut_takes_a_forward() -> None:
    model = llama()
    engine = DecoderEngine(model, "float32", CONTEXT)
    cache = engine.new_cache()
    run(engine, cache, 0, SEQUENCE[:5], rows=1)
    failure = failing(model)
    assert run(engine, cache, 3, SEQUENCE[7:9]).code == "internal"
    failure.remove()
    result = run(engine, cache, 2, SEQUENCE[4:5])
    expected = whole(llama(), np.concatenate([SEQUENCE[:2], SEQUENCE[4:5]]))[2:]
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=TOLERANCE)


# --- growth ---

FULL = 8 * PAGE


def test_the_cache_grows_page_by_page() -> None:
    model = llama(max_position_embeddings=1024)
    reference = llama(max_position_embeddings=1024)
    engine = DecoderEngine(model, "float32", 1024)
    long = np.random.default_rng(1).normal(size=(2 * FULL + 90, WIDTH)).astype(np.float32)
    cache, rows = engine.new_cache(), []
    starts = [0, 250, 270, 570, *range(571, len(long) + 1)]
    for start, end in pairwise(starts):
        rows.append(run(engine, cache, start, long[start:end]).values)
    assert cache.length == len(long) > 2 * FULL
    np.testing.assert_allclose(np.concatenate(rows), whole(reference, long), rtol=0, atol=TOLERANCE)


def test_a_grown_cache_can_be_cut_back_to_any_length() -> None:
    model = llama(max_position_embeddings=1024)
    engine = DecoderEngine(model, "float32", 1024)
    long = np.random.default_rng(1).normal(size=(FULL + 60, WIDTH)).astype(np.float32)
    cache = engine.new_cache()
    run(engine, cache, 0, long, rows=0)
    keep = FULL - 6
    result = run(engine, cache, keep, SEQUENCE)
    expected = whole(llama(max_position_embeddings=1024), np.concatenate([long[:keep], SEQUENCE]))
    np.testing.assert_allclose(result.values, expected[keep:], rtol=0, atol=TOLERANCE)


# --- top-k and log-sum-exp ---


def rows_of(values: Sequence[Sequence[float]], top_k: int, temperature: float = 1.0) -> LogitRows:
    nothing = np.zeros((1, WIDTH), np.float32)
    work = AppendWork(KVCache(None), 0, nothing, len(values), "logits", top_k, temperature, "float32")
    (result,) = logit_rows([work], torch.tensor(values, dtype=torch.float32))
    return result  # type: ignore[return-value]


def sorted_row(row: np.ndarray) -> np.ndarray:
    """The ids of a full row, by descending value, then ascending id."""
    return np.lexsort((np.arange(len(row)), -row))


@both_engines
@pytest.mark.parametrize("top_k", [1, 2, 17, VOCAB - 1, VOCAB])
def test_top_k_is_the_head_of_the_sorted_full_row(engines: Callable[[str], Any], top_k: int) -> None:
    engine = engines("llama")
    cache = engine.new_cache()
    full = run(engine, cache, 0, SEQUENCE).values
    cache.clear()  # so that the same cells are summed over in the same order
    top = run(engine, cache, 0, SEQUENCE, top_k=top_k)
    order = np.array([sorted_row(row)[:top_k] for row in full])
    assert np.array_equal(top.ids, order)
    assert np.array_equal(top.values, np.take_along_axis(full, order, -1))


@both_engines
def test_more_than_the_vocabulary_is_the_vocabulary(engines: Callable[[str], Any]) -> None:
    engine = engines("llama")
    assert run(engine, engine.new_cache(), 0, SEQUENCE[:2], top_k=VOCAB + 500).ids.shape == (2, VOCAB)


ties = st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 3.0]), min_size=1, max_size=24)


@settings(max_examples=examples(150), deadline=None)
@given(ties, st.integers(1, 24))
def test_values_of_the_top_k_are_those_of_the_sorted_row_under_any_ties(row: list[float], top_k: int) -> None:
    top = rows_of([row], top_k)
    assert top.values[0].tolist() == sorted(row, reverse=True)[:top_k]


@settings(max_examples=examples(150), deadline=None)
@given(ties, st.integers(1, 24))
def test_equal_values_come_by_ascending_id(row: list[float], top_k: int) -> None:
    top = rows_of([row], top_k)
    assert np.array_equal(np.lexsort((top.ids[0], -top.values[0])), np.arange(min(top_k, len(row))))


@settings(max_examples=examples(150), deadline=None)
@given(ties, st.integers(1, 24))
def test_ids_are_distinct_and_name_their_values(row: list[float], top_k: int) -> None:
    top = rows_of([row], top_k)
    ids = top.ids[0].tolist()
    assert len(set(ids)) == len(ids) and [row[i] for i in ids] == top.values[0].tolist()


@settings(max_examples=examples(150), deadline=None)
@given(ties, st.integers(1, 24))
def test_every_id_above_the_smallest_value_is_there(row: list[float], top_k: int) -> None:
    top = rows_of([row], top_k)
    smallest = top.values[0, -1]
    assert {i for i, value in enumerate(row) if value > smallest} <= set(top.ids[0].tolist())


@both_engines
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7, 100.0, 0.01])
@pytest.mark.parametrize("top_k", [0, 8])
def test_log_sum_exp_is_over_the_whole_vocabulary_at_both_temperatures(
    engines: Callable[[str], Any], temperature: float, top_k: int
) -> None:
    engine = engines("llama")
    full = run(engine, engine.new_cache(), 0, SEQUENCE).values.astype(np.float64)
    result = run(engine, engine.new_cache(), 0, SEQUENCE, top_k=top_k, temperature=temperature)

    def log_sum_exp(rows: np.ndarray) -> np.ndarray:
        top = rows.max(-1)
        return top + np.log(np.exp(rows - top[:, None]).sum(-1))

    expected = np.stack([log_sum_exp(full), log_sum_exp(full / temperature)], -1)
    np.testing.assert_allclose(result.log_sum_exp, expected, rtol=1e-6, atol=1e-5)


@both_engines
def test_full_rows_come_without_ids(engines: Callable[[str], Any]) -> None:
    engine = engines("llama")
    result = run(engine, engine.new_cache(), 0, SEQUENCE[:3], top_k=0)
    assert (result.values.shape, result.ids.shape, result.ids.dtype) == ((3, VOCAB), (3, 0), np.uint32)


# --- what is sent ---


@pytest.mark.parametrize("top_k", [0, 16, VOCAB])
def test_bfloat16_values_on_the_wire_are_the_models_bit_by_bit(top_k: int) -> None:
    model = llama().to(torch.bfloat16)
    engine = DecoderEngine(model, "bfloat16", CONTEXT)
    computed: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: computed.append(logits))
    embeddings = SEQUENCE.astype(wire.DTYPES["bfloat16"])
    result = run(engine, engine.new_cache(), 0, embeddings, rows=7, top_k=top_k)
    frame = wire.encode(
        wire.Logits(seq=1, kv_length=40, tensors=(result.values, result.ids, result.log_sum_exp)),
    )
    received = wire.decode(frame)
    assert isinstance(received, wire.Logits)
    bits = computed[0].reshape(7, VOCAB).contiguous().view(torch.int16).numpy()
    if top_k:
        bits = np.take_along_axis(bits, received.ids.astype(np.int64), -1)
    assert np.array_equal(received.values.view(np.int16), bits)


def test_log_sum_exp_is_that_of_the_values_as_sent() -> None:
    engine = DecoderEngine(llama(), "float32", CONTEXT)
    result = run(engine, engine.new_cache(), 0, SEQUENCE.astype(wire.DTYPES["bfloat16"]), dtype="bfloat16")
    sent = torch.from_numpy(result.values.astype(np.float32))
    np.testing.assert_allclose(result.log_sum_exp[:, 0], torch.logsumexp(sent, -1).numpy(), rtol=1e-6)


@pytest.mark.parametrize("sent", wire.FLOATS)
@pytest.mark.parametrize("want", ["logits", "hidden"])
def test_results_have_the_dtype_that_was_asked_for(sent: Any, want: Any) -> None:
    engine = DecoderEngine(llama(), "float32", CONTEXT)
    embeddings = SEQUENCE[:2].astype(wire.DTYPES[sent])
    result = run(engine, engine.new_cache(), 0, embeddings, want=want, top_k=3, dtype=sent)
    assert (result.values if want == "logits" else result.hidden).dtype.name == sent


# --- failures ---


def failing(engine_model: Any) -> Any:
    """Makes the last layer fail, after the others have written to the cache."""

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    return engine_model.model.layers[-1].register_forward_pre_hook(fail)


@pytest.mark.parametrize("keep", [0, 9, 20])
def test_an_exception_in_the_model_leaves_the_cache_cut_to_keep(keep: int) -> None:
    model = llama()
    engine = DecoderEngine(model, "float32", CONTEXT)
    cache = engine.new_cache()
    run(engine, cache, 0, SEQUENCE[:20], rows=0)
    failure = failing(model)
    assert run(engine, cache, keep, SEQUENCE[20:]).code == "internal"
    failure.remove()
    assert cache.length == keep


def test_after_an_exception_in_the_model_every_layer_goes_on_from_keep() -> None:
    model = llama()
    engine = DecoderEngine(model, "float32", CONTEXT)
    cache = engine.new_cache()
    run(engine, cache, 0, SEQUENCE[:20], rows=0)
    failure = failing(model)
    assert run(engine, cache, 9, SEQUENCE[20:]).code == "internal"
    failure.remove()
    result = run(engine, cache, 9, SEQUENCE[9:])
    np.testing.assert_allclose(result.values, whole(llama(), SEQUENCE)[9:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("top_k", [0, 4])
def test_logits_that_are_not_finite_are_a_failure(top_k: int) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    engine = DecoderEngine(model, "float32", CONTEXT)
    cache = engine.new_cache()
    assert run(engine, cache, 0, SEQUENCE, top_k=top_k).code == "internal"
    assert cache.length == 0


def test_one_logit_of_minus_infinity_is_a_failure() -> None:
    # Its log-sum-exp is finite all the same.
    assert rows_of([[1.0, 2.0, -np.inf]], 0).code == "internal"  # type: ignore[union-attr]


def test_hidden_states_that_are_not_finite_are_a_failure() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[7] = torch.nan
    engine = DecoderEngine(model, "float32", CONTEXT)
    assert run(engine, engine.new_cache(), 0, SEQUENCE, want="hidden").code == "internal"


@both_engines
def test_a_temperature_close_to_zero_is_no_failure_of_the_model(engines: Callable[[str], Any]) -> None:
    engine = engines("llama")
    result = run(engine, engine.new_cache(), 0, SEQUENCE[:1], top_k=4, temperature=1e-4)
    assert np.isfinite(result.log_sum_exp).all()
