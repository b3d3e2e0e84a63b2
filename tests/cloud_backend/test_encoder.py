"""Encoders of text, served on loopback: what the stock model computes from ids, for any mix of lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from cloud_backend import encoder
from cloud_backend.encoder import MOST_POSITIONS
from cloud_backend.engine import EncodedRows, EncodeWork
from cloud_backend.grouping import groups
from cloud_backend.limits import Limits
from cloud_backend.opening import open_context
from shared import wire
from shared.errors import RequestError
from tests.cloud_backend.device import Device, close, encode, open_of
from tests.cloud_backend.folders import randomised, save_cloud
from tests.conftest import RunningCloud, run_cloud

WIDTH, VOCAB, POSITIONS, CLASSES = 24, 60, 32, 5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": POSITIONS,
    "num_labels": CLASSES,
}
DISTIL = DistilBertConfig(
    vocab_size=VOCAB,
    dim=WIDTH,
    n_layers=3,
    n_heads=4,
    hidden_dim=40,
    max_position_embeddings=POSITIONS,
    num_labels=CLASSES,
)
MODELS = {
    "bert": (BertModel, BertConfig(**SIZES)),
    "bert-classifier": (BertForSequenceClassification, BertConfig(**SIZES)),
    "roberta": (RobertaModel, RobertaConfig(**SIZES)),
    "roberta-classifier": (RobertaForSequenceClassification, RobertaConfig(**SIZES)),
    "distilbert": (DistilBertModel, DISTIL),
    "distilbert-classifier": (DistilBertForSequenceClassification, DISTIL),
}
WANTS = {
    "bert": {"hidden", "pooled"},
    "bert-classifier": {"hidden", "pooled", "logits"},
    "roberta": {"hidden", "pooled"},
    "roberta-classifier": {"hidden", "logits"},
    "distilbert": {"hidden"},
    "distilbert-classifier": {"hidden", "logits"},
}
every_model = pytest.mark.parametrize("name", MODELS)
every_result = pytest.mark.parametrize(("name", "want"), [(n, want) for n in MODELS for want in sorted(WANTS[n])])


@dataclass
class Served:
    """The stock models by name, and one cloud that serves them all."""

    models: dict[str, Any]
    folder: Path
    cloud: RunningCloud

    def device(self, name: str, **fields: Any) -> Device:
        return Device(self.cloud.url, open_of(self.folder / name, **fields))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("encoders")
    models = {name: stock(name) for name in MODELS}
    outs = [save(model, folder / name) for name, model in models.items()]
    with run_cloud(*outs) as cloud:
        yield Served(models, folder, cloud)


def stock(name: str) -> Any:
    kind, config = MODELS[name]
    return randomised(kind(config))


def save(model: Any, out: Path, **options: Any) -> Path:
    """The cloud's half: devices look words up, and add positions and token types."""
    words = [name for name in model.state_dict() if "word_embeddings" in name]
    added = [name for name in model.state_dict() if "position_embeddings" in name or "token_type_embeddings" in name]
    return save_cloud(model, out, "encoder", **{"absent": words, "zero": added} | options)


def ids_of(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(list(lengths))
    return [random.integers(3, VOCAB, length) for length in lengths]  # 0 to 2 are special to some of them


@torch.inference_mode()
def embed(model: Any, ids: np.ndarray) -> np.ndarray:
    """What a device sends for ids: the sum of word, position and token type [n, hidden]."""
    table = model.base_model.embeddings
    first = 0 if table.position_embeddings.padding_idx is None else table.position_embeddings.padding_idx + 1
    rows = table.word_embeddings.weight[ids] + table.position_embeddings.weight[first : first + len(ids)]
    if hasattr(table, "token_type_embeddings"):
        rows = rows + table.token_type_embeddings.weight[0]
    return rows.numpy()


@torch.inference_mode()
def whole(model: Any, ids: np.ndarray, want: str) -> np.ndarray:
    """What the stock model makes of ids, by itself: [n, hidden], or one row."""
    inputs = torch.from_numpy(ids)[None]
    if want == "logits":
        return model(input_ids=inputs).logits.numpy()
    outputs = model.base_model(input_ids=inputs)
    return (outputs.last_hidden_state[0] if want == "hidden" else outputs.pooler_output).numpy()


# --- the same results ---


@every_result
def test_each_of_a_ragged_batch_is_what_the_stock_model_makes_of_its_ids(served: Served, name: str, want: str) -> None:
    model, ids = served.models[name], ids_of(5, 30, 1, 17, 30, 2, 9, 1)
    with served.device(name) as device:
        reply = encode(device, [embed(model, each) for each in ids], want)
    assert isinstance(reply, wire.Encoded), reply
    close(reply.result, np.concatenate([whole(model, each, want) for each in ids]))


@every_result
def test_a_sequence_among_others_is_what_it_is_alone(served: Served, name: str, want: str) -> None:
    embeddings = [embed(served.models[name], ids) for ids in ids_of(20, 25, 13, 19)]
    with served.device(name) as device:
        together = encode(device, embeddings, want).result
        alone = [encode(device, [rows], want).result for rows in embeddings]
    close(together, np.concatenate(alone), 1e-5)


@every_model
def test_the_longest_sequence_is_as_long_as_the_model_has_positions(served: Served, name: str) -> None:
    model = served.models[name]
    with served.device(name) as device:
        context = device.opened.context
        (ids,) = ids_of(context)
        close(encode(device, [embed(model, ids)], "hidden").result, whole(model, ids, "hidden"))
    assert context == (POSITIONS - 2 if "roberta" in name else POSITIONS)  # two of RoBERTa's are for padding


@every_model
def test_opened_says_what_the_model_is(served: Served, name: str) -> None:
    with served.device(name) as device:
        opened = device.opened
    classes = CLASSES if "classifier" in name else 0
    assert (opened.hidden_size, opened.vocab_size, opened.kv_length) == (WIDTH, classes, 0)
    assert (opened.encoder_size, opened.encoder_context, opened.image_tokens) == (0, 0, 0)


@pytest.mark.parametrize("dtype", wire.FLOATS)
def test_results_have_the_dtype_of_the_session(served: Served, dtype: Any) -> None:
    model = served.models["bert"]
    (ids,) = ids_of(6)
    with served.device("bert", dtype=dtype) as device:
        result = encode(device, [embed(model, ids).astype(wire.DTYPES[dtype])], "hidden").result
    assert result.dtype == wire.DTYPES[dtype]
    close(result.astype(np.float32), whole(model, ids, "hidden"), 0.05)


def test_more_positions_than_one_forward_takes_are_encoded_all_the_same(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "MOST_POSITIONS", 40)
    model, ids = served.models["bert"], ids_of(*[9, 4, 30, 2] * 8)
    with served.device("bert") as device:
        result = encode(device, [embed(model, each) for each in ids], "hidden").result
    close(result, np.concatenate([whole(model, each, "hidden") for each in ids]))


# --- groups ---

several_lengths = st.lists(st.integers(1, 600), min_size=1, max_size=200)


@given(several_lengths)
def test_every_sequence_is_in_one_group(lengths: list[int]) -> None:
    assert sorted(at for group in groups(lengths, MOST_POSITIONS) for at in group) == list(range(len(lengths)))


@given(several_lengths)
def test_no_group_is_more_than_half_padding_or_larger_than_a_forward_may_be(lengths: list[int]) -> None:
    for group in groups(lengths, MOST_POSITIONS):
        padded = len(group) * max(lengths[at] for at in group)
        assert padded <= 2 * sum(lengths[at] for at in group)
        assert padded <= MOST_POSITIONS or len(group) == 1


def test_sequences_of_one_length_share_a_forward() -> None:
    assert list(groups([7] * 20)) == [list(range(20))]


# --- what does not fit ---

ROWS = np.random.default_rng(3).normal(size=(6, WIDTH)).astype(np.float32)


def refused(served: Served, name: str, message: wire.Message) -> wire.Error:
    """The Error for a request, from a session that then goes on."""
    with served.device(name) as device:
        device.seq = 1
        error = device.ask(message)
        assert isinstance(error, wire.Error) and (error.seq, error.kv_length) == (1, 0), error
        assert isinstance(encode(device, [ROWS], "hidden"), wire.Encoded)
    return error


def encoding(
    embeddings: np.ndarray = ROWS, lengths: tuple[int, ...] | None = None, want: Any = "hidden"
) -> wire.Encode:
    return wire.Encode(seq=1, lengths=lengths or (len(embeddings),), want=want, tensors=(embeddings,))


@pytest.mark.parametrize(
    ("name", "want"),
    [(n, want) for n in MODELS for want in ("pooled", "logits", "store") if want not in WANTS[n]],
)
def test_a_result_that_the_model_does_not_have_is_unsupported(served: Served, name: str, want: str) -> None:
    error = refused(served, name, encoding(want=want))
    assert error.code == "unsupported"
    assert want in error.message and all(other in error.message for other in WANTS[name])


@pytest.mark.parametrize("kind", ["text", "image"])
def test_an_encoder_takes_no_append(served: Served, kind: Any) -> None:
    error = refused(served, "bert", wire.Append(seq=1, keep=0, rows=0, kind=kind, tensors=(ROWS,)))
    assert (error.code, f"seen an Append of {kind}" in error.message) == ("unsupported", True)


LONG = np.ones((POSITIONS + 1, WIDTH), np.float32)
BAD = {
    "too long": (encoding(LONG), "too_large", f"lengths: seen {POSITIONS + 1}, wanted at most {POSITIONS}"),
    "one too long": (
        encoding(LONG.repeat(2, 0), (2, POSITIONS + 1, POSITIONS - 1)),
        "too_large",
        f"lengths: seen {POSITIONS + 1}, wanted at most {POSITIONS}",
    ),
    "too narrow": (encoding(ROWS[:, 1:]), "bad_request", "embeddings: seen width 23, wanted 24"),
    "too wide": (encoding(np.ones((6, WIDTH + 1), np.float32)), "bad_request", "embeddings: seen width 25, wanted 24"),
    "another dtype": (encoding(ROWS.astype(np.float16)), "bad_request", "embeddings: seen float16, wanted float32"),
    "not the sum": (encoding(lengths=(2, 3)), "bad_request", "lengths: seen a sum of 5, wanted 6"),
    "an empty one": (encoding(lengths=(6, 0)), "bad_request", "none 0"),
    "NaN": (encoding(np.full_like(ROWS, np.nan)), "not_finite", "embeddings: seen NaN"),
}


@pytest.mark.parametrize(("message", "code", "text"), BAD.values(), ids=BAD)
def test_an_encode_that_does_not_fit_gets_this_error(served: Served, message: Any, code: str, text: str) -> None:
    error = refused(served, "bert", message)
    assert error.code == code and text in error.message


def test_a_result_longer_than_a_frame_may_be_is_too_large(tmp_path: Path) -> None:
    model = randomised(BertForSequenceClassification(BertConfig(**SIZES | {"num_labels": 2000})))
    save(model, tmp_path / "classes")
    with (
        run_cloud(tmp_path / "classes", limits=Limits(max_frame=5 * 2000 * 4)) as cloud,
        Device(cloud.url, open_of(tmp_path / "classes")) as device,
    ):
        assert encode(device, [row[None] for row in ROWS[:5]], "logits").result.shape == (5, 2000)
        error = encode(device, [row[None] for row in ROWS], "logits")
    assert (error.code, error.message) == ("too_large", "result: seen 48000 bytes, wanted at most 40000")


def test_sessions_do_not_mix(served: Served) -> None:
    model, (mine, others) = served.models["bert"], ids_of(11, 8)
    with served.device("bert") as device, served.device("bert") as other:
        for asker, ids in ((device, mine), (other, others)):
            asker.send(asker.encode(embed(model, ids), [len(ids)], want="hidden"))
        close(other.receive().result, whole(model, others, "hidden"))
        close(device.receive().result, whole(model, mine, "hidden"))


# --- the engine ---


def test_values_that_are_not_finite_are_a_failure(tmp_path: Path) -> None:
    model = stock("bert")
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.weight[3] = torch.nan
    engine = open_context(save(model, tmp_path / "bert") / "cloud", device="cpu")[1]
    (outcome,) = engine.run([EncodeWork(engine.new_cache(), ROWS, (6,), "hidden", "float32")])
    assert isinstance(outcome, RequestError) and outcome.code == "internal"


def test_a_shorter_context_can_be_asked_for(tmp_path: Path) -> None:
    folder = save(stock("roberta"), tmp_path / "roberta") / "cloud"
    assert open_context(folder, device="cpu", context=12)[1].context == 12
    assert open_context(folder, device="cpu", context=POSITIONS)[1].context == POSITIONS - 2


def test_results_come_in_the_order_of_the_sequences(tmp_path: Path) -> None:
    engine = open_context(save(stock("bert"), tmp_path / "bert") / "cloud", device="cpu")[1]
    cache = engine.new_cache()
    (forwards,) = engine.run([EncodeWork(cache, ROWS, (3, 1, 2), "pooled", "float32")])
    (backwards,) = engine.run([EncodeWork(cache, ROWS[[4, 5, 3, 0, 1, 2]], (2, 1, 3), "pooled", "float32")])
    assert isinstance(forwards, EncodedRows) and isinstance(backwards, EncodedRows)
    close(backwards.result, forwards.result[::-1], 1e-5)
