"""Grammars: every text that their masks allow is of the form asked for, and what they cannot do they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator as Validator
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from device_app.grammar import Constraint, Grammar
from device_app.text import without_control
from device_app.tokenizer import Tokenizer, open_tokenizer
from shared.errors import BundleError, UsageError
from tests.checkpoints import tiny_tokenizer
from tests.schemas import Schema, random_schema
from tests.thorough import examples

VOCAB, END, HIDDEN = 330, 2, (0, 1, 2)  # some ids more than the tokenizer has, as models pad their vocabularies
PERSON: Schema = {
    "type": "object",
    "properties": {"the cat": {"type": "integer", "minimum": 0, "maximum": 9}, "t": {"const": "<|end|> ☃é"}},
    "required": ["the cat", "t"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    return open_tokenizer(folder, "json")


@pytest.fixture(scope="module")
def grammar(tokenizer: Tokenizer) -> Grammar:
    return Grammar(tokenizer, VOCAB, [END], HIDDEN)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def walked(constraint: Constraint, random: np.random.Generator, end_ids: Sequence[int] = (END,)) -> list[int]:
    """Ids of a text that takes any allowed token with equal chance."""
    ids: list[int] = []
    while True:
        token = int(random.choice(np.flatnonzero(constraint.allowed())))
        constraint.advance(token)
        if token in end_ids:
            return ids
        ids.append(token)


def follow(constraint: Constraint, ids: Sequence[int]) -> Constraint:
    for token in ids:
        constraint.advance(token)
    return constraint


# --- what is allowed ---


@pytest.mark.parametrize("seed", range(60))
def test_any_text_that_a_random_schemas_masks_allow_validates(
    grammar: Grammar, tokenizer: Tokenizer, seed: int
) -> None:
    random = np.random.default_rng([7, seed])
    schema = random_schema(random)
    text = text_of(tokenizer, walked(grammar.json_schema(schema), random))
    Validator(schema, format_checker=Validator.FORMAT_CHECKER).validate(json.loads(text))


def test_json_stands_in_one_line_with_the_blanks_that_python_writes(grammar: Grammar, tokenizer: Tokenizer) -> None:
    constraint = grammar.json_schema({"const": {"a": [1, True], "b": {}}})
    assert text_of(tokenizer, constraint.forced(100)[:-1]) == json.dumps({"a": [1, True], "b": {}})


def test_a_json_object_may_be_any_but_nothing_else(grammar: Grammar, tokenizer: Tokenizer) -> None:
    for value in ({}, {"a": [1.5, None, {"é": "☃\n"}]}, {"": True}):
        ids = tokenizer.encode(json.dumps(value, ensure_ascii=False))
        assert grammar.json_object().accepts([*ids, END]) == len(ids) + 1
    assert grammar.json_object().accepts(tokenizer.encode("[1]")) == 0


def test_a_regular_expression_is_matched_as_a_whole(grammar: Grammar, tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        text = text_of(tokenizer, walked(grammar.regex(r"(the|a) cat{1,3}( sat)?"), random))
        assert re.fullmatch(r"(the|a) cat{1,3}( sat)?", text)


def test_a_lark_grammar_is_followed(grammar: Grammar, tokenizer: Tokenizer) -> None:
    constraint = grammar.lark('start: "yes" | "no" WORD\nWORD: /[a-z]{2}/')
    assert text_of(tokenizer, walked(constraint, np.random.default_rng(1)))[:2] in ("ye", "no")


def test_an_answer_may_end_where_its_text_is_complete_and_nowhere_else(grammar: Grammar, tokenizer: Tokenizer) -> None:
    constraint = grammar.regex("[0-9]{2,3}")
    ends = []
    for digit in tokenizer.encode("1") * 3:
        ends.append(bool(constraint.allowed()[END]))
        constraint.advance(digit)
    assert ends == [False, False, True]
    assert np.flatnonzero(constraint.allowed()).tolist() == [END]


def test_any_end_id_may_end_an_answer(tokenizer: Tokenizer) -> None:
    constraint = follow(Grammar(tokenizer, VOCAB, [2, 0], HIDDEN).regex("a"), tokenizer.encode("a"))
    assert np.flatnonzero(constraint.allowed()).tolist() == [0, 2]
    constraint.advance(0)


def test_special_tokens_and_ids_past_the_tokenizers_are_never_allowed(grammar: Grammar, tokenizer: Tokenizer) -> None:
    allowed = grammar.regex(r"(?s:.*)").allowed()
    empty = [token for token in range(VOCAB) if not tokenizer.token_bytes(token)]
    assert allowed.shape == (VOCAB,) and allowed.sum() > 100 and len(empty) > 5
    assert not allowed[[0, 1, *empty]].any()


def test_no_terminal_control_character_is_ever_allowed_as_no_text_shows_one(tokenizer: Tokenizer) -> None:
    grammar = Grammar(tokenizer, VOCAB, [END], HIDDEN)
    for seed in range(20):
        ids = walked(grammar.regex(r"(?s:[\x00-\u00ff]{40})"), np.random.default_rng(seed))
        text = text_of(tokenizer, ids)
        assert without_control(text) == text and len(text) == 40


def test_the_name_of_a_special_token_is_written_as_text(grammar: Grammar, tokenizer: Tokenizer) -> None:
    ids = grammar.json_schema({"const": "<|end|>"}).forced(50)
    assert text_of(tokenizer, ids[:-1]) == '"<|end|>"' and not set(ids[:-1]) & set(HIDDEN)


# --- what must come ---


def test_forced_ids_are_those_that_the_masks_leave_no_choice_of(grammar: Grammar) -> None:
    constraint, alone = grammar.json_schema(PERSON), grammar.json_schema(PERSON)
    ids = constraint.forced(100)
    for token in ids:
        assert np.flatnonzero(alone.allowed()).tolist() == [token]
        alone.advance(token)
    assert alone.allowed().sum() > 1


def test_forced_text_is_in_the_tokens_that_the_tokenizer_makes_of_it(grammar: Grammar, tokenizer: Tokenizer) -> None:
    assert grammar.json_schema(PERSON).forced(100) == tokenizer.encode('{"the cat": ')


def test_no_more_ids_are_forced_than_asked_for_and_the_end_is_the_last(grammar: Grammar) -> None:
    constraint = grammar.json_schema({"const": "the cat"})
    ids = constraint.forced(100)
    assert ids[-1] == END and END not in ids[:-1]
    assert constraint.forced(2) == ids[:2] and constraint.forced(0) == []


@pytest.mark.parametrize("seed", range(10))
def test_looking_ahead_changes_nothing(grammar: Grammar, seed: int) -> None:
    random = np.random.default_rng([8, seed])
    schema = random_schema(random)
    ids = [*walked(grammar.json_schema(schema), random), END]
    looking, plain = grammar.json_schema(schema), grammar.json_schema(schema)
    for at, token in enumerate(ids):
        looking.forced(5)
        looking.accepts([*ids[at : at + 3], 5, 5])
        assert (looking.allowed() == plain.allowed()).all()
        looking.advance(token)
        plain.advance(token)


def test_ids_are_accepted_up_to_the_first_that_may_not_follow(grammar: Grammar, tokenizer: Tokenizer) -> None:
    right = tokenizer.encode('{"the cat": 7, "t')
    constraint = grammar.json_schema(PERSON)
    assert constraint.accepts(right) == len(right)
    assert constraint.accepts([*right, END, *right]) == len(right)
    assert constraint.accepts([]) == 0


# --- tokenizers of other kinds ---


def _with_byte_tokens() -> Library:
    """As Llama 2 has them: blanks are marks, and each byte has a token, also those that have one as characters."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *'{}":, abcdefghijklmnopqrstuvwxyz0123456789', '{"', '":', "▁the", "▁cat"]
    scores = [(token, -float(place)) for place, token in enumerate(dict.fromkeys(tokens))]
    library = Library(models.Unigram(scores, unk_id=0, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


@pytest.mark.parametrize("seed", range(10))
def test_a_tokenizer_that_writes_blanks_as_marks_gives_valid_json_too(tmp_path: Path, seed: int) -> None:
    library, random = _with_byte_tokens(), np.random.default_rng([9, seed])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path, "json")
    grammar = Grammar(tokenizer, library.get_vocab_size(), [2], [0, 1, 2])
    schema = random_schema(random) if seed else PERSON
    ids = walked(grammar.json_schema(schema), random)
    text = library.decode(ids, skip_special_tokens=False)
    Validator(schema).validate(json.loads(text))
    assert text == text_of(tokenizer, ids)
    assert library.token_to_id("<0x22>") not in ids  # the character's own token, not the one that stands in


# --- what cannot be ---


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, r'"not"'),
        ({"type": "object", "properties": {"a": {"if": {}, "then": {}}}}, r'"if", "then"'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "nonsense"}, "format: nonsense"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "array", "minItems": 3, "maxItems": 1}, "minItems"),
        ({"$ref": "http://localhost:1/schema"}, "does not fetch"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "strin\x1bg\n"}, "type"),
        ({"minimum": float("nan")}, "JSON"),
        ({"const": {1, 2}}, "serializable"),
        ({"enum": ["a\x9b31m", "b"]}, "control character"),
        ({"x-guidance": {"lenient": True}, "not": {}}, r'"not"'),  # what a keyword asks for is never left out
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_by_its_keyword(
    grammar: Grammar, schema: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        grammar.json_schema(schema)
    text = str(caught.value)
    assert text.startswith("JSON schema: ") and text.isprintable() and len(text) < 260


@pytest.mark.parametrize("depth", [200, 100_000])
def test_a_schema_that_nests_without_end_is_refused(grammar: Grammar, depth: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(UsageError, match="recursion"):
        grammar.json_schema(schema)


@pytest.mark.parametrize("text", ["(", "[", "\x00(", "a" * 500 + "("])
def test_what_is_no_regular_expression_and_no_grammar_is_refused(grammar: Grammar, text: str) -> None:
    with pytest.raises(UsageError, match=r"^regular expression: "):
        grammar.regex(text)
    with pytest.raises(UsageError, match=r"^grammar: "):
        grammar.lark(text)


KEYWORDS = """type properties required items enum const anyOf oneOf allOf $ref $defs pattern format minimum maximum
multipleOf minItems maxItems minLength maxLength additionalProperties patternProperties prefixItems minProperties
maxProperties x-guidance"""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYWORDS.split()) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=examples(200), deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=st.dictionaries(st.sampled_from(KEYWORDS.split()), json_values))
@example(schema={"$ref": ""})
def test_whatever_a_schema_holds_it_is_followed_or_refused(grammar: Grammar, schema: dict[str, Any]) -> None:
    try:
        constraint = grammar.json_schema(schema)
    except UsageError:
        return
    assert constraint.allowed().any()


def test_a_token_that_may_not_come_is_an_error_and_not_a_wrong_text(grammar: Grammar, tokenizer: Tokenizer) -> None:
    constraint = follow(grammar.json_schema({"type": "string"}), tokenizer.encode('"the secret'))
    with pytest.raises(UsageError, match="JSON schema") as caught:
        constraint.advance(tokenizer.encode("\n")[0])
    assert "secret" not in str(caught.value)


def test_a_model_whose_answers_cannot_end_has_no_grammar(tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match="end_ids: seen none"):
        Grammar(tokenizer, VOCAB, [], HIDDEN)


def test_the_library_is_loaded_only_where_a_grammar_is_made() -> None:
    program = "import sys, device_app.cli, device_app.chat, device_app.assistant; print('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
