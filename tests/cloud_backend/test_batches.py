"""One forward of many sessions: each gets what the stock model says of its sequence alone, whatever the others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud_backend.kv_cache import PAGE
from cloud_backend.step import MOST_TOGETHER
from shared.errors import RequestError
from tests.checkpoints import ALL
from tests.cloud_backend.batches import Model, Sequence, run

DECODERS = [kind for kind, config in ALL.items() if config.architectures is None]
LAYER_NORM = ["gpt2", "opt", "phi"]  # huge values become NaN in them; RMSNorm makes zeros of those
LARGE = 3e38


@pytest.fixture(scope="module")
def models() -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def model(kind: str) -> Model:
        if kind not in made:
            made[kind] = Model(kind)
        return made[kind]

    return model


# --- alone and beside others ---

# Of each session: positions held before, new embeddings, and what is asked of them.
MIXED: list[tuple[int, int, dict[str, Any]]] = [
    (0, 1, {}),
    (1, 1, {"top_k": 8, "temperature": 0.7}),
    (PAGE - 1, 1, {"want": "hidden"}),
    (PAGE, 1, {"top_k": 4, "dtype": "bfloat16"}),
    (PAGE + 1, 1, {"dtype": "float16", "temperature": 1.3}),
    (45, 1, {"top_k": 1}),
    (3, 5, {"rows": 5, "top_k": 8}),
    (40, 5, {"rows": 2, "temperature": 2.0}),
    (20, 5, {"rows": 0}),
    (0, MOST_TOGETHER, {"rows": 3, "want": "hidden", "dtype": "bfloat16"}),
    (7, MOST_TOGETHER + 1, {"rows": 4}),
    (0, 40, {"rows": 40, "top_k": 2}),
    (9, 33, {"rows": 0}),
    (30, 2, {"cut": 9, "rows": 2}),
    (30, 20, {"cut": 30}),
]


@pytest.mark.parametrize("kind", DECODERS)
def test_each_of_a_mixed_batch_gets_what_the_stock_model_says_of_it_alone(
    models: Callable[[str], Model], kind: str
) -> None:
    model = models(kind)
    sequences = [Sequence(model, seed) for seed in range(len(MIXED))]
    before = [(one, held) for one, (held, _, _) in zip(sequences, MIXED, strict=True) if held]
    # In halves, so that pages of the sessions lie between each other.
    for half in ([(one, -(-held // 2)) for one, held in before], [(one, held // 2) for one, held in before]):
        run(model, [one.append(count, rows=0) for one, count in half if count])
    works = [one.append(count, **fields) for one, (_, count, fields) in zip(sequences, MIXED, strict=True)]
    for one, work, outcome in zip(sequences, works, run(model, works), strict=True):
        one.check(work, outcome)
        one.cache.clear()


requests = st.tuples(
    st.integers(0, 4),  # which session
    st.integers(1, 5) | st.integers(1, 40),  # embeddings
    st.fixed_dictionaries(
        {
            "cut": st.just(0) | st.integers(0, 50),
            "rows": st.integers(0, 6),
            "want": st.sampled_from(["logits", "hidden"]),
            "top_k": st.sampled_from([0, 1, 7]),
            "temperature": st.sampled_from([1.0, 0.5, 1.7]),
        }
    ),
)


@pytest.mark.parametrize("kind", ["llama-odd-heads", "gemma2", "mistral-window"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.lists(requests, min_size=1, max_size=5, unique_by=lambda one: one[0]), max_size=6))
def test_any_steps_of_any_sessions_give_each_what_it_gets_alone(
    models: Callable[[str], Model], kind: str, steps: list[list[tuple[int, int, dict[str, Any]]]]
) -> None:
    model = models(kind)
    sequences = [Sequence(model, seed) for seed in range(5)]
    for step in steps:
        chosen = [sequences[which] for which, _, _ in step]
        works = [one.append(count, **fields) for one, (_, count, fields) in zip(chosen, step, strict=True)]
        for one, work, outcome in zip(chosen, works, run(model, works), strict=True):
            one.check(work, outcome)
    for one in sequences:
        one.cache.clear()
    assert model.engine.pool.used == 0


def test_the_last_embedding_again_beside_others_gives_the_row_that_was_sent_without_a_forward() -> None:
    model = Model("llama")
    computed = rows_computed(model)
    one, other = Sequence(model, 1), Sequence(model, 2)
    first = one.append(9)
    run(model, [first])
    works = [other.append(3), replaced(first, keep=8, embeddings=first.embeddings[-1:])]
    for sequence, work, outcome in zip((other, one), works, run(model, works), strict=True):
        sequence.check(work, outcome)
    assert computed == [9, 3]


def rows_computed(model: Model) -> list[int]:
    """A list to which every forward of the model adds its rows."""
    rows: list[int] = []
    model.inside.get_decoder().layers[0].register_forward_pre_hook(
        lambda _module, states: rows.append(int(np.prod(states[0].shape[:-1])))
    )
    return rows


def replaced(work: Any, **changes: Any) -> Any:
    return type(work)(**{**vars(work), **changes})


# --- values that are not finite ---


@pytest.mark.parametrize("kind", LAYER_NORM)
def test_a_session_whose_values_overflow_fails_alone(models: Callable[[str], Model], kind: str) -> None:
    model = models(kind)
    sequences = [Sequence(model, seed) for seed in range(6)]
    run(model, [one.append(held, rows=0) for one, held in zip(sequences, (3, 20, 21, 22, 30, 40), strict=True)])
    works = [one.append(count) for one, count in zip(sequences, (1, 1, 1, 1, 4, 20), strict=True)]
    poisoned = {0, 2, 5}
    for at in poisoned:
        works[at] = replaced(works[at], embeddings=np.full_like(works[at].embeddings, LARGE))
    for at, (one, work, outcome) in enumerate(zip(sequences, works, run(model, works), strict=True)):
        if at in poisoned:
            assert isinstance(outcome, RequestError) and outcome.code == "internal"
            assert one.cache.length == work.keep
        else:
            one.check(work, outcome)
        one.cache.clear()


@pytest.mark.parametrize("kind", LAYER_NORM)
def test_a_session_goes_on_from_where_it_was_before_its_values_overflowed(
    models: Callable[[str], Model], kind: str
) -> None:
    model = models(kind)
    one, other = Sequence(model, 1), Sequence(model, 2)
    run(model, [one.append(20, rows=0), other.append(30, rows=0)])
    held = one.held
    overflowing = one.append(6)
    run(model, [replaced(overflowing, embeddings=np.full_like(overflowing.embeddings, LARGE)), other.append(1)])
    one.held = held
    works = [one.append(2), other.append(2)]
    for sequence, work, outcome in zip((one, other), works, run(model, works), strict=True):
        sequence.check(work, outcome)
        sequence.cache.clear()


def test_pages_of_a_session_that_overflowed_do_no_harm_to_the_next() -> None:
    model = Model("gpt2", kv_bytes=8 * PAGE * 3 * 2 * 48 * 4)
    pool = model.engine.pool
    assert pool.pages == 8
    culprits = [Sequence(model, seed) for seed in range(4)]
    works = [one.append(2 * PAGE, rows=0) for one in culprits]
    run(model, [replaced(work, embeddings=np.full_like(work.embeddings, LARGE)) for work in works])
    assert all(bool(tensor[:, 2 * PAGE :].isnan().any(-1).all()) for tensor in (*pool.keys[1:], *pool.values[1:]))
    for one in culprits:
        one.cache.clear()
    sequences = [Sequence(model, seed) for seed in range(1, 5)]
    lengths = (11, 19, 33, 41)  # two pairs that are read side by side, and so padded
    run(model, [one.append(length, rows=0) for one, length in zip(sequences, lengths, strict=True)])
    for count in (1, 3):
        works = [one.append(count, rows=count) for one in sequences]
        for one, work, outcome in zip(sequences, works, run(model, works), strict=True):
            one.check(work, outcome)


# --- a model that fails ---

MARK = 777.0


def fail_on_the_mark(model: Model) -> Any:
    """Makes the last layer fail where one of a step's embeddings has the mark, after others have written their keys."""
    marked = [False]

    def look(_module: Any, _inputs: Any, options: dict[str, Any]) -> None:
        marked[0] = bool((options["inputs_embeds"] == MARK).any())

    def fail(*_: Any) -> None:
        if marked[0]:
            raise RuntimeError("no memory for this one")

    body = model.inside.get_decoder()
    body.register_forward_pre_hook(look, with_kwargs=True)
    body.layers[-1].register_forward_pre_hook(fail)
    return body


@pytest.mark.parametrize("culprit", [0, 1, 2, 3])
def test_a_request_that_the_model_fails_on_fails_alone(culprit: int) -> None:
    model = Model("llama")
    fail_on_the_mark(model)
    sequences = [Sequence(model, seed) for seed in range(4)]
    run(model, [one.append(held, rows=0) for one, held in zip(sequences, (8, 9, 10, 33), strict=True)])
    works = [one.append(count, cut=2, rows=2) for one, count in zip(sequences, (1, 3, 20, 3), strict=True)]
    works[culprit].embeddings[0, 0] = MARK
    for at, (one, work, outcome) in enumerate(zip(sequences, works, run(model, works), strict=True)):
        if at == culprit:
            assert isinstance(outcome, RequestError) and (outcome.code, one.cache.length) == ("internal", work.keep)
        else:
            one.check(work, outcome)


def test_two_requests_that_the_model_fails_on_both_fail() -> None:
    model = Model("llama")
    fail_on_the_mark(model)
    sequences = [Sequence(model, seed) for seed in range(3)]
    works = [one.append(3) for one in sequences]
    for at in (0, 2):
        works[at].embeddings[0, 0] = MARK
    outcomes = run(model, works)
    assert [isinstance(outcome, RequestError) for outcome in outcomes] == [True, False, True]
    sequences[1].check(works[1], outcomes[1])


# --- what is computed ---


def test_a_batch_is_one_forward_without_padding() -> None:
    model = Model("llama")
    computed = rows_computed(model)
    run(model, [Sequence(model, at).append(count) for at, count in enumerate((1, 1, 4, 30))])
    assert computed == [36]
