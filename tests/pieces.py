"""A real sentencepiece tokenizer of the Marian kind, trained in a second on Python's own help texts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from pydoc_data.topics import topics

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import MarianTokenizer

LINES = [line for topic in list(topics.values())[:40] for line in topic.splitlines() if line.strip()]


def write_pieces(folder: Path, size: int = 160) -> MarianTokenizer:
    """Writes source.spm, target.spm (another language: the lines backwards), one vocab.json; gives the stock class."""
    pieces: list[str] = []
    for side, lines in (("source", LINES), ("target", [line[::-1] for line in LINES])):
        written = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=0.999,
            minloglevel=2,
        )
        (folder / f"{side}.spm").write_bytes(written.getvalue())
        model = SentencePieceProcessor(model_proto=written.getvalue())
        pieces += [model.id_to_piece(number) for number in range(3, model.get_piece_size())]
    tokens = ["</s>", "<unk>", ">>fra<<", *dict.fromkeys(pieces), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "fr"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer: MarianTokenizer = MarianTokenizer.from_pretrained(folder)
    return tokenizer
