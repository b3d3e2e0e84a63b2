"""The sampler: from the top rows alone it chooses what it would choose from all of them, or says that it cannot."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_app.adjustments import Allowed
from device_app.sampler import Row, Sampler, Sampling, uniform
from shared.errors import UsageError
from shared.wire import Array
from tests.thorough import examples

DRAWS_A_ROW = 20


# --- rows, as a cloud would send them ---


def made_values(shape: str, vocab: int, random: np.random.Generator) -> Array:
    """Logits [vocab] in float32, of a shape that is easy or hard to bound."""
    values = random.normal(0, 3, vocab)
    if shape == "peaked":
        values[random.integers(vocab, size=3)] += (24, 22, 20)
    elif shape == "nearly flat":
        values *= 1e-3
    elif shape == "flat":
        values[:] = values[0]
    elif shape == "many ties":
        values = np.round(values / 2)
    elif shape == "bfloat16":
        values = values.astype(ml_dtypes.bfloat16)
    elif shape == "steps":  # a few at the top, all the others tied
        values = np.where(random.random(vocab) < 20 / vocab, 4.0, -1.5)
    elif shape == "low":
        values -= 60
    elif shape == "around zero":  # where a penalty changes direction
        values = np.round(values * 2) / 16
    return values.astype(np.float32)


SHAPES = ("plain", "peaked", "nearly flat", "flat", "many ties", "bfloat16", "steps", "low", "around zero")


def log_sum_exp(values: Array, temperature: float, ulps: int = 0) -> float:
    """As a cloud computes it, in float32, and up to an ulp beside that."""
    scaled = values / np.float32(temperature or 1.0)
    top = scaled.max()
    rounded = np.float32(top + np.log(np.exp(scaled - top).sum(dtype=np.float32)))
    return float(rounded + ulps * np.spacing(np.abs(rounded)))


def full_row(values: Array, temperature: float) -> Row:
    return Row(values, np.arange(len(values)), log_sum_exp(values, temperature), log_sum_exp(values, 1.0), full=True)


def top_row(values: Array, k: int, temperature: float, random: np.random.Generator, ulps: int = 0) -> Row:
    """The top k in no order; which of several equal ones at the edge are among them is chance."""
    ids = np.lexsort((random.random(len(values)), -values))[:k]
    ids = random.permutation(ids)
    return Row(values[ids], ids, log_sum_exp(values, temperature, ulps), log_sum_exp(values, 1.0), full=False)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.05, 0.5, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 0, 1, 5, 40, 100, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.95, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 0.9, 1.1, 1.3, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -0.5, 2.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -1.0]),
    logit_bias=st.dictionaries(
        st.integers(0, 299), st.sampled_from([-100.0, -5.0, -0.1, 0.1, 2.0, 30.0, 100.0]), max_size=6
    ),
    seed=st.integers(0, 2**64 - 1),
)
plain_samplings = samplings.map(lambda one: replace(one, logit_bias={}, frequency_penalty=0.0, presence_penalty=0.0))


def made_allowed(kind: str, values: Array, random: np.random.Generator) -> Allowed | None:
    """Ids that a grammar may leave: of all kinds, likely and unlikely."""
    vocab = len(values)
    if kind == "all":
        return None
    if kind == "half":
        return random.random(vocab) < 0.5
    allowed = np.zeros(vocab, bool)
    if kind == "likely and not":
        allowed[np.argsort(-values)[: random.integers(1, 40)]] = True
    allowed[random.integers(vocab, size=random.integers(1, 6))] = True
    return allowed


ALLOWED = ("all", "all", "half", "few", "likely and not")


# --- (a) the partial row and the full one ---


@settings(max_examples=examples(800), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from(SHAPES),
    vocab=st.sampled_from([300, 311, 1000, 5000]),
    k=st.sampled_from([1, 2, 16, 64, 256, 299]),
    sampling=st.one_of(plain_samplings, samplings),
    prompt_length=st.sampled_from([0, 1, 20, 200]),
    banned=st.sets(st.integers(0, 299), max_size=4),
    kind=st.sampled_from(ALLOWED),
    made_from=st.integers(0, 2**32 - 1),
    ulps=st.sampled_from([-1, 0, 1]),
)
def test_top_rows_give_the_token_of_the_full_row_or_none(
    shape: str,
    vocab: int,
    k: int,
    sampling: Sampling,
    prompt_length: int,
    banned: set[int],
    kind: str,
    made_from: int,
    ulps: int,
) -> None:
    random = np.random.default_rng(made_from)
    values = made_values(shape, vocab, random)
    prompt = random.integers(vocab, size=prompt_length)
    if prompt_length > 1:
        prompt[: prompt_length // 2] = np.argsort(-values)[: prompt_length // 2]  # repetition is of likely ids
    sampler = Sampler(sampling, vocab, prompt.tolist(), banned)
    allowed = made_allowed(kind, values, random)
    partial, full = top_row(values, k, sampling.temperature, random, ulps), full_row(values, sampling.temperature)
    for position in range(DRAWS_A_ROW):
        token, right = sampler.choose(partial, position, allowed), sampler.choose(full, position, allowed)
        assert token is None or token == right
        if right is not None:
            sampler.observe(right)  # so that the penalties grow


@settings(max_examples=examples(300), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from(SHAPES),
    k=st.sampled_from([1, 16, 256, 999, 1000, 5000]),
    sampling=samplings,
    made_from=st.integers(0, 2**32 - 1),
)
def test_the_head_of_a_full_row_gives_its_token_or_none(shape: str, k: int, sampling: Sampling, made_from: int) -> None:
    full = full_row(made_values(shape, 1000, np.random.default_rng(made_from)), sampling.temperature)
    head, sampler = full.head(k), Sampler(sampling, 1000, [1, 2, 3])
    assert len(head.values) == len(set(head.ids.tolist())) == min(k, 1000) and head.full == (k >= 1000)
    assert np.array_equal(full.values[head.ids], head.values)
    assert head.values.min() >= np.delete(full.values, head.ids).max(initial=-np.inf)
    for position in range(DRAWS_A_ROW):
        assert sampler.choose(head, position) in (None, sampler.choose(full, position))


def test_the_order_in_which_a_row_arrives_changes_nothing() -> None:
    random = np.random.default_rng(3)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=1), 500)
    values = made_values("many ties", 500, random)
    ids = np.argsort(-values, kind="stable")[:200]
    shuffled = random.permutation(200)
    lse = log_sum_exp(values, 1.0)
    one, other = Row(values[ids], ids, lse, lse, False), Row(values[ids[shuffled]], ids[shuffled], lse, lse, False)
    assert [sampler.choose(one, at) for at in range(200)] == [sampler.choose(other, at) for at in range(200)]


@pytest.mark.parametrize("temperature", [0.01, 0.05])
@pytest.mark.parametrize("level", [30.0, 100.0])
def test_top_rows_are_right_where_logits_are_large_and_log_sum_exp_is_coarse(temperature: float, level: float) -> None:
    # float32 is right to 6e-8 of the log-sum-exp: at 3000 that is 2e-4 of the mass.
    random = np.random.default_rng(11)
    wrong = 0
    for seed in range(40):
        values = (level + random.normal(0, temperature, 2000)).astype(np.float32)
        sampler = Sampler(Sampling(temperature=temperature, seed=seed), 2000)
        partial, full = top_row(values, 1900, temperature, random), full_row(values, temperature)
        for position in range(10):
            token = sampler.choose(partial, position)
            wrong += token is not None and token != sampler.choose(full, position)
    assert wrong == 0


def test_a_penalised_peak_at_a_low_temperature_does_not_overflow() -> None:
    values = np.linspace(0, 10, 1000, dtype=np.float32)
    values[7] = 60.0
    sampling = Sampling(temperature=0.02, repetition_penalty=3.0)
    sampler = Sampler(sampling, 1000, [7])
    with np.errstate(over="raise"):
        token = sampler.choose(top_row(values, 256, 0.02, np.random.default_rng(0)), 5)
        expected = sampler.choose(full_row(values, 0.02), 5)
    assert token in (None, expected)


@pytest.mark.parametrize("lie", [-1e30, -50.0, 50.0, 700.0, 1e4, 1e30])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_a_log_sum_exp_that_is_a_lie_gives_an_id_of_the_row_or_none(lie: float, temperature: float) -> None:
    values = made_values("plain", 1000, np.random.default_rng(5))
    ids = np.argsort(-values)[:256]
    sampler = Sampler(Sampling(temperature=temperature, top_p=0.9, min_p=0.01), 1000)
    for position in range(20):
        token = sampler.choose(Row(values[ids], ids, lie, lie, False), position)
        assert token is None or token in ids


def test_a_penalty_below_one_may_lift_an_unseen_id_above_all_that_are_seen() -> None:
    values = np.full(400, 1.0, np.float32)
    values[:300] = 1.5
    sampler = Sampler(Sampling(repetition_penalty=0.5), 400, [399])
    assert sampler.choose(full_row(values, 0), 0) == 399
    assert sampler.choose(top_row(values, 300, 0, np.random.default_rng(0)), 0) is None


def test_a_penalty_above_one_may_push_all_that_are_seen_below_an_unseen_id() -> None:
    values = np.full(400, 1.0, np.float32)
    values[:300] = 1.5
    sampler = Sampler(Sampling(repetition_penalty=2.0), 400, range(300))
    assert sampler.choose(full_row(values, 0), 0) == 300
    assert sampler.choose(top_row(values, 300, 0, np.random.default_rng(0)), 0) is None


def test_greedy_leaves_a_tie_that_reaches_beyond_the_row_to_the_full_row() -> None:
    values = np.zeros(400, np.float32)
    values[100:] = 3.0  # 300 are equal, 256 arrive
    row = Row(values[120:376], np.arange(120, 376), log_sum_exp(values, 0), 0.0, False)
    sampler = Sampler(Sampling(), 400)
    assert sampler.choose(row, 0) is None
    assert sampler.choose(full_row(values, 0), 0) == 100


# --- (d) the bounds are not vacuous ---


@pytest.mark.parametrize(
    ("shape", "sampling", "most_fetched"),
    [
        ("peaked", Sampling(), 0.0),
        ("peaked", Sampling(temperature=1.0), 0.01),
        ("peaked", Sampling(temperature=1.0, top_p=0.9), 0.0),
        ("peaked", Sampling(temperature=1.5, min_p=0.05), 0.0),
        ("peaked", Sampling(temperature=0.5, top_k=50), 0.0),
        ("peaked", Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1), 0.05),
        ("peaked", Sampling(temperature=1.0, top_p=0.9, frequency_penalty=0.5, presence_penalty=0.5), 0.0),
        ("peaked", Sampling(temperature=1.0, logit_bias=dict.fromkeys(range(0, 5000, 100), -100.0)), 0.01),
        ("peaked", Sampling(temperature=1.0, logit_bias=dict.fromkeys(range(0, 5000, 100), 5.0)), 0.01),
        ("plain", Sampling(temperature=1.0, top_k=40), 0.0),
        ("plain", Sampling(temperature=0.5, top_p=0.9), 0.01),
    ],
)
def test_full_rows_are_rarely_needed_on_rows_that_have_a_peak(
    shape: str, sampling: Sampling, most_fetched: float
) -> None:
    random = np.random.default_rng(7)
    fetched = 0
    for _ in range(40):
        values = made_values(shape, 5000, random)
        sampler = Sampler(sampling, 5000, random.integers(5000, size=50).tolist())
        row = top_row(values, 256, sampling.temperature, random)
        fetched += sum(sampler.choose(row, position) is None for position in range(10))
    assert fetched <= most_fetched * 400


@pytest.mark.parametrize("kind", ["half", "likely and not"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_full_rows_are_rarely_needed_where_a_grammar_allows_likely_ids(kind: str, temperature: float) -> None:
    random = np.random.default_rng(8)
    fetched = 0
    for _ in range(40):
        values = made_values("peaked", 5000, random)
        allowed = made_allowed(kind, values, random)
        assert allowed is not None
        allowed[values.argmax()] = True
        sampler = Sampler(Sampling(temperature=temperature), 5000)
        row = top_row(values, 256, temperature, random)
        fetched += sum(sampler.choose(row, position, allowed) is None for position in range(10))
    assert fetched <= 4


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_banned_ids_and_biases_of_openais_ban_cost_no_full_rows(temperature: float) -> None:
    random = np.random.default_rng(9)
    fetched = 0
    for _ in range(40):
        values = made_values("peaked", 5000, random)
        likely = np.argsort(-values)[1:4].tolist()  # not the first
        bias = dict.fromkeys([*likely, *range(0, 5000, 97)], -100.0)
        row = top_row(values, 256, temperature, random)
        for sampler in (
            Sampler(Sampling(temperature=temperature, logit_bias=bias), 5000),
            Sampler(Sampling(temperature=temperature), 5000, banned=bias),
        ):
            chosen = [sampler.choose(row, position) for position in range(10)]
            fetched += chosen.count(None)
            assert not set(likely) & set(chosen)
    assert fetched <= 8


def test_an_id_that_was_not_sent_and_is_lifted_above_all_others_wants_the_full_row() -> None:
    values = made_values("peaked", 5000, np.random.default_rng(10))
    least = int(values.argmin())
    row, full = top_row(values, 256, 1.0, np.random.default_rng(0)), full_row(values, 1.0)
    for temperature in (0.0, 1.0):
        sampler = Sampler(Sampling(temperature=temperature, logit_bias={least: 100.0}), 5000)
        assert sampler.choose(row, 0) is None
        assert sampler.choose(full, 0) == least


def test_the_only_id_that_is_allowed_is_chosen_whatever_the_row_says() -> None:
    values = made_values("peaked", 5000, np.random.default_rng(10))
    allowed = np.zeros(5000, bool)
    allowed[values.argmin()] = True
    for temperature in (0.0, 1.0):
        sampler = Sampler(Sampling(temperature=temperature), 5000)
        assert sampler.choose(top_row(values, 16, 1.0, np.random.default_rng(0)), 0, allowed) == values.argmin()


def test_full_rows_are_needed_on_flat_ones() -> None:
    random = np.random.default_rng(7)
    values = made_values("nearly flat", 5000, random)
    sampler = Sampler(Sampling(temperature=1.0), 5000)
    row = top_row(values, 256, 1.0, random)
    chosen = [sampler.choose(row, position) for position in range(200)]
    assert chosen.count(None) > 100


# --- (b) the full row and a plain reference ---


def reference(
    values: Array, sampling: Sampling, prompt: set[int], answer: list[int], allowed: Allowed | None, u: float
) -> int:
    """PROTOCOL.md, section 8, one step after the other."""
    logits = [float(value) for value in values]
    for token in prompt.union(answer) if sampling.repetition_penalty != 1 else ():
        scale = sampling.repetition_penalty
        logits[token] = logits[token] / scale if logits[token] > 0 else logits[token] * scale
    for token in range(len(logits)):
        count, added = answer.count(token), sampling.logit_bias.get(token, 0.0)
        if count:
            added = added - sampling.presence_penalty - sampling.frequency_penalty * count
        logits[token] += added
    choosable = [token for token in range(len(logits)) if allowed is None or allowed[token]]
    kept = sorted(choosable, key=lambda token: (-logits[token], token))
    if sampling.temperature == 0:
        return kept[0]
    scaled = np.array([logits[token] for token in kept]) / sampling.temperature
    mass = [float(weight) for weight in np.exp(scaled - scaled[0])]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    if sampling.top_p < 1:
        wanted, total = sampling.top_p * sum(mass[: len(kept)]), 0.0
        for count, weight in enumerate(mass, 1):
            total += weight
            if total >= wanted:
                kept = kept[:count]
                break
    if sampling.min_p > 0:
        kept = [token for at, token in enumerate(kept) if scaled[at] >= scaled[0] + math.log(sampling.min_p)]
    wanted, total = u * sum(mass[: len(kept)]), 0.0
    for token, weight in zip(kept, mass, strict=False):
        total += weight
        if total > wanted:
            return token
    raise AssertionError("no token was reached")


@settings(max_examples=examples(250), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from(SHAPES),
    vocab=st.sampled_from([300, 700]),
    sampling=samplings,
    prompt=st.sets(st.integers(0, 299), max_size=40),
    kind=st.sampled_from(ALLOWED),
    made_from=st.integers(0, 2**32 - 1),
    position=st.integers(0, 100_000),
)
def test_a_full_row_gives_the_token_of_the_specification(
    shape: str, vocab: int, sampling: Sampling, prompt: set[int], kind: str, made_from: int, position: int
) -> None:
    random = np.random.default_rng(made_from)
    values = made_values(shape, vocab, random)
    allowed, answer = made_allowed(kind, values, random), list[int]()
    sampler = Sampler(sampling, vocab, prompt)
    for at in range(position, position + 4):
        token = sampler.choose(full_row(values, sampling.temperature), at, allowed)
        assert token == reference(values, sampling, prompt, answer, allowed, uniform(sampling.seed, at))
        sampler.observe(token)
        answer.append(token)


def test_a_token_that_was_chosen_is_penalised_from_then_on() -> None:
    values = np.array([3.0, 2.9, 0.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.5), 3)
    first = sampler.choose(full_row(values, 0), 0)
    assert first == 0
    sampler.observe(first)
    assert sampler.choose(full_row(values, 0), 1) == 1


def test_frequency_counts_the_answer_and_presence_counts_once_and_neither_the_prompt() -> None:
    row = full_row(np.array([3.0, 2.0, 0.0], np.float32), 0)
    often = Sampler(Sampling(frequency_penalty=0.4), 3, [0] * 9)
    once = Sampler(Sampling(presence_penalty=0.4), 3, [0] * 9)
    chosen = []
    for sampler in (often, once):
        for _ in range(3):
            sampler.observe(0)
        chosen.append(sampler.choose(row, 0))
    assert chosen == [1, 0]


def test_without_a_penalty_the_prompt_changes_nothing() -> None:
    values = np.array([3.0, 2.9, 0.0], np.float32)
    sampler = Sampler(Sampling(), 3, [0])
    sampler.observe(0)
    assert sampler.choose(full_row(values, 0), 0) == 0


# --- (c) the distribution ---


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_follow_softmax(over: str) -> None:
    values = np.random.default_rng(1).normal(0, 1.2, 12).astype(np.float32)
    temperature, draws = 0.7, 12_000
    row = full_row(values, temperature)
    expected = np.exp(values.astype(float) / temperature - log_sum_exp(values, temperature)) * draws
    counts: Counter[int | None] = Counter()
    for at in range(draws):
        seed, position = (at, 7) if over == "seeds" else (7, at)
        counts[Sampler(Sampling(temperature=temperature, seed=seed), 12).choose(row, position)] += 1
    seen = np.array([counts[token] for token in range(12)])
    assert seen.sum() == draws
    assert ((seen - expected) ** 2 / expected).sum() < 31.3  # χ² of 11 degrees of freedom: 1 in 1000 is above


def test_top_rows_follow_the_distribution_too() -> None:
    # The draws that the top rows settle may not be of a kind: with the full row for the others, all is softmax.
    random = np.random.default_rng(2)
    values = random.normal(0, 1.5, 40).astype(np.float32)
    full, partial = full_row(values, 1.0), top_row(values, 10, 1.0, random)
    expected = np.exp(values.astype(float) - log_sum_exp(values, 1.0)) * 8000
    counts: Counter[int | None] = Counter()
    for seed in range(8000):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), 40)
        token = sampler.choose(partial, 3)
        counts[sampler.choose(full, 3) if token is None else token] += 1
    seen = np.array([counts[token] for token in range(40)])
    large = expected > 5
    assert ((seen - expected)[large] ** 2 / expected[large]).sum() < 73.4  # χ² of 40: 1 in 1000 is above


# --- (e) ties ---


@pytest.mark.parametrize("shuffled_from", range(5))
def test_greedy_takes_the_lowest_plain_id_of_equal_ones(shuffled_from: int) -> None:
    values = np.zeros(300, np.float32)
    values[[250, 17, 90]] = 2.5
    order = np.random.default_rng(shuffled_from).permutation(300)
    row = Row(values[order], order, log_sum_exp(values, 0), 0.0, full=True)
    assert Sampler(Sampling(), 300).choose(row, 0) == 17


def test_top_k_keeps_the_lowest_plain_ids_of_equal_ones() -> None:
    row = full_row(np.zeros(300, np.float32), 1.0)
    sampler = Sampler(Sampling(temperature=1.0, top_k=3), 300)
    assert {sampler.choose(row, position) for position in range(100)} == {0, 1, 2}


# --- (f) random numbers ---


@pytest.mark.parametrize(
    ("seed", "position", "numerator"),
    [
        (42, 1000, 1319520184364287),  # PROTOCOL.md
        (0, 0, 508604106994858),
        (0, 1, 3963917667521872),
        (1, 0, 5843428001937822),
        (2**64 - 1, 2**64 - 1, 1390843749066413),
    ],
)
def test_random_numbers_are_those_of_the_specification(seed: int, position: int, numerator: int) -> None:
    assert uniform(seed, position) == numerator / 2**53


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**64 - 1))
def test_random_numbers_lie_between_0_and_1(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    values = made_values("plain", 300, np.random.default_rng(9))
    row, sampling = full_row(values, 1.0), Sampling(temperature=1.0, seed=5)
    forwards, backwards = Sampler(sampling, 300, [1, 2, 3]), Sampler(sampling, 300)
    drawn = [forwards.choose(row, position) for position in range(50)]
    assert [backwards.choose(row, position) for position in reversed(range(50))] == drawn[::-1]
    assert len(set(drawn)) > 10


# --- (g) options ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-40),  # float32 in the cloud overflows, which would look like a lie
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("frequency_penalty", -101.0),
        ("presence_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_an_option_out_of_range_is_refused_by_name_and_value(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"^{name}: seen {value}, wanted "):
        Sampling(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [100.5, -101.0, math.nan, math.inf])
def test_a_bias_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match=r"^logit_bias: seen .*, wanted -100 to 100"):
        Sampling(logit_bias={1: 0.0, 2: value})


@pytest.mark.parametrize("token", [-1, 300, 10**9])
def test_a_bias_for_no_id_of_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(UsageError, match=r"logit_bias: .* not in the vocabulary of 300"):
        Sampler(Sampling(logit_bias={token: 1.0}), 300)


# --- ids that are never chosen ---


@settings(max_examples=examples(300), deadline=None)
@given(st.integers(0, 10_000), st.sets(st.integers(0, 39), max_size=38), st.sampled_from([0.0, 0.7, 1.5]))
def test_banned_ids_are_as_if_they_were_not_in_the_vocabulary(seed: int, banned: set[int], temperature: float) -> None:
    values = np.random.default_rng(seed).normal(0, 2, 40).round(1).astype(np.float32)  # rounded: some are equal
    sampling = Sampling(temperature=temperature, top_p=0.9, seed=seed)
    row = Row(values, np.arange(40), float(np.logaddexp.reduce(values / (temperature or 1))), 0.0, full=True)
    kept = np.array([token for token in range(40) if token not in banned])
    others = Row(values[kept], kept, float(np.logaddexp.reduce(values[kept] / (temperature or 1))), 0.0, full=True)
    expected = Sampler(sampling, 40).choose(others, 7)
    sampler = Sampler(sampling, 40, banned=banned)
    assert sampler.choose(row, 7) == expected
    top = sampler.choose(row.head(12), 7)
    assert top in (expected, None)


def test_where_every_id_is_banned_none_is_chosen() -> None:
    row = Row(np.zeros(3, np.float32), np.arange(3), 1.0, 1.0, full=True)
    assert Sampler(Sampling(), 3, banned=range(3)).choose(row, 0) is None
