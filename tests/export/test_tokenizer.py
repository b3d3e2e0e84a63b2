"""What the device's tokenizer is exported as, and that nothing is shipped which was not proved."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from device_app.tokenizer import Tokenizer as DeviceTokenizer
from device_app.tokenizer import open_tokenizer
from export.hard_text import hard_text
from export.tokenizer import TokenizerReport, export_tokenizer
from shared.errors import ExportError
from tests.checkpoints import tiny_tokenizer

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SCRIPTS = """
LATIN CYRILLIC GREEK ARABIC HEBREW SYRIAC DEVANAGARI BENGALI GUJARATI TAMIL TELUGU SINHALA THAI LAO TIBETAN KHMER
MYANMAR CJK HIRAGANA KATAKANA HANGUL ETHIOPIC GEORGIAN ARMENIAN CHEROKEE MONGOLIAN MATHEMATICAL REGIONAL EMOJI COMBINING
"""
SOME_TEXT = ["it's 2024: I'LL be there\n\n  at 10:30, won't you? x += 1\n"] * 4


def byte_level(pre_tokenizer: Any, *, special: tuple[str, ...] = ("<|end|>",)) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SOME_TEXT, trainer)
    return tokenizer


def llama_3_style() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
    return byte_level(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "it": 1, "##s": 2, "'": 3, "the": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def unigram() -> Tokenizer:
    scores = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("a", -3.0)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def export(tokenizer: Tokenizer, folder: Path) -> TokenizerReport:
    return export_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), folder)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="module")
def exported(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizerReport, Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    return export_tokenizer(reference, folder), folder


@pytest.fixture(scope="module")
def on_device(exported: tuple[TokenizerReport, Path]) -> DeviceTokenizer:
    report, folder = exported
    return open_tokenizer(folder, report.kind)


def test_the_corpus_is_large_distinct_and_always_the_same() -> None:
    corpus = hard_text(["<|a|>", "<|b|>"])
    assert len(corpus) == len(set(corpus)) >= 600
    assert corpus == hard_text(["<|a|>", "<|b|>"])
    assert "" in corpus
    assert max(map(len, corpus)) > 4000


def test_the_corpus_covers_many_scripts() -> None:
    seen = {unicodedata.name(character, "?").split()[0] for character in "".join(hard_text([]))}
    assert seen >= set(SCRIPTS.split())


@pytest.mark.parametrize(
    "pattern",
    {
        "jamo": "[\u1100-\u11ff]{2}",
        "joined emoji": "\u200d[\U0001f300-\U0001faff]",
        "skin tone": "[\U0001f3fb-\U0001f3ff]",
        "flag": "[\U0001f1e6-\U0001f1ff]{2}",
        "keycap": "[0-9#*]\ufe0f?\u20e3",
        "every control character": "\x01.*\x1f.*\x7f.*\x9f",
        "zero": "\0",
        "next line": "  \x85",
        "line separator": "\u2028",
        "no-break space": "\xa0",
        "zero width": "\u200b",
        "private use": "\ue000",
        "astral private use": "\U0010fffd",
        "blanks at the end": r"\S {2,}$",
        "many newlines": "\n{30}",
        "upper-case contraction": "[a-z]'LL",
        "URL": "https://",
        "JSON": r'\{"',
        "special token inside": r"a<\|end\|>b",
        "adjacent special tokens": r"<\|start\|><\|end\|>",
        "special token broken off": r"x<\|end\|$",
        "special token begun, one character, the end": "<[^ ]$",
    }.items(),
    ids=lambda pair: pair[0],
)
def test_the_corpus_has(pattern: tuple[str, str]) -> None:
    corpus = hard_text(["<|start|>", "<|end|>"])
    assert any(re.search(pattern[1], text, re.DOTALL) for text in corpus)


def test_smollm2_is_exported_as_onnx_and_exact_on_every_text(exported: tuple[TokenizerReport, Path]) -> None:
    report, folder = exported
    assert (report.kind, report.mismatches) == ("onnx", 0)
    assert report.samples > 49152
    assert set(report.files) == names(folder) == {"tokenizer.onnx", "detokenizer.onnx", "tokenizer.json"}


def test_the_device_gives_the_reference_ids_and_text_on_the_whole_corpus(
    reference: Any, on_device: DeviceTokenizer
) -> None:
    for text in hard_text(list(reference.get_added_vocab())):
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert on_device.encode(text) == ids
        stream = on_device.detokenizer()
        shown = "".join(map(stream.push, ids)) + stream.finish()
        assert shown == reference.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
            st.sampled_from(["<|im_start|>", "<|im_end|", "<", "'ve", "'S", "  ", "\n", "\x85", "\0", "\u3000", "12"]),
        )
    ).map("".join)
)
def test_the_device_gives_the_reference_ids_on_any_text(reference: Any, on_device: DeviceTokenizer, text: str) -> None:
    assert on_device.encode(text) == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_the_device_gives_the_reference_ids_on_every_code_point(reference: Any, on_device: DeviceTokenizer) -> None:
    for code in (*range(0xD800), *range(0xE000, 0x110000)):
        text = "a{0} {0}  {0}!{0}'ve{0}1".format(chr(code))
        assert on_device.encode(text) == reference(text, add_special_tokens=False)["input_ids"], hex(code)


def test_the_detokenizer_needs_no_custom_op(exported: tuple[TokenizerReport, Path]) -> None:
    model = onnx.load(exported[1] / "detokenizer.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [opset.domain for opset in model.opset_import] == [""]


def test_few_characters_go_around_the_custom_op(exported: tuple[TokenizerReport, Path]) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(exported[1] / "tokenizer.onnx").metadata_props}
    outside = re.compile(metadata["outside"])
    assert {chr(code) for code in range(0x250) if outside.match(chr(code))} == set("\0\x04\x06\x13\x14\x16\x1d\x85")
    everyday = "".join(text for text in hard_text(["<|im_end|>"]) if text.isprintable() and "'ve" not in text)
    assert len(outside.findall(everyday)) < len(everyday) / 500


def test_any_gpt_2_style_tokenizer_is_exported_as_onnx(tmp_path: Path) -> None:
    report = export_tokenizer(tiny_tokenizer(), tmp_path)
    assert (report.kind, report.mismatches) == ("onnx", 0)


def test_a_tokenizer_without_special_tokens_is_exported_as_onnx(tmp_path: Path) -> None:
    assert export(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), special=()), tmp_path).kind == "onnx"


def test_digits_that_are_taken_one_by_one_are_exact_in_onnx(tmp_path: Path) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    assert export(tokenizer, tmp_path).kind == "onnx"
    device = open_tokenizer(tmp_path, "onnx")
    for text in ("  5", "at 10:30", "x²³", "१२ 2024's", "a1"):
        assert device.encode(text) == tokenizer.encode(text).ids


def test_other_word_boundaries_fall_back_to_json_and_say_so(tmp_path: Path) -> None:
    report = export(llama_3_style(), tmp_path)
    assert (report.kind, report.files) == ("json", ("tokenizer.json",))
    assert report.mismatches > 0
    assert re.search(r"ids differ on \d+ of \d+ texts", report.reason)
    assert names(tmp_path) == {"tokenizer.json"}


def test_a_normalizer_falls_back_to_json(tmp_path: Path) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.normalizer = normalizers.NFC()
    report = export(tokenizer, tmp_path)
    assert report.kind == "json"
    assert report.mismatches > 0


def test_special_tokens_that_swallow_blanks_fall_back_to_json(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), special=())
    )
    swallowing = AddedToken("<mask>", lstrip=True, rstrip=True, special=True)
    tokenizer.backend_tokenizer.add_special_tokens([swallowing])
    report = export_tokenizer(tokenizer, tmp_path)
    assert report.kind == "json"
    assert report.mismatches > 0


@pytest.mark.parametrize("make", [word_piece, unigram])
def test_a_tokenizer_that_is_not_byte_level_takes_json(make: Any, tmp_path: Path) -> None:
    report = export(make(), tmp_path)
    assert report.kind == "json"
    assert report.mismatches == 0  # none was tried
    assert report.reason.startswith("not a byte-level BPE")
    assert names(tmp_path) == {"tokenizer.json"}


def test_a_mixed_decoder_becomes_a_plain_byte_level_one(tmp_path: Path) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteLevel(), decoders.Fuse()])
    export(tokenizer, tmp_path)
    assert isinstance(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decoder, decoders.ByteLevel)


def test_a_tokenizer_that_its_json_does_not_describe_is_an_error(tmp_path: Path) -> None:
    class Shouting(PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            return super().__call__(text.upper(), **options)

    with pytest.raises(ExportError, match="texts differ from the source's tokenizer, wanted 0"):
        export_tokenizer(Shouting(tokenizer_object=llama_3_style()), tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(".onnx")]


def test_a_slow_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="seen object, wanted a fast one"):
        export_tokenizer(object(), tmp_path)
