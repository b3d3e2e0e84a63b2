"""MiniLM-L6, a real encoder of sentences, through the whole system."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from device_app.bundle import Bundle
from device_app.encoder import Encoder
from examples.minilm import minilm_folder
from export.bundle import export_model
from export.hard_text import hard_text
from export.scheme import SchemeName
from shared.levels import SCHEMES
from tests.conftest import run_cloud, run_cloud_process

SENTENCES = [
    sentence
    for topic in sorted(topics)
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(topics[topic].split()))
    if 5 <= len(sentence.split()) <= 100
][::7][:200]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("minilm") / "minilm"
    export_model(str(minilm_folder()), out, name="minilm")
    return out


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """The vectors [sentences, 384] as the model's card makes them: the mean of the states, brought to length 1."""
    model, tokenizer = AutoModel.from_pretrained(minilm_folder()), AutoTokenizer.from_pretrained(minilm_folder())
    vectors = []
    with torch.inference_mode():
        for sentence in SENTENCES:
            states = model(**tokenizer(sentence, truncation=True, max_length=256, return_tensors="pt"))
            vectors.append(torch.nn.functional.normalize(states.last_hidden_state[0].mean(0), dim=0))
    return torch.stack(vectors).numpy()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_hundred_sentences_have_the_reference_s_vectors(
    scheme: SchemeName, exported: Path, reference: np.ndarray, tmp_path: Path
) -> None:
    out = exported
    if scheme != "permutation":
        out = tmp_path / "minilm"
        export_model(str(minilm_folder()), out, scheme=scheme)
    with run_cloud(out) as cloud, Encoder.open(out / "device", cloud.url) as encoder:
        vectors = encoder.embed(SENTENCES)
    assert len(vectors) == 200
    cosines = (vectors * reference).sum(-1) / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(reference, axis=-1)
    assert cosines.min() >= 0.99999
    assert np.abs(vectors - reference).max() <= 1e-5


def test_the_tokenizer_is_exact_and_the_manifest_says_which_it_is(exported: Path) -> None:
    bundle = Bundle.open(exported / "device")
    assert bundle.manifest.tokenizer == "json" and "WordPiece" in bundle.manifest.tokenizer_proof
    reference = AutoTokenizer.from_pretrained(minilm_folder())
    texts = [*hard_text([]), *SENTENCES]
    for text in texts:
        ids = [*bundle.manifest.prefix_ids, *bundle.tokenizer.encode(text), *bundle.manifest.suffix_ids]
        assert ids == reference(text, verbose=False).input_ids


def test_the_command_prints_a_vector_a_line(exported: Path, reference: np.ndarray) -> None:
    with run_cloud_process(exported / "cloud") as (url, _):
        command = [sys.executable, "-m", "device_app", "embed", exported / "device", "--url", url]
        done = subprocess.run([*command, *SENTENCES[:2]], capture_output=True, text=True, check=True)
    vectors = np.array([json.loads(line) for line in done.stdout.splitlines()])
    assert np.abs(vectors - reference[:2]).max() <= 1e-5
