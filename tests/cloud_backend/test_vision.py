"""Images, served on loopback: image encoders, and a decoder that is given images between texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from cloud_backend.engine import AppendWork, EncodedRows, EncodeWork, Engine, LogitRows
from cloud_backend.opening import open_context
from shared import wire
from shared.errors import BundleError, RequestError
from tests.cloud_backend.device import Device, close, encode, open_of
from tests.cloud_backend.folders import randomised, save_cloud
from tests.conftest import RunningCloud, run_cloud

WIDTH, SIDE, CLASSES = 24, 12, 7  # of the encoder; pixels
ROWS = (SIDE // 4) ** 2 + 1  # patches and the class token
HIDDEN, VOCAB, CONTEXT, IMAGE = 32, 60, 64, 5  # of the decoder; IMAGE stands for one patch of an image
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 4,
}
TEXT = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
)
LLAVA = {  # each: how patches are chosen, and how many positions an image then takes
    "llava": ({"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}, ROWS - 1),
    "llava-full": ({"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, ROWS),
    "llava-layers": ({"vision_feature_layer": [1, -1], "vision_feature_select_strategy": "default"}, ROWS - 1),
}
every_llava = pytest.mark.parametrize("name", LLAVA)


@dataclass
class Served:
    """The stock models by name, and one cloud that serves them all."""

    models: dict[str, Any]
    folder: Path
    cloud: RunningCloud

    def device(self, name: str) -> Device:
        return Device(self.cloud.url, open_of(self.folder / name))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vision")
    vit = ViTConfig(**TOWER, num_labels=CLASSES)
    models = {"vit": randomised(ViTModel(vit)), "vit-classifier": randomised(ViTForImageClassification(vit))}
    models |= {name: llava(**config) for name, (config, _) in LLAVA.items()}
    for name, model in models.items():
        save(model, folder / name)
    with run_cloud(*(folder / name for name in models)) as cloud:
        yield Served(models, folder, cloud)


def llava(**config: Any) -> Any:
    tower = config.pop("vision_config", None) or CLIPVisionConfig(**TOWER)
    return randomised(
        LlavaForConditionalGeneration(
            LlavaConfig(vision_config=tower, text_config=TEXT, image_token_index=IMAGE, **config)
        )
    )


def save(model: Any, out: Path) -> Path:
    """The cloud's half: devices embed patches and words."""
    kind = "vision-decoder" if isinstance(model, LlavaForConditionalGeneration) else "image-encoder"
    embedding = ("embed_tokens", "vision_tower.embeddings.", "vit.embeddings.")
    absent = [name for name in model.state_dict() if name.startswith("embeddings.") or any(map(name.count, embedding))]
    return save_cloud(model, out, kind, absent=absent)


def image(seed: int) -> torch.Tensor:
    """Pixels [1, 3, SIDE, SIDE]."""
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def patches(model: Any, pixels: torch.Tensor) -> np.ndarray:
    """What a device sends for an image [ROWS, WIDTH]."""
    embeds = model.model.vision_tower if isinstance(model, LlavaForConditionalGeneration) else model.base_model
    return np.asarray(embeds.embeddings(pixels)[0])


# --- image encoders ---


@pytest.mark.parametrize(
    ("name", "want"), [("vit", "hidden"), ("vit-classifier", "hidden"), ("vit-classifier", "logits")]
)
@torch.inference_mode()
def test_each_image_of_several_is_what_the_stock_model_makes_of_its_pixels(
    served: Served, name: str, want: str
) -> None:
    model, images = served.models[name], [image(seed) for seed in range(3)]
    with served.device(name) as device:
        result = encode(device, [patches(model, pixels) for pixels in images], want).result
    if want == "logits":
        expected = [model(pixel_values=pixels).logits for pixels in images]
    else:
        expected = [model.base_model(pixel_values=pixels).last_hidden_state[0] for pixels in images]
    close(result, torch.cat(expected).numpy())


@pytest.mark.parametrize(("name", "classes"), [("vit", 0), ("vit-classifier", CLASSES)])
def test_opened_says_what_an_image_encoder_is(served: Served, name: str, classes: int) -> None:
    with served.device(name) as device:
        opened = device.opened
    assert (opened.hidden_size, opened.vocab_size, opened.context) == (WIDTH, classes, ROWS)
    assert (opened.encoder_size, opened.encoder_context, opened.image_tokens) == (0, 0, 0)


@pytest.mark.parametrize(("name", "want"), [("vit", "pooled"), ("vit", "logits"), ("vit-classifier", "pooled")])
def test_what_an_image_encoder_does_not_give_is_unsupported(served: Served, name: str, want: str) -> None:
    with served.device(name) as device:
        error = encode(device, [patches(served.models[name], image(0))], want)
    assert (error.code, want in error.message) == ("unsupported", True)


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS + 1])
def test_an_image_of_another_length_is_a_bad_request(served: Served, rows: int) -> None:
    good = patches(served.models["vit"], image(0))
    with served.device("vit") as device:
        error = encode(device, [good, np.ones((rows, WIDTH), np.float32)], "hidden")
        assert (error.code, error.message) == ("bad_request", f"lengths: seen {rows}, wanted an image's {ROWS}")
        assert isinstance(encode(device, [good], "hidden"), wire.Encoded)


# --- a decoder that is given images ---

Piece = list[int] | torch.Tensor  # ids, or an image's pixels


@torch.inference_mode()
def whole(model: Any, *pieces: Piece) -> np.ndarray:
    """The stock model's logits [positions, vocab] for texts and images, in one forward of ids and pixels."""
    tokens = ROWS - (model.config.vision_feature_select_strategy == "default")
    ids = [token for piece in pieces for token in (piece if isinstance(piece, list) else [IMAGE] * tokens)]
    images = [piece for piece in pieces if not isinstance(piece, list)]
    pixels = torch.cat(images) if images else None
    return np.asarray(model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=False).logits[0])


@torch.inference_mode()
def words(model: Any, ids: list[int]) -> np.ndarray:
    return model.get_input_embeddings().weight[ids].numpy()


def show(device: Device, keep: int, model: Any, pixels: torch.Tensor, **fields: Any) -> Any:
    """The reply to an Append of an image."""
    return device.ask(device.append(keep, patches(model, pixels), kind="image", **({"rows": 0} | fields)))


@every_llava
def test_text_images_and_text_are_what_the_stock_model_makes_of_ids_and_pixels(served: Served, name: str) -> None:
    model, (_, tokens) = served.models[name], LLAVA[name]
    before, after, last = [8, 9, 10], [11, 12], [13, 14, 15]
    with served.device(name) as device:
        device.rows(0, words(model, before))
        assert show(device, 3, model, image(1)).kv_length == 3 + tokens
        device.rows(3 + tokens, words(model, after))
        assert show(device, 5 + tokens, model, image(2)).kv_length == 5 + 2 * tokens
        rows = device.rows(5 + 2 * tokens, words(model, last), rows=3)
    close(rows, whole(model, before, image(1), after, image(2), last)[-3:])


@every_llava
def test_opened_says_how_large_an_image_is_and_what_it_takes(served: Served, name: str) -> None:
    with served.device(name) as device:
        opened = device.opened
    assert (opened.encoder_size, opened.encoder_context, opened.image_tokens) == (WIDTH, ROWS, LLAVA[name][1])
    assert (opened.hidden_size, opened.vocab_size, opened.context) == (HIDDEN, VOCAB, CONTEXT)


def test_an_image_may_come_first(served: Served) -> None:
    model = served.models["llava"]
    with served.device("llava") as device:
        show(device, 0, model, image(1))
        rows = device.rows(ROWS - 1, words(model, [8, 9]), rows=2)
    close(rows, whole(model, image(1), [8, 9])[-2:])


@pytest.mark.parametrize("keep", [0, 2, 3, 3 + 4, 3 + ROWS - 1])
def test_the_cache_can_be_cut_back_around_and_inside_an_image(served: Served, keep: int) -> None:
    model, before = served.models["llava"], [8, 9, 10]
    with served.device("llava") as device:
        device.rows(0, words(model, before))
        show(device, 3, model, image(1))
        device.rows(3 + ROWS - 1, words(model, [11, 12]))
        rows = device.rows(keep, words(model, [20, 21]), rows=2)
    if keep <= 3:
        expected = whole(model, before[:keep], [20, 21])
    else:
        # An image cut in two has no like in pixels: the stock decoder is given the positions themselves.
        with torch.inference_mode():
            features = model.get_image_features(pixel_values=image(1)).pooler_output[0].numpy()
            held = np.concatenate([words(model, before), features])[:keep]
            inputs = torch.from_numpy(np.concatenate([held, words(model, [20, 21])]))[None]
            expected = model(inputs_embeds=inputs, use_cache=False).logits[0].numpy()
    close(rows, expected[-2:])


def test_another_image_takes_the_place_of_one_that_was_cut(served: Served) -> None:
    model = served.models["llava"]
    with served.device("llava") as device:
        device.rows(0, words(model, [8, 9, 10]))
        show(device, 3, model, image(1))
        assert show(device, 3, model, image(2)).kv_length == 3 + ROWS - 1
        rows = device.rows(3 + ROWS - 1, words(model, [11]))
    close(rows, whole(model, [8, 9, 10], image(2), [11])[-1:])


def test_the_embedding_before_an_image_is_not_taken_for_the_last_one(served: Served) -> None:
    # A position that is appended again alone needs no forward; after an image it is another position.
    model = served.models["llava"]
    with served.device("llava") as device:
        device.rows(0, words(model, [8, 9]))
        show(device, 2, model, image(1))
        rows = device.rows(2 + ROWS - 2, words(model, [9]))
    with torch.inference_mode():
        features = model.get_image_features(pixel_values=image(1)).pooler_output[0][:-1].numpy()
        inputs = torch.from_numpy(np.concatenate([words(model, [8, 9]), features, words(model, [9])]))[None]
        close(rows, model(inputs_embeds=inputs, use_cache=False).logits[0, -1:].numpy())


def test_a_session_does_not_see_the_image_of_another(served: Served) -> None:
    model = served.models["llava"]
    with served.device("llava") as device, served.device("llava") as other:
        for asker, seed in ((device, 1), (other, 2)):
            asker.rows(0, words(model, [8]))
            show(asker, 1, model, image(seed))
        rows = [asker.rows(ROWS, words(model, [9])) for asker in (device, other)]
    for seed, row in zip((1, 2), rows, strict=True):
        close(row, whole(model, [8], image(seed), [9])[-1:])


def test_an_image_is_a_request_to_build_on(served: Served) -> None:
    model = served.models["llava"]
    with served.device("llava") as device:
        device.send(device.append(0, patches(model, image(1)), kind="image", rows=0))
        device.send(device.append(ROWS - 1, words(model, [9]), after=device.seq, top_k=0))
        shown, answered = device.receive(), device.receive()
    assert isinstance(shown, wire.Logits) and shown.values.shape[0] == 0
    close(answered.values, whole(model, image(1), [9])[-1:])


GOOD = np.random.default_rng(4).normal(size=(ROWS, WIDTH)).astype(np.float32)
BAD = {
    "too few rows": ({"tensors": (GOOD[1:],)}, "bad_request", f"seen {ROWS - 1} rows, wanted an image's {ROWS}"),
    "too many rows": ({"tensors": (np.repeat(GOOD, 2, 0),)}, "bad_request", f"seen {2 * ROWS} rows"),
    "of the decoder's width": (
        {"tensors": (np.ones((ROWS, HIDDEN), np.float32),)},
        "bad_request",
        f"seen width {HIDDEN}, wanted {WIDTH}",
    ),
    "text of the image's width": ({"kind": "text"}, "bad_request", f"seen width {WIDTH}, wanted {HIDDEN}"),
    "another dtype": ({"tensors": (GOOD.astype(np.float16),)}, "bad_request", "seen float16, wanted float32"),
    "an answer wanted": ({"rows": 1}, "bad_request", "rows: seen 1, wanted 0 of an image"),
    "infinity": ({"tensors": (np.full_like(GOOD, np.inf),)}, "not_finite", "NaN or infinity"),
    "beyond the cache": ({"keep": 4}, "out_of_step", "keep: seen 4, wanted at most the KV length 3"),
    "after nothing": ({"after": 77}, "out_of_step", "after: seen 77"),
}


@pytest.mark.parametrize(("fields", "code", "text"), BAD.values(), ids=BAD)
def test_an_image_that_does_not_fit_gets_this_error_and_changes_nothing(
    served: Served, fields: dict[str, Any], code: str, text: str
) -> None:
    model = served.models["llava"]
    image_fields = {"seq": 5, "keep": 3, "rows": 0, "kind": "image", "tensors": (GOOD,)}
    with served.device("llava") as device:
        device.rows(0, words(model, [8, 9, 10]))
        error = device.ask(wire.Append(**image_fields | fields))
        assert (error.code, error.seq, error.kv_length) == (code, 5, 3) and text in error.message
        device.seq = 5
        close(device.rows(3, words(model, [11])), whole(model, [8, 9, 10, 11])[-1:])


def test_an_image_counts_as_its_positions_not_as_its_patches(served: Served) -> None:
    model, most = served.models["llava"], CONTEXT // (ROWS - 1)
    with served.device("llava") as device:
        for shown in range(most):
            assert isinstance(show(device, shown * (ROWS - 1), model, image(1)), wire.Logits)
        error = show(device, most * (ROWS - 1), model, image(1))
    assert (error.code, error.kv_length) == ("context_full", most * (ROWS - 1))


def test_a_decoder_that_sees_encodes_nothing(served: Served) -> None:
    with served.device("llava") as device:
        error = encode(device, [GOOD], "store")
    assert (error.code, error.message) == (
        "unsupported",
        "want: seen an Encode of store, wanted an Append of text or image",
    )


# --- the engine ---


def see(engine: Engine, work: AppendWork) -> None:
    """Runs an image through the tower, and what that makes of it through the decoder."""
    (features,) = engine.run([work])
    assert isinstance(features, AppendWork)
    (result,) = engine.run([features])
    assert not isinstance(result, RequestError)


@pytest.mark.parametrize("count", [2, 3])
def test_images_of_several_sessions_are_seen_in_one_forward(served: Served, count: int) -> None:
    model, engine = served.models["llava"], open_context(served.folder / "llava" / "cloud", device="cpu")[1]
    towers: list[int] = []
    tower = engine._model.model.vision_tower  # type: ignore[attr-defined]
    hook = tower.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: towers.append(len(inputs[0])))
    images = [patches(model, image(seed)) for seed in range(count)]
    alone = [
        engine.run([AppendWork(engine.new_cache(), 0, one, 0, "hidden", 0, 1.0, "float32", "image")])[0]
        for one in images
    ]
    towers.clear()
    together = engine.run(
        [AppendWork(engine.new_cache(), 0, one, 0, "hidden", 0, 1.0, "float32", "image") for one in images]
    )
    hook.remove()
    assert towers == [count]
    for one, same in zip(together, alone, strict=True):
        assert isinstance(one, AppendWork) and isinstance(same, AppendWork)
        close(one.embeddings, same.embeddings, 1e-5)


@pytest.mark.parametrize("dtype", wire.FLOATS)
def test_an_image_and_text_in_any_dtype_are_close_to_the_stock_model(served: Served, dtype: Any) -> None:
    model, engine = served.models["llava"], open_context(served.folder / "llava" / "cloud", dtype=dtype)[1]
    cache, wanted = engine.new_cache(), wire.DTYPES[dtype]
    see(engine, AppendWork(cache, 0, patches(model, image(1)).astype(wanted), 0, "logits", 0, 1.0, dtype, "image"))
    (result,) = engine.run([AppendWork(cache, ROWS - 1, words(model, [8]).astype(wanted), 1, "logits", 0, 1.0, dtype)])
    assert isinstance(result, LogitRows) and result.values.dtype == wanted
    close(result.values.astype(np.float32), whole(model, image(1), [8])[-1:], 0.05)


@pytest.mark.parametrize("dtype", wire.FLOATS)
def test_an_image_encoder_computes_in_any_dtype(served: Served, dtype: Any) -> None:
    model, engine = served.models["vit"], open_context(served.folder / "vit" / "cloud", dtype=dtype)[1]
    rows = patches(model, image(1)).astype(wire.DTYPES[dtype])
    (result,) = engine.run([EncodeWork(engine.new_cache(), rows, (ROWS,), "hidden", dtype)])
    assert isinstance(result, EncodedRows)
    with torch.inference_mode():
        close(result.result.astype(np.float32), model(pixel_values=image(1)).last_hidden_state[0].numpy(), 0.05)


def test_image_features_that_are_not_finite_never_reach_the_cache(tmp_path: Path) -> None:
    model = llava()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[3] = torch.nan
    engine = open_context(save(model, tmp_path / "llava") / "cloud", device="cpu")[1]
    cache = engine.new_cache()
    (outcome,) = engine.run([AppendWork(cache, 0, GOOD, 0, "hidden", 0, 1.0, "float32", "image")])
    assert isinstance(outcome, RequestError) and (outcome.code, cache.length) == ("internal", 0)


def test_nothing_of_an_image_is_kept_as_the_last_embedding(served: Served) -> None:
    # Else a text embedding equal to its last patch would be answered with the image's state.
    engine = open_context(served.folder / "llava" / "cloud", device="cpu")[1]
    cache = engine.new_cache()
    see(engine, AppendWork(cache, 0, GOOD, 0, "hidden", 0, 1.0, "float32", "image"))
    assert (cache.length, cache.last) == (ROWS - 1, None)


def test_a_tower_that_is_not_clip_is_refused(tmp_path: Path) -> None:
    out = save(llava(vision_config=SiglipVisionConfig(**TOWER)), tmp_path / "llava")
    with pytest.raises(BundleError, match="vision tower: seen 'siglip_vision_model', wanted 'clip_vision_model'"):
        open_context(out / "cloud", device="cpu")


@pytest.mark.parametrize("name", ["vit", "llava"])
def test_the_engine_holds_nothing_that_devices_have_instead(served: Served, name: str) -> None:
    engine = open_context(served.folder / name / "cloud", device="cpu")[1]
    assert not [parameter for parameter, _ in engine._model.named_parameters() if "embed" in parameter]
