"""Answers that a grammar constrains: they are of its form, and what masking the full distribution would give."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator as Validator
from transformers import LlamaConfig

from device_app import decoding
from device_app.answer import Answer
from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address, Connection
from device_app.drafting import Drafting
from device_app.grammar import Constraint
from device_app.sampler import Row, Sampling, uniform
from device_app.session import Session
from export.bundle import export_model
from tests.checkpoints import SIZES, make_checkpoint
from tests.conftest import open_assistant, run_cloud
from tests.device_app.test_sampler import reference
from tests.schemas import Schema, random_schema

SAMPLINGS = (
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1),
    Sampling(temperature=1.3, min_p=0.02, frequency_penalty=0.3, presence_penalty=0.2),
    Sampling(temperature=1.0, top_k=12, logit_bias={4: -100.0, 30: 2.0, 95: 1.5}),
)
MESSAGES = [{"role": "user", "content": "the cat sat on the mat"}]

FullRows = Callable[[Sequence[int], int, float], list[Row]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with room for long answers."""
    folder = tmp_path_factory.mktemp("constrained")
    make_checkpoint(folder / "checkpoint", LlamaConfig(**SIZES | {"max_position_embeddings": 2048}))
    export_model(str(folder / "checkpoint"), folder / "export", name="tiny")
    return folder / "export"


@pytest.fixture(scope="module")
def assistant(export: Path) -> Iterator[Assistant]:
    with run_cloud(export) as cloud, open_assistant(export, cloud.url) as assistant:
        yield assistant


@contextmanager
def full(export: Path) -> Iterator[FullRows]:
    """Gives the full distributions behind the last ids of a sequence, from a session of its own."""
    bundle = Bundle.open(export / "device")
    manifest = bundle.manifest
    with run_cloud(export) as cloud:
        session = Session(
            bundle.key, bundle.embed, served_name=manifest.served_name, context=manifest.context, widths=bundle.widths
        )
        connection = Connection(session, Address(cloud.url))

        def rows(ids: Sequence[int], last: int, temperature: float) -> list[Row]:
            connection.open()
            given: list[Row] = []
            while len(given) < last:
                now = min(session.most_rows(0), last - len(given))
                upto = list(ids[: len(ids) - last + len(given) + now])
                given += connection.rows(upto, rows=now, top_k=0, temperature=temperature)
            return given

        yield rows
        connection.close()


@pytest.fixture(scope="module")
def full_rows(export: Path) -> Iterator[FullRows]:
    with full(export) as rows:
        yield rows


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a real vocabulary, a row has a small part of it."""
    monkeypatch.setattr(decoding, "TOP_K", 16)


def masked(
    assistant: Assistant, full_rows: FullRows, answer: Answer, constraint: Constraint, sampling: Sampling
) -> list[int]:
    """What the full distributions give where all that is not allowed is masked, token by token."""
    prompt = assistant.prompt(MESSAGES).ids
    chosen: list[int] = []
    rows = full_rows([*prompt, *answer.ids[:-1]], len(answer.ids), sampling.temperature or 1.0)
    for row, token in zip(rows, answer.ids, strict=True):
        u = uniform(sampling.seed, len(prompt) + len(chosen))
        chosen.append(reference(row.values, sampling, set(prompt), chosen, constraint.allowed(), u))
        if chosen[-1] != token:
            break
        constraint.advance(token)
    return chosen


def check(assistant: Assistant, full_rows: FullRows, schema: Schema, sampling: Sampling) -> Answer:
    grammar = assistant.bundle.grammar
    answer = assistant.chat(
        MESSAGES, sampling=sampling, max_tokens=1500, constraint=grammar.json_schema(schema)
    ).finish()
    assert answer.finish_reason == "stop"
    Validator(schema, format_checker=Validator.FORMAT_CHECKER).validate(json.loads(answer.text))
    assert masked(assistant, full_rows, answer, grammar.json_schema(schema), sampling) == answer.ids
    return answer


NUMBERS = [pytest.param(number, marks=pytest.mark.slow if number >= 25 else ()) for number in range(200)]


@pytest.mark.parametrize("number", NUMBERS)
def test_json_of_a_random_schema_validates_and_is_what_masking_the_full_distribution_gives(
    few_rows: None, assistant: Assistant, full_rows: FullRows, number: int
) -> None:
    schema = random_schema(np.random.default_rng([6, number]))
    check(assistant, full_rows, schema, replace(SAMPLINGS[number % len(SAMPLINGS)], seed=number))


def test_what_a_schema_leaves_no_choice_of_takes_no_round_trip(assistant: Assistant) -> None:
    constraint = assistant.bundle.grammar.json_schema({"const": {"the cat": ["sat", True]}})
    answer = assistant.chat(MESSAGES, constraint=constraint).finish()
    assert (answer.text, answer.finish_reason) == ('{"the cat": ["sat", true]}', "stop")
    assert answer.stats.counters.round_trips == 0


@pytest.mark.parametrize("number", range(3))
def test_neither_drafts_nor_log_probabilities_change_a_constrained_answer(
    few_rows: None, export: Path, assistant: Assistant, number: int
) -> None:
    schema, sampling = random_schema(np.random.default_rng([7, number])), replace(SAMPLINGS[number], seed=number)
    grammar = assistant.bundle.grammar
    options: dict[str, Any] = {"sampling": sampling, "max_tokens": 1500}
    answer = assistant.chat(MESSAGES, constraint=grammar.json_schema(schema), **options).finish()
    with_logprobs = assistant.chat(MESSAGES, constraint=grammar.json_schema(schema), top_logprobs=3, **options).finish()
    with run_cloud(export) as cloud, open_assistant(export, cloud.url, drafting=Drafting(most=0)) as plain:
        undrafted = plain.chat(MESSAGES, constraint=grammar.json_schema(schema), **options).finish()
    assert answer.ids == with_logprobs.ids == undrafted.ids
    assert [one.id for one in with_logprobs.logprobs] == answer.ids
    assert all(one.logprob < 0 and len(one.top) == 3 for one in with_logprobs.logprobs)


def test_an_answer_that_its_length_ends_is_the_beginning_of_one_that_validates(assistant: Assistant) -> None:
    grammar = assistant.bundle.grammar
    options: dict[str, Any] = {"sampling": Sampling(temperature=1.0, seed=2)}
    schema = random_schema(np.random.default_rng([7, 0]))
    whole = assistant.chat(MESSAGES, constraint=grammar.json_schema(schema), max_tokens=1500, **options).finish()
    cut = assistant.chat(MESSAGES, constraint=grammar.json_schema(schema), max_tokens=5, **options).finish()
    assert cut.finish_reason == "length" and cut.ids == whole.ids[:5]


def test_a_real_model_answers_in_json_that_a_schema_describes(smollm2: Path) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "legs": {"type": "integer", "minimum": 0, "maximum": 8},
            "sounds": {"type": "array", "items": {"enum": ["meow", "purr", "bark"]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["name", "legs", "sounds"],
        "additionalProperties": False,
    }
    with run_cloud(smollm2) as cloud, open_assistant(smollm2, cloud.url) as assistant, full(smollm2) as full_rows:
        for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.95, seed=1)):
            answer = check(assistant, full_rows, schema, sampling)
            assert answer.stats.counters.round_trips < answer.stats.tokens * 0.6
