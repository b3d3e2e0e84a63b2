"""The device's tokenizer: built as ONNX graphs, proved on hard text, or shipped as `tokenizer.json` instead.

`tokenizer.onnx` wraps the custom op `GPT2Tokenizer` of onnxruntime_extensions, `detokenizer.onnx` is a table of every
token's bytes. Nothing here trusts either: all ids and all texts are compared with the reference tokenizer's.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import onnxruntime_extensions
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MarianTokenizer, PreTrainedTokenizerBase

from export.hard_text import hard_text
from shared.errors import ExportError

JSON = "tokenizer.json"
PIECES = ("source.spm", "vocab.json")
ONNX = ("tokenizer.onnx", "detokenizer.onnx")
# The op's built-in unknown token: it adds it to vocabularies that lack it, and then finds it in text.
OP_UNKNOWN = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerReport:
    """What was shipped, and what the proof saw. `reason` holds counts and names of parts, never text or ids."""

    kind: Literal["onnx", "json", "sentencepiece"]
    samples: int  # texts compared with the reference
    mismatches: int  # texts on which the ONNX graphs differ from it: 0 where kind is onnx
    reason: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One text and what the reference makes of it: its ids, and those ids as text again."""

    text: str
    ids: list[int]
    decoded: str


class _NotExact(Exception):  # the ONNX graphs cannot stand in for this tokenizer
    def __init__(self, reason: str, mismatches: int = 0) -> None:
        super().__init__(reason)
        self.mismatches = mismatches


def export_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> TokenizerReport:
    """Writes the device's tokenizer into `folder` and proves it; see TokenizerReport for what became of it.

    kind `onnx`: both graphs, and `tokenizer.json` for the few characters that the custom op cannot read (`_outside`).
    kind `json`: `tokenizer.json` alone. Raises ExportError where even that one differs from `tokenizer`.
    kind `sentencepiece`: Marian's files, for the very library that the reference runs.
    """
    if isinstance(tokenizer, MarianTokenizer):
        return _write_pieces(tokenizer, folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        message = f"tokenizer: seen {type(tokenizer).__name__}, wanted a fast one (of the library tokenizers)"
        raise ExportError(message, hint="save the model with a tokenizer.json")
    added = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]
    samples = _reference(tokenizer, hard_text(added) + _token_texts(backend.get_vocab()))
    _write_json(backend, samples, folder / JSON)
    try:
        routed = _write_and_prove_onnx(_byte_level_spec(backend), samples, folder)
    except _NotExact as error:
        for name in ONNX:
            (folder / name).unlink(missing_ok=True)
        return TokenizerReport("json", len(samples), error.mismatches, str(error), (JSON,))
    reason = f"exact on {len(samples)} texts; {routed} of them hold what the custom op cannot read and go to {JSON}"
    return TokenizerReport("onnx", len(samples), 0, reason, (*ONNX, JSON))


def _write_pieces(tokenizer: MarianTokenizer, folder: Path) -> TokenizerReport:
    if tokenizer.separate_vocabs:
        raise ExportError("tokenizer: seen a vocabulary for each language, wanted one for both")
    (folder / PIECES[0]).write_bytes(Path(tokenizer.spm_files[0]).read_bytes())
    (folder / PIECES[1]).write_text(json.dumps(tokenizer.encoder, ensure_ascii=False), encoding="utf-8")
    return TokenizerReport("sentencepiece", 0, 0, "the library sentencepiece, which the reference runs too", PIECES)


def _reference(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Sample]:
    def sample(text: str) -> Sample:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Sample(text, ids, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return [sample(text) for text in texts]


def _write_json(backend: Tokenizer, samples: Sequence[Sample], path: Path) -> None:
    """Saves tokenizer.json and proves the file as written. Raises ExportError."""
    plain = Tokenizer.from_str(backend.to_str())
    plain.no_padding()
    plain.no_truncation()
    if '"ByteLevel"' in plain.to_str() and not isinstance(plain.decoder, decoders.ByteLevel):
        # A decoder mixed of several parts hides from other libraries (grammars) that the tokens are byte-level.
        mixed, plain.decoder = plain.decoder, decoders.ByteLevel()
        if _json_differences(plain, samples):
            plain.decoder = mixed
    plain.save(str(path))
    differ = _json_differences(Tokenizer.from_file(str(path)), samples)
    if differ:
        message = f"{JSON}: {differ} of {len(samples)} texts differ from the source's tokenizer, wanted 0"
        raise ExportError(message, hint="it does more than its tokenizer.json says; this project cannot export it")


def _json_differences(tokenizer: Tokenizer, samples: Sequence[Sample]) -> int:
    return sum(
        tokenizer.encode(sample.text, add_special_tokens=False).ids != sample.ids
        or tokenizer.decode(sample.ids, skip_special_tokens=False) != sample.decoded
        for sample in samples
    )


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for U+0100 and up in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_characters()


def _byte_level_spec(backend: Tokenizer) -> dict[str, Any]:
    """The tokenizer's description, if the op can possibly stand for it. Raises _NotExact."""
    spec: dict[str, Any] = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or '"ByteLevel"' not in json.dumps(spec["pre_tokenizer"]):
        raise _NotExact(f"not a byte-level BPE: its model is {model['type']}")
    added = {token["content"] for token in spec["added_tokens"]}
    if not model["merges"] or not all(set(token) <= BYTES.keys() for token in model["vocab"].keys() - added):
        raise _NotExact("not a byte-level BPE: its tokens are not made of bytes")
    if not all(character in model["vocab"] for character, byte in BYTES.items() if 0x80 <= byte < 0xC0):
        raise _NotExact("its vocabulary lacks bytes that most scripts need")
    return spec


def _takes_digits_alone(spec: dict[str, Any]) -> bool:
    return '"individual_digits": true' in json.dumps(spec["pre_tokenizer"])


def _token_texts(vocab: dict[str, int]) -> list[str]:
    """Every token's whole characters as text: the op looks words up before it merges anything."""
    byte_level = (token for token in vocab if set(token) <= BYTES.keys())
    return [bytes(BYTES[character] for character in token).decode(errors="ignore") for token in byte_level]


def _outside(spec: dict[str, Any]) -> str:
    """A regular expression of the text that the custom op cannot read, for causes known beforehand.

    U+0000: it ends a string tensor. Characters of which the two engines know different classes. Characters with a byte
    that the vocabulary lacks: the reference leaves it out and merges across it, the op emits an id that does not exist.
    Numbers other than 0 to 9, where the reference takes each digit alone. And the op's own unknown token, where the
    tokenizer has no such special token.
    """
    lacking = {byte for character, byte in BYTES.items() if character not in spec["model"]["vocab"]}
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    outside = {code for code in codes if not lacking.isdisjoint(chr(code).encode())} | _of_other_class() | {0}
    if _takes_digits_alone(spec):
        outside |= {code for code in codes if code > 0x7F and unicodedata.category(chr(code)).startswith("N")}
    starts = sorted(code for code in outside if code - 1 not in outside)
    ends = sorted(code for code in outside if code + 1 not in outside)
    ranges = "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in zip(starts, ends, strict=True))
    known = any(token["content"] == OP_UNKNOWN for token in spec["added_tokens"])
    return f"[{ranges}]" if known else f"[{ranges}]|{re.escape(OP_UNKNOWN)}"


@cache
def _of_other_class() -> frozenset[int]:
    """Code points that are letter, number, blank or symbol to the reference's engine, and another of these to the op.

    (The op follows Unicode 13 and takes U+0085 for a symbol.) Both engines get a vocabulary whose merges show between
    which of the characters in a{code}1{code}! a word ends. Planes 4 to 13 are unassigned, 15 and 16 private for good.
    """
    merges = list(dict.fromkeys(pair for byte in BYTES for pair in (("a", byte), (byte, "1"), (byte, "!"))))
    vocab = {token: place for place, token in enumerate(dict.fromkeys([*BYTES, *map("".join, merges)]))}
    reference = Tokenizer(models.BPE(vocab, merges))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spec: dict[str, Any] = {"model": {"vocab": vocab, "merges": merges}, "added_tokens": [], "pre_tokenizer": None}
    session = _session(_tokenizer_graph(spec, "").SerializeToString())

    def differ(codes: Sequence[int]) -> bool:
        text = "".join(f"a{chr(code)}1{chr(code)}!" for code in codes)
        return _encode(session, text) != reference.encode(text).ids

    codes = [*range(1, 0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xF0000)]
    blocks = (codes[start : start + 64] for start in range(0, len(codes), 64))
    return frozenset(code for block in blocks if differ(block) for code in block if differ([code]))


def _write_and_prove_onnx(spec: dict[str, Any], samples: Sequence[Sample], folder: Path) -> int:
    """Writes both graphs and runs them as written. Returns how many texts tokenizer.json has to encode."""
    paths = [folder / name for name in ONNX]
    outside = _outside(spec)
    inside = [sample for sample in samples if not re.search(outside, sample.text)]
    ids = {token_id for sample in samples for token_id in sample.ids}
    onnx.save(_tokenizer_graph(spec, outside), paths[0])
    onnx.save(_detokenizer_graph(spec), paths[1])
    try:
        encoder, decoder = (_session(str(path)) for path in paths)
        wrong_ids = sum(_encode(encoder, sample.text) != sample.ids for sample in inside)
        piece = {token_id: decoder.run(["piece"], {"id": np.array(token_id)})[0].tobytes() for token_id in ids}
    except Exception as error:  # ONNX Runtime's own exceptions derive from no common class but this one
        raise _NotExact(f"ONNX Runtime does not run the graphs: {type(error).__name__}") from None
    joined = ((b"".join(piece[token_id] for token_id in sample.ids), sample.decoded) for sample in samples)
    wrong_text = sum(pieces.decode(errors="replace") != decoded for pieces, decoded in joined)
    if wrong_ids or wrong_text:
        reason = f"ids differ on {wrong_ids} of {len(inside)} texts, decoded text on {wrong_text} of {len(samples)}"
        raise _NotExact(f"the ONNX graphs are not exact: {reason}", wrong_ids + wrong_text)
    return len(samples) - len(inside)


def _session(path_or_model: str | bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    return onnxruntime.InferenceSession(path_or_model, options, providers=["CPUExecutionProvider"])


def _encode(session: Any, text: str) -> list[int]:
    ids: list[int] = session.run(None, {"text": np.array([text], dtype=object)})[0].tolist()
    return ids


def _tokenizer_graph(spec: dict[str, Any], outside: str) -> Any:
    """text [1] → ids int64 [n]; the metadata `outside` is the expression of `_outside`.

    The op of release 0.15 loses the end of a text such as "a<b": the beginning of a special token, then one more
    character. So the graph ends every text with a whole special token (one that no other runs into), and takes its id
    off again.
    """
    model, added = spec["model"], spec["added_tokens"]
    if _takes_digits_alone(spec):  # as the op does with added tokens
        added = [*added, *({"content": digit, "id": model["vocab"].get(digit, 0)} for digit in string.digits)]
    contents = [token["content"] for token in added]
    fit = (token for token in contents if len(token) > 1 and not any(token[0] in other[1:] for other in contents))
    closing = next(fit, None)
    nodes = [
        helper.make_node(
            "GPT2Tokenizer",
            ["closed" if closing else "text"],
            ["rows", "mask"],
            domain="ai.onnx.contrib",
            vocab=json.dumps(model["vocab"], separators=(",", ":")),
            merges="\n".join(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]),
            added_token="\n".join(f"{token['content']}={token['id']}" for token in added),
            model_name="GPT2",  # any other name adds special tokens of its own
        ),
        helper.make_node("Reshape", ["rows", "flat"], ["row" if closing else "ids"]),  # [1, n] → [n]
    ]
    constants = [numpy_helper.from_array(np.array([-1]), "flat")]
    if closing:
        nodes.insert(0, helper.make_node("StringConcat", ["text", "closing"], ["closed"]))
        nodes.append(helper.make_node("Slice", ["row", "first", "flat"], ["ids"]))  # up to -1: all but the last
        constants.append(numpy_helper.from_array(np.array([0]), "first"))
        constants.append(helper.make_tensor("closing", TensorProto.STRING, [1], [closing.encode()]))
    text = helper.make_tensor_value_info("text", TensorProto.STRING, [1])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    model_proto = _model(helper.make_graph(nodes, "tokenizer", [text], [ids], constants))
    helper.set_model_props(model_proto, {"outside": outside})
    return model_proto


def _detokenizer_graph(spec: dict[str, Any]) -> Any:
    """id int64 [] → piece uint8 [n], the token's bytes; none for ids past the table.

    The table itself can be had as well, for whoever would rather not run a graph for every token: token i is
    table[all_starts[i]:all_ends[i]].
    """
    table = {token_id: bytes(BYTES.get(c, 0) for c in token) for token, token_id in spec["model"]["vocab"].items()}
    table |= {token["id"]: token["content"].encode() for token in spec["added_tokens"]}
    pieces = [table.get(token_id, b"") for token_id in range(max(table) + 2)]  # the last one stands for ids past it
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    constants = {
        "bytes": np.frombuffer(b"".join(pieces), dtype=np.uint8),
        "starts": offsets[:-1],
        "ends": offsets[1:],
        "last": np.array([len(pieces) - 1]),
        "one": np.array([1]),
    }
    nodes = [
        helper.make_node("Reshape", ["id", "one"], ["row"]),
        helper.make_node("Min", ["row", "last"], ["known"]),
        helper.make_node("Gather", ["starts", "known"], ["start"]),
        helper.make_node("Gather", ["ends", "known"], ["end"]),
        helper.make_node("Slice", ["bytes", "start", "end"], ["piece"]),
        helper.make_node("Identity", ["bytes"], ["table"]),
        helper.make_node("Identity", ["starts"], ["all_starts"]),
        helper.make_node("Identity", ["ends"], ["all_ends"]),
    ]
    token_id = helper.make_tensor_value_info("id", TensorProto.INT64, [])
    outputs = [
        helper.make_tensor_value_info("piece", TensorProto.UINT8, ["n"]),
        helper.make_tensor_value_info("table", TensorProto.UINT8, ["bytes"]),
        helper.make_tensor_value_info("all_starts", TensorProto.INT64, ["tokens"]),
        helper.make_tensor_value_info("all_ends", TensorProto.INT64, ["tokens"]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return _model(helper.make_graph(nodes, "detokenizer", [token_id], outputs, tensors))


def _model(graph: Any) -> Any:  # opset 20 is the first with StringConcat; ONNX Runtime has it since 1.17
    used = sorted({node.domain for node in graph.node})
    opsets = [helper.make_opsetid(domain, 1 if domain else 20) for domain in used]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="stip")
