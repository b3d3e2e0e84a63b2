"""The tokenizer of translation models gives the ids and the text of the stock one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import MarianTokenizer

from device_app.pieces import PieceTokenizer
from device_app.tokenizer import open_tokenizer
from export.hard_text import hard_text
from export.tokenizer import export_tokenizer
from shared.errors import BundleError
from tests.pieces import LINES, write_pieces


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> MarianTokenizer:
    return write_pieces(tmp_path_factory.mktemp("marian"))


@pytest.fixture(scope="module")
def written(reference: MarianTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    report = export_tokenizer(reference, folder)
    assert report.kind == "sentencepiece"
    assert sorted(path.name for path in folder.iterdir()) == sorted(report.files)
    return folder


def test_hard_text_has_the_ids_of_the_stock_tokenizer(reference: MarianTokenizer, written: Path) -> None:
    tokenizer = open_tokenizer(written, "sentencepiece")
    special = ("</s>", "<unk>", "<pad>")
    texts = [text for text in hard_text([]) if not any(token in text for token in special)] + [">>fra<< a cat"]
    differ = [text for text in texts if tokenizer.encode(text) != reference(text, add_special_tokens=False).input_ids]
    assert not differ and len(texts) > 2000


def test_special_tokens_in_a_text_are_text(reference: MarianTokenizer, written: Path) -> None:
    # The stock class would end the source there, and a user's text could say so.
    ids = open_tokenizer(written, "sentencepiece").encode("a</s>b<pad>")
    assert not {reference.eos_token_id, reference.pad_token_id} & set(ids)


def test_ids_become_the_text_of_the_stock_tokenizer_piece_by_piece(reference: MarianTokenizer, written: Path) -> None:
    tokenizer = open_tokenizer(written, "sentencepiece")
    for line in LINES[:200]:
        ids = reference(line, add_special_tokens=False).input_ids
        if reference.unk_token_id in ids:
            continue
        stream = tokenizer.detokenizer()
        assert "".join(map(stream.push, ids)) + stream.finish() == reference.decode(ids)


def test_the_bytes_of_pieces_make_the_text_behind_a_blank(reference: MarianTokenizer, written: Path) -> None:
    tokenizer = open_tokenizer(written, "sentencepiece")
    for line in LINES[:50]:
        ids = tokenizer.encode(line)
        stream = tokenizer.detokenizer()
        text = "".join(map(stream.push, ids)) + stream.finish()
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == text
    assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize("spoilt", ["source.spm", "vocab.json"])
@pytest.mark.parametrize("contents", [None, b"", b"{}", b"not json"])
def test_a_file_that_is_missing_or_spoilt_is_named(written: Path, tmp_path: Path, spoilt: str, contents: bytes) -> None:
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / spoilt).unlink()
    if contents is not None:
        (tmp_path / spoilt).write_bytes(contents)
    with pytest.raises(BundleError, match="its tokenizer"):
        PieceTokenizer(tmp_path / "source.spm", tmp_path / "vocab.json")
