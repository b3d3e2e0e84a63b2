"""The tokenizer of translation models (Marian): sentencepiece for the source, one vocabulary for both languages."""

from __future__ import annotations

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from shared.errors import BundleError

SPACE = "▁"  # sentencepiece's mark of a word's beginning


class PieceTokenizer:
    """source.spm and vocab.json: text to pieces to ids. Special tokens in a text are text; a language code such as
    `>>fra<<` at its beginning is one token."""

    def __init__(self, source: Path, vocabulary: Path) -> None:
        try:
            self._source = SentencePieceProcessor(model_file=str(source))
            self._ids: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))
            self._unknown = self._ids["<unk>"]
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise BundleError(f"{vocabulary.parent}: its tokenizer: {error}", hint="export the bundle again") from None
        self._pieces = {number: piece for piece, number in self._ids.items()}

    def encode(self, text: str) -> list[int]:
        code: list[str] = []
        if text.startswith(">>") and (end := text.find("<<")) > 0:
            code, text = [text[: end + 2]], text[end + 2 :]
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        pieces: list[str] = self._source.encode(text, out_type=str)
        return [self._ids.get(piece, self._unknown) for piece in code + pieces]

    def detokenizer(self) -> PieceStream:
        return PieceStream(self._pieces)

    def token_bytes(self, token_id: int) -> bytes:
        """What a piece adds to a text, in UTF-8."""
        piece: str = self._pieces.get(token_id, "")
        return piece.replace(SPACE, " ").encode()


class PieceStream:
    """The text of one stream of ids."""

    def __init__(self, pieces: dict[int, str]) -> None:
        self._pieces = pieces
        self._begun = False

    def push(self, token_id: int) -> str:
        """The text of a piece; the blank before the first word is left out."""
        text = self._pieces.get(token_id, "").replace(SPACE, " ")
        if not self._begun:
            text = text.lstrip(" ")
            self._begun = bool(text)
        return text

    def finish(self) -> str:
        return ""
