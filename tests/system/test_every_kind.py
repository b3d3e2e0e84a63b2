"""Every family through the whole system: exported, served on a real socket, used by the device, and compared with the
stock model run whole on plain text and pixels. Weights are random, every tensor of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, BertConfig, BertModel

from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.encoder import Encoder
from export.bundle import export_model
from export.families import family_of
from export.scheme import SchemeName
from shared.errors import UsageError
from shared.levels import SCHEMES
from tests.checkpoints import ENCODER, EVERY, make_checkpoint
from tests.conftest import open_assistant, run_cloud

TEXTS = ["the cat sat on the mat", "rain", "then all of them went home together, and the dog sang in the rain"]
TOLERANCE = 1e-3  # of the largest value, in float32


def kinds(*wanted: str) -> list[str]:
    """The tiny checkpoints of these kinds of model."""
    return [kind for kind, config in EVERY.items() if family_of(config).kind in wanted]


every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture
def stock(tiny_checkpoints: Callable[[str], Path]) -> Callable[[str], Any]:
    """The stock model of a tiny checkpoint, as transformers loads it."""

    def load(kind: str) -> Any:
        folder = tiny_checkpoints(kind)
        name = family_of(config := AutoConfig.from_pretrained(folder)).served_class(config)
        return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()

    return load


def check(seen: Any, expected: torch.Tensor) -> None:
    """The same values within the tolerance, and the same greatest entry of every row."""
    wanted = expected.numpy().reshape(-1, expected.shape[-1])
    rows = np.asarray(seen).reshape(wanted.shape)
    assert np.abs(rows - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    assert (rows.argmax(-1) == wanted.argmax(-1)).all()


def full_rows(assistant: Assistant, ids: list[int], rows: int, source: list[int] | None = None) -> np.ndarray:
    """The logits [rows, vocab_size] that the device reveals behind the last ids."""
    found = assistant._connection.rows(ids, rows=rows, top_k=0, source=source)
    return np.stack([row.values for row in found])


@every_scheme
@pytest.mark.parametrize("kind", kinds("decoder"))
@torch.inference_mode()
def test_a_decoder_answers_as_the_stock_model(
    kind: str, scheme: SchemeName, stock: Callable[[str], Any], tiny_exports: Callable[..., Path]
) -> None:
    model, out = stock(kind), tiny_exports(kind, scheme)
    prompt = [5, 17, 300, 41, 8, 250, 99, 3, 120, 77, 64]
    greedy = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = model(greedy).logits[0]
    with run_cloud(out) as cloud, open_assistant(out, cloud.url) as assistant:
        ids = list(prompt)
        for _ in range(20):
            [row] = assistant._connection.rows(ids, top_k=16)
            ids.append(int(row.ids[row.values.argmax()]))
        assert ids == greedy[0].tolist()
        check(full_rows(assistant, ids, 8), expected[-8:])


@every_scheme
@pytest.mark.parametrize("kind", kinds("encoder"))
@torch.inference_mode()
def test_an_encoder_gives_the_stock_model_s_states_and_classes(
    kind: str, scheme: SchemeName, stock: Callable[[str], Any], tiny_exports: Callable[..., Path]
) -> None:
    model, out = stock(kind), tiny_exports(kind, scheme)
    bundle = Bundle.open(out / "device")
    ids = [torch.tensor([[*bundle.manifest.prefix_ids, *bundle.tokenizer.encode(text)]]) for text in TEXTS]
    with run_cloud(out) as cloud, Encoder(bundle, Address(cloud.url)) as encoder:
        hidden = encoder.hidden(TEXTS)
        for states, one in zip(hidden, ids, strict=True):
            check(states, model.base_model(one).last_hidden_state[0])
        if "pooled" in bundle.manifest.outputs:
            check(encoder.pooled(TEXTS), torch.cat([model.base_model(one).pooler_output for one in ids]))
        if "logits" in bundle.manifest.outputs:
            expected = torch.cat([model(one).logits for one in ids]).softmax(-1)
            labels = list(model.config.id2label.values())
            for predictions, row in zip(encoder.classify(TEXTS), expected, strict=True):
                by_label = {prediction.label: prediction.probability for prediction in predictions}
                check([by_label[label] for label in labels], row[None])


@torch.inference_mode()
def test_a_masked_language_model_gives_hidden_states_and_no_pooled_vectors(tmp_path: Path) -> None:
    # Such checkpoints lack the pooler that the class of encoders has.
    config = BertConfig(**ENCODER, architectures=["BertForMaskedLM"])
    checkpoint, out = make_checkpoint(tmp_path / "bert", config), tmp_path / "out"
    export_model(str(checkpoint), out)
    model = BertModel.from_pretrained(checkpoint).eval()
    with run_cloud(out) as cloud, Encoder.open(out / "device", cloud.url) as encoder:
        ids = torch.tensor([encoder.bundle.tokenizer.encode(TEXTS[0])])
        check(encoder.hidden(TEXTS[:1])[0], model(ids).last_hidden_state[0])
        with pytest.raises(
            UsageError, match=r"pooled: seen a model without, wanted one of what it gives: \['hidden'\]"
        ):
            encoder.pooled(TEXTS)


def photographs(folder: Path) -> list[Path]:
    """Three images of other sizes and shapes, in a format that loses nothing."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(24, 24), (50, 31), (19, 77)]):
        small = generator.integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(small).resize((width, height)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def stock_pixels(checkpoint: Path, images: list[Path]) -> torch.Tensor:
    """What the stock image processor makes of files."""
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    pixels: torch.Tensor = processor([Image.open(path) for path in images], return_tensors="pt").pixel_values
    return pixels


@every_scheme
@torch.inference_mode()
def test_images_have_the_stock_model_s_classes(
    scheme: SchemeName,
    stock: Callable[[str], Any],
    tiny_checkpoints: Callable[[str], Path],
    tiny_exports: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model, out, images = stock("vit"), tiny_exports("vit", scheme), photographs(tmp_path / "images")
    expected = model(stock_pixels(tiny_checkpoints("vit"), images)).logits.softmax(-1)
    with run_cloud(out) as cloud, Encoder.open(out / "device", cloud.url) as encoder:
        for predictions, row in zip(encoder.classify_images(images), expected, strict=True):
            by_label = {prediction.label: prediction.probability for prediction in predictions}
            check([by_label[label] for label in model.config.id2label.values()], row[None])


@every_scheme
@torch.inference_mode()
def test_text_and_images_interleave_as_in_the_stock_model(
    scheme: SchemeName,
    stock: Callable[[str], Any],
    tiny_checkpoints: Callable[[str], Path],
    tiny_exports: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model, out, images = stock("llava"), tiny_exports("llava", scheme), photographs(tmp_path / "images")[1:]
    pixels = stock_pixels(tiny_checkpoints("llava"), images)
    with run_cloud(out) as cloud, open_assistant(out, cloud.url) as assistant:
        bundle, session = assistant.bundle, assistant._connection.session
        image = bundle.manifest.image
        assert image is not None
        numbers = [session.add_image(bundle.look(path)) for path in images]
        text = [[5, 17, 300], [41, 8], [250, 99, 120, 77]]

        def sequence(stands_for: list[int]) -> list[int]:
            first, second = ([number] * image.tokens for number in stands_for)
            return [*text[0], *first, *text[1], *second, *text[2]]

        ids = torch.tensor([sequence([image.token_id] * 2)])
        greedy = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # the placeholder is the padding's token too
            pixel_values=pixels,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        expected = model(ids, pixel_values=pixels).logits[0]
        seen = sequence(numbers)
        check(full_rows(assistant, seen, 4), expected[-4:])
        answer = greedy[0, ids.shape[1] :].tolist()
        for token in answer:
            [row] = assistant._connection.rows(seen, top_k=16)
            assert int(row.ids[row.values.argmax()]) == token
            seen.append(token)


@every_scheme
@torch.inference_mode()
def test_a_translation_is_the_stock_model_s(
    scheme: SchemeName, stock: Callable[[str], Any], tiny_exports: Callable[..., Path]
) -> None:
    model, out = stock("marian"), tiny_exports("marian", scheme)
    with run_cloud(out) as cloud, open_assistant(out, cloud.url) as assistant:
        manifest = assistant.bundle.manifest
        for text in TEXTS:  # a new source each time
            source = [*manifest.prefix_ids, *assistant.bundle.tokenizer.encode(text), *manifest.suffix_ids]
            greedy = model.generate(
                torch.tensor([source]), max_new_tokens=16, do_sample=False, num_beams=1, eos_token_id=None,
                forced_eos_token_id=None,
            )[0].tolist()  # fmt: skip
            expected = model(torch.tensor([source]), decoder_input_ids=torch.tensor([greedy])).logits[0]
            check(full_rows(assistant, greedy, 6, source), expected[-6:])
            ends = next((at for at, token in enumerate(greedy[1:], 1) if token in manifest.end_ids), len(greedy) - 1)
            assert assistant.translate(text, max_tokens=16).finish().ids == greedy[1 : ends + 1]
