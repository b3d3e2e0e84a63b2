"""A source sequence and its decoder, served on loopback: what the stock model computes from both ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MarianConfig, MarianMTModel

from cloud_backend.engine import AppendWork, EncodeWork, HiddenRows, LogitRows
from cloud_backend.opening import open_context
from shared import wire
from shared.errors import BundleError, RequestError
from tests.cloud_backend.device import Device, close, encode, open_of
from tests.cloud_backend.folders import randomised, save_cloud
from tests.conftest import RunningCloud, run_cloud

WIDTH, VOCAB, TARGET_VOCAB, CONTEXT = 32, 60, 50, 40
SIZES = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "scale_embedding": True,
}
MODELS = {
    "shared": MarianConfig(**SIZES),
    "apart": MarianConfig(
        **SIZES, decoder_vocab_size=TARGET_VOCAB, share_encoder_decoder_embeddings=False, tie_word_embeddings=False
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)
POSITIONS = ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]


@dataclass
class Served:
    """The stock models by name, and one cloud that serves them all."""

    models: dict[str, Any]
    folder: Path
    cloud: RunningCloud

    def device(self, name: str = "shared") -> Device:
        return Device(self.cloud.url, open_of(self.folder / name))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("translation")
    models = {name: randomised(MarianMTModel(config)) for name, config in MODELS.items()}
    for name, model in models.items():
        save(model, folder / name)
    with run_cloud(*(folder / name for name in models)) as cloud:
        yield Served(models, folder, cloud)


def save(model: Any, out: Path, **options: Any) -> Path:
    """The cloud's half: devices look words up, scale them and add positions."""
    words = [name for name in model.state_dict() if "embed_tokens" in name or "shared" in name]
    given = {"absent": words, "zero": POSITIONS, "scale_embedding": False, "tie_word_embeddings": False} | options
    return save_cloud(model, out, "encoder-decoder", **given)


SOURCE, OTHER = [[7, 31, 8, 44, 9, 12, 3], [21, 22, 5]]
TARGET = [0, 17, 4, 33, 26, 41]


@torch.inference_mode()
def whole(model: Any, source: list[int], target: list[int]) -> np.ndarray:
    """The stock model's logits [target, vocab] in one forward of ids."""
    ids, decoder_ids = torch.tensor([source]), torch.tensor([target])
    return np.asarray(model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False).logits[0])


@torch.inference_mode()
def embed(half: Any, ids: list[int], first: int = 0) -> np.ndarray:
    """What a device sends for ids from position `first` on: of the source for the encoder, else for the decoder."""
    rows = half.embed_tokens.weight[ids] * WIDTH**0.5 + half.embed_positions.weight[first : first + len(ids)]
    return rows.numpy()


def store(device: Device, model: Any, source: list[int]) -> Any:
    return encode(device, [embed(model.model.encoder, source)], "store")


def decode(device: Device, model: Any, keep: int, ids: list[int], **fields: Any) -> np.ndarray:
    return device.rows(keep, embed(model.model.decoder, ids, keep), **fields)


# --- the same logits ---


@every_model
def test_rows_are_those_of_the_stock_model_for_source_and_target_ids(served: Served, name: str) -> None:
    model = served.models[name]
    with served.device(name) as device:
        store(device, model, SOURCE)
        rows = decode(device, model, 0, TARGET, rows=len(TARGET))
    close(rows, whole(model, SOURCE, TARGET))


@every_model
def test_one_by_one_gives_the_rows_of_one_whole_forward(served: Served, name: str) -> None:
    model = served.models[name]
    with served.device(name) as device:
        store(device, model, SOURCE)
        rows = [decode(device, model, at, [token])[0] for at, token in enumerate(TARGET)]
    close(np.array(rows), whole(model, SOURCE, TARGET))


def test_the_decoder_can_be_cut_back(served: Served) -> None:
    model = served.models["shared"]
    with served.device() as device:
        store(device, model, SOURCE)
        decode(device, model, 0, TARGET)
        rows = decode(device, model, 2, [9, 10], rows=2)
    close(rows, whole(model, SOURCE, [*TARGET[:2], 9, 10])[-2:])


def test_the_last_embedding_again_gives_the_same_row_in_full(served: Served) -> None:
    model = served.models["shared"]
    with served.device() as device:
        store(device, model, SOURCE)
        first = decode(device, model, 0, TARGET)
        again = decode(device, model, len(TARGET) - 1, TARGET[-1:])
    assert np.array_equal(first, again)


def test_a_new_source_takes_the_place_of_the_one_before(served: Served) -> None:
    model = served.models["shared"]
    with served.device() as device:
        store(device, model, SOURCE)
        decode(device, model, 0, TARGET)
        assert store(device, model, OTHER).kv_length == 0
        rows = decode(device, model, 0, TARGET, rows=len(TARGET))
    close(rows, whole(model, OTHER, TARGET))
    assert not np.allclose(rows, whole(model, SOURCE, TARGET), atol=0.01)  # else the source would not matter


def test_a_new_source_changes_the_row_of_an_embedding_that_was_the_last(served: Served) -> None:
    model = served.models["shared"]
    with served.device() as device:
        store(device, model, SOURCE)
        decode(device, model, 0, TARGET[:1])
        store(device, model, OTHER)
        rows = decode(device, model, 0, TARGET[:1])
    close(rows, whole(model, OTHER, TARGET[:1]))


def test_sources_of_two_sessions_do_not_mix(served: Served) -> None:
    model = served.models["shared"]
    with served.device() as device, served.device() as other:
        store(device, model, SOURCE)
        store(other, model, OTHER)
        rows = [decode(asker, model, 0, TARGET, rows=2) for asker in (device, other)]
    close(rows[0], whole(model, SOURCE, TARGET)[-2:])
    close(rows[1], whole(model, OTHER, TARGET)[-2:])


def test_source_and_target_may_be_as_long_as_the_model_has_positions(served: Served) -> None:
    model, ids = served.models["shared"], list(np.random.default_rng(0).integers(1, VOCAB, CONTEXT))
    with served.device() as device:
        store(device, model, ids)
        close(decode(device, model, 0, ids), whole(model, ids, ids)[-1:])


@pytest.mark.parametrize("dtype", wire.FLOATS)
def test_source_and_target_in_any_dtype_are_close_to_the_stock_model(served: Served, dtype: Any) -> None:
    model, engine = served.models["shared"], open_context(served.folder / "shared" / "cloud", dtype=dtype)[1]
    cache, wanted = engine.new_cache(), wire.DTYPES[dtype]
    source, target = (embed(half, ids) for half, ids in ((model.model.encoder, SOURCE), (model.model.decoder, TARGET)))
    engine.run([EncodeWork(cache, source.astype(wanted), (len(SOURCE),), "store", dtype)])
    (result,) = engine.run([AppendWork(cache, 0, target.astype(wanted), 1, "logits", 0, 1.0, dtype)])
    assert isinstance(result, LogitRows) and result.values.dtype == wanted
    close(result.values.astype(np.float32), whole(model, SOURCE, TARGET)[-1:], 0.05)


def test_the_source_is_projected_once(served: Served) -> None:
    engine = served.cloud.engine
    cache, projected = engine.new_cache(), []
    layer = engine._model.model.decoder.layers[0].encoder_attn.k_proj
    seen = layer.register_forward_hook(lambda _module, inputs, _output: projected.append(len(inputs[0])))
    rows = np.ones((5, WIDTH), np.float32)
    engine.run([EncodeWork(cache, rows, (5,), "store", "float32")])
    for at in range(3):
        engine.run([AppendWork(cache, at, rows[at : at + 1], 1, "hidden", 0, 1.0, "float32")])
    seen.remove()
    assert projected == [5]


# --- the session ---


@every_model
def test_opened_says_what_a_source_may_be(served: Served, name: str) -> None:
    with served.device(name) as device:
        opened = device.opened
    assert (opened.encoder_size, opened.encoder_context, opened.image_tokens) == (WIDTH, CONTEXT, 0)
    assert (opened.hidden_size, opened.context, opened.kv_length) == (WIDTH, CONTEXT, 0)
    assert opened.vocab_size == (VOCAB if name == "shared" else TARGET_VOCAB)


def test_the_answer_to_store_is_empty(served: Served) -> None:
    with served.device() as device:
        reply = store(device, served.models["shared"], SOURCE)
    assert isinstance(reply, wire.Encoded)
    assert (reply.result.shape, reply.result.dtype.name, reply.kv_length) == ((0, WIDTH), "float32", 0)


def test_an_append_before_a_source_is_out_of_step(served: Served) -> None:
    model = served.models["shared"]
    with served.device() as device:
        error = device.ask(device.append(0, embed(model.model.decoder, TARGET)))
        assert (error.code, error.kv_length) == ("out_of_step", 0) and "source" in error.message
        store(device, model, SOURCE)
        close(decode(device, model, 0, TARGET), whole(model, SOURCE, TARGET)[-1:])


def test_an_append_can_be_sent_behind_a_source_that_is_not_answered_yet(served: Served) -> None:
    model = served.models["shared"]
    with served.device() as device:
        device.send(device.encode(embed(model.model.encoder, SOURCE), [len(SOURCE)], want="store"))
        device.send(device.append(0, embed(model.model.decoder, TARGET), after=device.seq, top_k=0))
        stored, answered = device.receive(), device.receive()
    assert isinstance(stored, wire.Encoded)
    close(answered.values, whole(model, SOURCE, TARGET)[-1:])


def test_what_was_decoded_before_a_source_is_nothing_to_build_on(served: Served) -> None:
    model = served.models["shared"]
    with served.device() as device:
        store(device, model, SOURCE)
        decode(device, model, 0, TARGET)
        decoded = device.seq
        store(device, model, OTHER)
        error = device.ask(device.append(0, embed(model.model.decoder, TARGET), after=decoded))
    assert error.code == "out_of_step"


GOOD = np.random.default_rng(4).normal(size=(5, WIDTH)).astype(np.float32)
LONG = np.ones((CONTEXT + 1, WIDTH), np.float32)
BAD = {
    "two sequences": ((GOOD, (2, 3)), "store", "bad_request", "lengths: seen 2 sequences, wanted 1 to store"),
    "too long": ((LONG, (CONTEXT + 1,)), "store", "too_large", f"seen {CONTEXT + 1}, wanted at most {CONTEXT}"),
    "too narrow": ((GOOD[:, 1:], (5,)), "store", "bad_request", f"seen width {WIDTH - 1}, wanted {WIDTH}"),
    "another dtype": ((GOOD.astype(np.float16), (5,)), "store", "bad_request", "seen float16, wanted float32"),
    "not the sum": ((GOOD, (4,)), "store", "bad_request", "lengths: seen a sum of 4, wanted 5"),
    "NaN": ((np.full_like(GOOD, np.nan), (5,)), "store", "not_finite", "NaN"),
    **{
        want: ((GOOD, (5,)), want, "unsupported", f"seen an Encode of {want}, wanted an Append of text, or an Encode")
        for want in ("hidden", "pooled", "logits")
    },
}


@pytest.mark.parametrize(("given", "want", "code", "text"), BAD.values(), ids=BAD)
def test_a_source_that_does_not_fit_gets_this_error_and_changes_nothing(
    served: Served, given: Any, want: Any, code: str, text: str
) -> None:
    model = served.models["shared"]
    with served.device() as device:
        store(device, model, SOURCE)
        decode(device, model, 0, TARGET[:3])
        decoded = device.seq
        error = device.ask(device.encode(*given, want=want))
        assert (error.code, error.seq, error.kv_length) == (code, device.seq, 3) and text in error.message
        rows = decode(device, model, 3, TARGET[3:], after=decoded, rows=3)
    close(rows, whole(model, SOURCE, TARGET)[-3:])


def test_an_image_is_unsupported(served: Served) -> None:
    with served.device() as device:
        error = device.ask(device.append(0, GOOD, kind="image", rows=0))
    assert error.code == "unsupported"


# --- failures ---


def fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_source_on_which_the_model_fails_changes_nothing(served: Served) -> None:
    model, encoder = served.models["shared"], served.cloud.engine._model.model.encoder
    with served.device() as device:
        store(device, model, SOURCE)
        decode(device, model, 0, TARGET[:3])
        decoded = device.seq
        failure = encoder.layers[-1].register_forward_pre_hook(fail)
        error = store(device, model, OTHER)
        failure.remove()
        assert (error.code, error.kv_length) == ("internal", 3)
        rows = decode(device, model, 3, TARGET[3:], after=decoded, rows=3)
    close(rows, whole(model, SOURCE, TARGET)[-3:])


@pytest.mark.parametrize("at", ["q_proj", "out_proj"])
def test_a_failure_while_the_decoder_reads_the_source_leaves_no_half_of_it(served: Served, at: str) -> None:
    model, decoder = served.models["shared"], served.cloud.engine._model.model.decoder
    with served.device() as device:
        store(device, model, SOURCE)
        failure = getattr(decoder.layers[1].encoder_attn, at).register_forward_pre_hook(fail)
        error = device.ask(device.append(0, embed(model.model.decoder, TARGET)))
        failure.remove()
        assert (error.code, error.kv_length) == ("internal", 0)
        close(decode(device, model, 0, TARGET), whole(model, SOURCE, TARGET)[-1:])


def test_a_failure_between_keys_and_values_of_a_source_leaves_the_one_before(served: Served) -> None:
    engine = open_context(served.folder / "shared" / "cloud", device="cpu")[1]
    cache = engine.new_cache()
    engine.run([EncodeWork(cache, GOOD, (5,), "store", "float32")])
    wanted = engine.run([AppendWork(cache, 0, GOOD, 1, "hidden", 0, 1.0, "float32")])[0]
    layer = engine._model.model.decoder.layers[1].encoder_attn.v_proj  # type: ignore[attr-defined]
    hook = layer.register_forward_pre_hook(fail)
    (outcome,) = engine.run([EncodeWork(cache, 2 * GOOD, (5,), "store", "float32")])
    hook.remove()
    assert isinstance(outcome, RequestError) and outcome.code == "internal"
    assert cache.length == 5
    again = engine.run([AppendWork(cache, 0, GOOD, 1, "hidden", 0, 1.0, "float32")])[0]
    assert isinstance(wanted, HiddenRows) and isinstance(again, HiddenRows)
    close(again.hidden, wanted.hidden, 1e-6)


def test_sources_of_several_sessions_are_read_side_by_side(served: Served) -> None:
    engine = served.cloud.engine
    sources = [np.random.default_rng(at).normal(size=(3 + 4 * at, WIDTH)).astype(np.float32) for at in range(4)]
    caches = [engine.new_cache() for _ in sources]
    engine.run(
        [EncodeWork(cache, rows, (len(rows),), "store", "float32") for cache, rows in zip(caches, sources, strict=True)]
    )
    together = engine.run([AppendWork(cache, 0, GOOD[:2], 1, "hidden", 0, 1.0, "float32") for cache in caches])
    for cache, result in zip(caches, together, strict=True):
        (alone,) = engine.run([AppendWork(cache, 0, GOOD[:2], 1, "hidden", 0, 1.0, "float32")])
        assert isinstance(alone, HiddenRows) and isinstance(result, HiddenRows)
        close(result.hidden, alone.hidden, 1e-5)


def test_a_source_whose_states_are_not_finite_is_not_kept(tmp_path: Path) -> None:
    model = randomised(MarianMTModel(MODELS["shared"]))
    with torch.no_grad():
        model.model.encoder.layers[-1].final_layer_norm.weight[3] = torch.nan
    engine = open_context(save(model, tmp_path / "nan") / "cloud", device="cpu")[1]
    cache = engine.new_cache()
    (outcome,) = engine.run([EncodeWork(cache, GOOD, (5,), "store", "float32")])
    assert isinstance(outcome, RequestError) and outcome.code == "internal"
    assert not cache.ready


# --- opening ---


@pytest.mark.parametrize("name", [*POSITIONS, "final_logits_bias"])
def test_a_folder_without_what_transformers_would_make_anew_is_refused(tmp_path: Path, name: str) -> None:
    # The stock class fills these in and reports nothing: sinusoids where the cloud must have zeros.
    out = save(randomised(MarianMTModel(MODELS["shared"])), tmp_path / "out", left_out=[name])
    with pytest.raises(BundleError, match="1 tensors missing"):
        open_context(out / "cloud", device="cpu")


def test_a_folder_without_a_classifier_gives_hidden_states(served: Served, tmp_path: Path) -> None:
    model = served.models["apart"]
    words = [name for name in model.state_dict() if "embed_tokens" in name]
    out = save(model, tmp_path / "out", absent=[*words, "lm_head.weight", "final_logits_bias"])
    with run_cloud(out) as cloud, Device(cloud.url, open_of(out)) as device:
        store(device, model, SOURCE)
        rows = embed(model.model.decoder, TARGET)
        hidden = device.ask(device.append(0, rows, rows=len(TARGET), want="hidden")).hidden
        error = device.ask(device.append(0, rows))
    assert (device.opened.vocab_size, error.code) == (0, "unsupported")
    with torch.inference_mode():
        logits = model.lm_head(torch.from_numpy(hidden.copy())) + model.final_logits_bias
    close(logits.numpy(), whole(model, SOURCE, TARGET))


@every_model
def test_the_positions_that_were_stored_are_the_ones_in_use(served: Served, name: str) -> None:
    engine = open_context(served.folder / name / "cloud", device="cpu")[1]
    stored = engine._model.state_dict()
    assert not stored[POSITIONS[0]].any() and POSITIONS[1] not in stored  # which adds nothing either
