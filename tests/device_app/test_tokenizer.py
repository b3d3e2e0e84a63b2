"""Ids of text and text of ids on the device, with both kinds of tokenizer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from device_app.tokenizer import Tokenizer, open_tokenizer
from export.tokenizer import export_tokenizer
from shared.errors import BundleError
from tests.checkpoints import tiny_tokenizer

FAMILY = "👨‍👩‍👧‍👦"
CUT = "👍".encode()
KINDS: tuple[Literal["onnx", "json"], ...] = ("onnx", "json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the files of both kinds, for a vocabulary in which other than ASCII is single bytes."""
    folder = tmp_path_factory.mktemp("device")
    assert export_tokenizer(tiny_tokenizer(), folder).kind == "onnx"
    return folder


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return open_tokenizer(folder, request.param)


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return Library.from_file(str(folder / "tokenizer.json"))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each push gave, and at last what finish gave."""
    stream = tokenizer.detokenizer()
    return [*map(stream.push, ids), stream.finish()]


def test_special_tokens_are_recognised_and_none_is_added(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|start|><|end|>") == [1, 2]
    assert tokenizer.encode("the<|end|>") == [*tokenizer.encode("the"), 2]


def test_an_empty_text_has_no_ids_and_no_ids_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert streamed(tokenizer, []) == [""]


@pytest.mark.parametrize("text", ["a\0b", "\0", "  \x85  \x85x", "\U000323af've", "see <|endoftext|>", "a<b", "x<|e"])
def test_what_the_custom_op_cannot_read_is_encoded_exactly_all_the_same(
    tokenizer: Tokenizer, library: Library, text: str
) -> None:
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


def test_a_lone_surrogate_counts_as_a_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\udc4d") == tokenizer.encode("👍")


def test_the_stream_never_gives_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(FAMILY)
    assert len(ids) > len(FAMILY)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == FAMILY
    assert [piece for piece in pieces if piece] == list(FAMILY)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_character_that_is_cut_shows_as_a_replacement_at_the_end(tokenizer: Tokenizer, kept: int) -> None:
    ids = tokenizer.encode("ok 👍")
    assert streamed(tokenizer, ids[: len(ids) - len(CUT) + kept])[-1] == "\ufffd"


def test_two_streams_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    one, other = tokenizer.detokenizer(), tokenizer.detokenizer()
    assert [one.push(ids[0]), other.push(ids[0]), one.push(ids[1]), other.push(ids[1])] == ["", "", "é", "é"]


def test_ids_past_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer, [*tokenizer.encode("the"), 100_000, *tokenizer.encode("cat")])[-3:].count("") >= 1
    assert "".join(streamed(tokenizer, [10**6, 320, 321])) == ""


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


@given(st.lists(st.integers(0, 319), max_size=40))
def test_the_stream_gives_the_text_of_all_ids_whatever_they_are(
    tokenizer: Tokenizer, library: Library, ids: list[int]
) -> None:
    assert "".join(streamed(tokenizer, ids)) == library.decode(ids, skip_special_tokens=False)


@given(st.lists(st.integers(0, 330), max_size=40))
def test_the_bytes_of_tokens_make_the_text_of_the_stream(tokenizer: Tokenizer, ids: list[int]) -> None:
    whole = b"".join(map(tokenizer.token_bytes, ids))
    assert whole.decode(errors="replace") == "".join(streamed(tokenizer, ids))


def test_every_byte_is_some_token_and_both_kinds_agree(folder: Path) -> None:
    onnx, json = (open_tokenizer(folder, kind) for kind in KINDS)
    tokens = [onnx.token_bytes(token) for token in range(330)]
    assert tokens == [json.token_bytes(token) for token in range(330)]
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)


def _word_piece() -> Library:
    tokens = ["[UNK]", "do", "n", "'", "t", ".", "##s", "\ufffd", "é"]
    tokenizer = Library(models.WordPiece({token: place for place, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _llama_2_style() -> Library:
    tokens = ["<unk>", "▁", "▁a", "b", "▁\ufffd", "▁c", *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = [(token, -float(place)) for place, token in enumerate(tokens)]
    tokenizer = Library(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@settings(deadline=None)  # each example opens a file
@given(st.lists(st.integers(0, 5), max_size=20))
@pytest.mark.parametrize("make", [_word_piece, _llama_2_style])
def test_blanks_between_tokens_survive_the_stream(
    make: Any, tmp_path_factory: pytest.TempPathFactory, ids: list[int]
) -> None:
    library = make()
    path = tmp_path_factory.getbasetemp() / make.__name__
    path.mkdir(exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    shown = "".join(streamed(open_tokenizer(path, "json"), ids))
    assert shown == library.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def with_marks(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of the style of Llama 2's."""
    folder = tmp_path_factory.mktemp("marks")
    _llama_2_style().save(str(folder / "tokenizer.json"))
    return open_tokenizer(folder, "json")


@given(st.lists(st.integers(1, 261), max_size=20))
def test_the_bytes_of_tokens_with_marks_for_blanks_make_the_text_but_for_the_first_blank(
    with_marks: Tokenizer, ids: list[int]
) -> None:
    whole = b"".join(map(with_marks.token_bytes, ids))
    try:
        text = whole.decode()
    except UnicodeDecodeError:  # the library gives a replacement character for each byte, not for each sequence
        return
    assert "".join(streamed(with_marks, ids)) == text.removeprefix(" ")


def test_byte_tokens_make_characters_and_never_an_exception(tmp_path: Path) -> None:
    _llama_2_style().save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path, "json")
    assert streamed(tokenizer, [2, *(6 + byte for byte in CUT), 3]) == ["a", "", "", "", "👍", "b", ""]
    for lie in ([6 + 0xFF, 6 + 0x41, 1, 4], [6 + 0xC3, 6 + 0xC3, 2, 6 + 0x80]):
        streamed(tokenizer, lie)  # the library's DecodeStream raises on the first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
def test_a_missing_or_damaged_file_is_named(
    kind: Literal["onnx", "json"], damage: str, folder: Path, tmp_path: Path
) -> None:
    broken = "detokenizer.onnx" if kind == "onnx" else "tokenizer.json"
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / broken).unlink()
    if damage != "missing":
        (tmp_path / broken).write_bytes(b"" if damage == "empty" else b"\x07garbage" * 9)
    with pytest.raises(BundleError, match=broken):
        open_tokenizer(tmp_path, kind)


def test_the_onnx_kind_wants_its_fallback_and_its_metadata(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.onnx", "detokenizer.onnx"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        open_tokenizer(tmp_path, "onnx")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.onnx").write_bytes((folder / "detokenizer.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"tokenizer\.onnx: 'outside'"):
        open_tokenizer(tmp_path, "onnx")


def test_a_token_costs_microseconds(tokenizer: Tokenizer) -> None:
    stream = tokenizer.detokenizer()
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        for token_id in range(3, 303):
            stream.push(token_id)
        best = min(best, (time.perf_counter() - start) / 300)
    assert best < 200e-6  # 6 µs when the machine is idle
