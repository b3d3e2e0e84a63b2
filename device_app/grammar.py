"""Answers of a form that is given beforehand, JSON of a schema for one: which tokens may come next.

The grammars are llguidance's. It is given the tokens' bytes as this project's tokenizers know them, not a tokenizer's
file, whose decoder it might read otherwise. Where the text to come is sure, it allows the tokens alone that the
tokenizer would make of that text: those need no model, and are what a model has been trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from device_app.adjustments import Allowed
from device_app.text import one_line
from device_app.tokenizer import Tokenizer
from shared.errors import BundleError, UsageError

# Terminal control characters in UTF-8. The text of an answer is without them (text.py), so they cannot be a part of it.
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")
_CONTROL_TEXT = re.compile("[\x80-\x9f]")
_FIRST, _SECOND = b"\xc2", range(0x80, 0xA0)  # such a character may be in two tokens

MOST_ERROR = 200  # characters of what the library says of a schema


class Constraint(Protocol):
    """What one answer must be. It follows the answer token by token."""

    def allowed(self) -> Allowed:
        """The ids that may come next [vocab_size], the end ids among them where the answer may end."""

    def advance(self, token: int) -> None:
        """Goes on by a token that was chosen, which must be an allowed one."""

    def accepts(self, ids: Sequence[int]) -> int:
        """How many of `ids` may follow from here, one after the other. Changes nothing."""

    def forced(self, most: int) -> list[int]:
        """Ids, at most `most`, of which each is the only one that may come. Changes nothing."""


class Grammar:
    """Makes constraints for the answers of one model. May be shared by threads."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int], hidden_ids: Collection[int]
    ) -> None:
        """end_ids: any of them ends an answer; hidden_ids: special tokens, which no text holds.

        Raises BundleError where an answer cannot end.
        """
        if not end_ids:
            raise BundleError("end_ids: seen none, wanted one, to end an answer that is complete")
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, end_ids, hidden_ids)
        self._tokens = LLTokenizer(TokenizerWrapper(self._vocabulary), eos_token=list(end_ids))

    def json_schema(self, schema: Mapping[str, Any]) -> Constraint:
        """JSON that `schema` describes, in one line. Raises UsageError, with the keyword that is at fault."""
        try:
            text = json.dumps(schema, allow_nan=False)
            # In one line, as Python and most models write it: where white space is free, a model may go on with it for
            # ever.
            grammar = LLMatcher.grammar_from_json_schema(
                text,
                overrides={
                    "whitespace_flexible": False,
                    "item_separator": ", ",
                    "key_separator": ": ",
                    "lenient": False,
                },
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise _not_usable("JSON schema", str(error)) from None
        return self._constraint("JSON schema", grammar)

    def json_object(self) -> Constraint:
        """Any JSON object, in one line."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Constraint:
        """Text that matches `pattern` as a whole. Raises UsageError."""
        return self._constraint("regular expression", LLMatcher.grammar_from_regex(pattern))

    def lark(self, grammar: str) -> Constraint:
        """Text of a grammar in llguidance's dialect of Lark. Raises UsageError."""
        return self._constraint("grammar", LLMatcher.grammar_from_lark(grammar))

    def _constraint(self, what: str, grammar: str) -> Constraint:
        if _CONTROL_TEXT.search(grammar):
            raise _not_usable(what, "seen a control character from U+0080 to U+009F, which no answer holds")
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise _not_usable(what, matcher.get_error())
        followed = _Followed(what, matcher, self._vocabulary)
        followed.allowed()  # a form that holds itself is only found out where it is followed
        return followed


class _Followed:
    """One answer's constraint."""

    def __init__(self, what: str, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._what = what
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._mask: Allowed | None = None  # what may come, once it has been asked for
        self._begun = False  # whether the text so far ends with what may become a control character

    def allowed(self) -> Allowed:
        if self._mask is None:
            mask: Allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
            if self._begun:
                mask &= ~self._vocabulary.second
            if not mask.any() or self._matcher.is_error():
                raise self._failed()
            mask.flags.writeable = False
            self._mask = mask
        return self._mask

    def advance(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise self._failed()
        self._mask, self._begun = None, self._vocabulary.tokens[token].endswith(_FIRST)

    def accepts(self, ids: Sequence[int]) -> int:
        return self._matcher.validate_tokens(list(ids))

    def forced(self, most: int) -> list[int]:
        ids: list[int] = []
        ahead = self
        while len(ids) < most and np.count_nonzero(mask := ahead.allowed()) == 1:
            ids.append(int(mask.argmax()))
            if ids[-1] in self._vocabulary.end_ids:
                break
            if ahead is self:
                ahead = _Followed(self._what, self._matcher.deep_copy(), self._vocabulary)
            ahead.advance(ids[-1])
        return ids

    def _failed(self) -> UsageError:
        # The library's own words would have the answer in them.
        return UsageError(f"{self._what}: it could not be followed to the end: {self._matcher.stop_reason()}")


class _Vocabulary:
    """The vocabulary as llguidance wants it."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int], hidden_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        special = self.end_ids.union(hidden_ids)
        # Of tokens with the same bytes the last: the others are single bytes that only stand in for it.
        self._ids = {
            piece: token
            for token in range(vocab_size)
            if token not in special and (piece := tokenizer.token_bytes(token)) and not _CONTROL.search(piece)
        }
        self._longest = max(map(len, self._ids), default=1)
        self.tokens = [b""] * vocab_size  # such are never allowed, but for those that end an answer
        for piece, token in self._ids.items():
            self.tokens[token] = piece
        # Those that end a control character which the token before has begun.
        self.second: Allowed = np.array([bool(piece) and piece[0] in _SECOND for piece in self.tokens])
        self.eos_token_id = end_ids[0]
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of a text that must come."""
        if isinstance(text, bytes):
            raise TypeError("seen bytes, wanted text")  # which tells llguidance to give text
        whole = text.encode()
        pieces = [self._tokenizer.token_bytes(token) for token in self._tokenizer.encode(text)]
        # Not where it has the name of a special token in it, or the tokenizer puts a blank before it.
        if b"".join(pieces) == whole and self._ids.keys() >= set(pieces):
            return [self._ids[piece] for piece in pieces]
        ids, at = list[int](), 0
        while at < len(whole):
            sizes = range(min(self._longest, len(whole) - at), 0, -1)
            size = next((size for size in sizes if whole[at : at + size] in self._ids), None)
            if size is None:
                break  # no token can write it
            ids.append(self._ids[whole[at : at + size]])
            at += size
        return ids


def _not_usable(what: str, reason: str) -> UsageError:
    return UsageError(f"{what}: it cannot be used: {one_line(reason)[:MOST_ERROR]}")
