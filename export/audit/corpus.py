"""Real text that every Python carries: its own language reference. Nothing is fetched and nothing is shipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer

from shared.key import Index

PROMPT = "I'm a language model,"  # what the paper asks of a stolen model (STIP, table 4)


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids: what an attacker may read, and what a victim sends. No passage is in both."""

    public: Index  # [tokens]
    secret: Index  # [tokens]
    passages: tuple[str, ...]  # the secret text, piece by piece
    paragraphs: tuple[Index, ...] = ()  # and paragraph by paragraph, as prompts are
    prompt: Index = field(default_factory=lambda: np.zeros(1, np.int64))  # PROMPT [tokens]
    decode: Callable[[Index], str] = lambda ids: ""  # text of ids


NO_TEXT = Text(np.zeros(0, np.int64), np.zeros(0, np.int64), ())  # of models that take none


def read_text(tokenizer: Path) -> Text:
    """The corpus as ids of the tokenizer.json at `tokenizer`. Every other topic is the victim's."""
    reference = Tokenizer.from_file(str(tokenizer))
    passages = [topics[name].strip() for name in sorted(topics)]

    def ids(part: list[str]) -> list[Index]:
        encoded = reference.encode_batch(part, add_special_tokens=False)
        return [np.asarray(one.ids, np.int64) for one in encoded if one.ids]

    public, secret = passages[::2], passages[1::2]
    paragraphs = [cut.strip() for passage in secret for cut in passage.split("\n\n")]
    return Text(
        np.concatenate(ids(public)),
        np.concatenate(ids(secret)),
        tuple(secret),
        tuple(ids(paragraphs)),
        ids([PROMPT])[0],
        lambda some: str(reference.decode(some.tolist())),
    )
