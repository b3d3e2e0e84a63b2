"""`stip-device embed`, `classify`, `describe`, `translate`: many inputs, one result each.

An input that fails is an error line on stderr; the others go on, and the exit status is 1 at the end. Where inputs
are texts its place on stdout is kept (null, or an empty line), so that line n still belongs to text n.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from device_app.assistant import DESCRIBE, Assistant
from device_app.counters import Counters
from device_app.encoder import Encoder, Prediction
from device_app.options import opened
from device_app.terminal import note
from device_app.text import one_line, printable
from shared.errors import RefusedError, StipError, UsageError
from shared.levels import limit
from shared.manifest import Kind

AT_ONCE = 32  # texts that are asked about together
OF_THE_INPUT = ("context_full", "too_large", "not_finite")  # refusals that leave hope for the other inputs
FIGURES = ("bytes_up", "bytes_down", "round_trips")


def embed(arguments: argparse.Namespace) -> None:
    """One JSON array of floats for each text."""
    with _encoder(arguments, "encoder") as encoder:
        encoder.want("embed")

        def answer(texts: Sequence[str]) -> list[dict[str, Any]]:
            vectors = encoder.embed(texts)
            _say_what_was_dropped(encoder)
            return [{"embedding": _shortest(vector)} for vector in vectors]

        output = _Output(arguments.json, lambda fields: [json.dumps(fields["embedding"])], gap="null")
        for_texts(arguments.inputs, answer, output, AT_ONCE)
        output.finish(encoder.bundle.manifest.scheme, _figures([encoder.counters]))


def classify(arguments: argparse.Namespace) -> None:
    """`label<TAB>probability` for each input, as many as --top says; the file before it where there are several."""
    if arguments.top < 1:
        raise UsageError(f"--top: seen {arguments.top}, wanted at least 1")
    with _encoder(arguments, "encoder", "image-encoder") as encoder:
        encoder.want("logits")
        named = len(arguments.inputs) > 1

        def fields(predictions: Sequence[Prediction]) -> dict[str, Any]:
            top = predictions[: arguments.top]
            return {"labels": [{"label": one.label, "probability": one.probability} for one in top]}

        def texts(inputs: Sequence[str]) -> list[dict[str, Any]]:
            answers = encoder.classify(inputs)
            _say_what_was_dropped(encoder)
            return [fields(predictions) for predictions in answers]

        def lines(result: dict[str, Any]) -> list[str]:
            before = f"{result['file']}\t" if named and "file" in result else ""
            return [f"{before}{one_line(one['label'])}\t{one['probability']:.6f}" for one in result["labels"]]

        if encoder.bundle.manifest.kind == "image-encoder":
            output = _Output(arguments.json, lines)
            for_files(arguments.inputs, lambda file: fields(encoder.classify_images([file])[0]), output)
        else:
            output = _Output(arguments.json, lines, gap="")
            for_texts(arguments.inputs, texts, output, AT_ONCE)
        output.finish(encoder.bundle.manifest.scheme, _figures([encoder.counters]))


def describe(arguments: argparse.Namespace) -> None:
    """`FILE<TAB>text` for each image, the text in one line."""
    prompt = DESCRIBE if arguments.prompt is None else arguments.prompt
    with _assistant(arguments, "vision-decoder") as assistant:
        counters: list[Counters] = []

        def answer(file: str) -> dict[str, Any]:
            try:
                return {"text": assistant.describe(file, prompt, max_tokens=arguments.max_tokens)}
            finally:
                counters.append(assistant.counters)

        output = _Output(arguments.json, lambda fields: [f"{fields['file']}\t{fields['text']}"])
        for_files(arguments.inputs, answer, output)
        output.finish(assistant.bundle.manifest.scheme, _figures(counters))


def translate(arguments: argparse.Namespace) -> None:
    """One line for each text. An empty one stays empty."""
    with _assistant(arguments, "encoder-decoder") as assistant:
        counters: list[Counters] = []

        def answer(texts: Sequence[str]) -> list[dict[str, Any]]:
            if not texts[0].strip():
                return [{"text": "", "finish_reason": "stop", "tokens": 0}]
            try:
                made = assistant.translate(texts[0], max_tokens=arguments.max_tokens).finish()
            finally:
                counters.append(assistant.counters)
            return [{"text": made.text, "finish_reason": made.finish_reason, "tokens": made.stats.tokens}]

        output = _Output(arguments.json, lambda fields: [one_line(fields["text"])], gap="")
        for_texts(arguments.inputs, answer, output, 1)
        output.finish(assistant.bundle.manifest.scheme, _figures(counters))


class _Output:
    """Results on stdout as they come, or with --json all as one object at the end; failures on stderr."""

    def __init__(self, as_json: bool, lines: Callable[[dict[str, Any]], list[str]], gap: str | None = None) -> None:
        """lines: of a result. gap: what stands for one that failed, if anything."""
        self._json = as_json
        self._lines = lines
        self._gap = gap
        self._results: list[dict[str, Any]] = []
        self._failed = False

    def result(self, fields: dict[str, Any]) -> None:
        if self._json:
            self._results.append(fields)
            return
        for line in self._lines(fields):
            print(line, flush=True)

    def failure(self, error: StipError, name: str, fields: dict[str, Any]) -> None:
        """An input that failed, and how the error calls it where it does not by itself."""
        self._failed = True
        message = f"{name}{error}"
        note(f"stip-device: error: {message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        if self._json:
            self._results.append({**fields, "error": message})
        elif self._gap is not None:
            print(self._gap, flush=True)

    def finish(self, scheme: str, figures: dict[str, int]) -> None:
        """The object, if it is wanted, and what the protection is worth. Exits with 1 where an input failed."""
        if self._json:
            print(json.dumps({"results": self._results, **figures}, ensure_ascii=False), flush=True)
        note(f"stip-device: {limit(scheme)}")
        if self._failed:
            sys.exit(1)


def for_texts(
    inputs: Sequence[str], answer: Callable[[Sequence[str]], list[dict[str, Any]]], output: _Output, at_once: int
) -> None:
    """Answers texts, several together; where one of them fails, each by itself."""
    texts, number = iter(_texts(inputs)), 1
    typed = "-" in inputs and sys.stdin.isatty()  # whoever types waits for an answer to each line
    while chunk := list(islice(texts, 1 if typed else at_once)):
        _answer_texts(chunk, number, answer, output)
        number += len(chunk)


def _answer_texts(
    texts: Sequence[str], number: int, answer: Callable[[Sequence[str]], list[dict[str, Any]]], output: _Output
) -> None:
    try:
        for fields in answer(texts):
            output.result(fields)
    except (UsageError, RefusedError) as error:
        if not _of_the_input(error):
            raise
        if len(texts) == 1:
            output.failure(error, f"input {number}: ", {})
            return
        for at, text in enumerate(texts, number):
            _answer_texts([text], at, answer, output)


def for_files(files: Sequence[str], answer: Callable[[str], dict[str, Any]], output: _Output) -> None:
    """Answers files, one after another."""
    for file in files:
        named = {"file": printable(file)}
        try:
            output.result(named | answer(file))
        except UsageError as error:
            output.failure(error, "", named)
        except RefusedError as error:
            if not _of_the_input(error):
                raise
            output.failure(error, f"{named['file']}: ", named)


def _of_the_input(error: StipError) -> bool:
    return isinstance(error, UsageError) or (isinstance(error, RefusedError) and error.code in OF_THE_INPUT)


def _texts(inputs: Iterable[str]) -> Iterator[str]:
    """The inputs, with the lines of stdin in place of a -."""
    for text in inputs:
        if text != "-":
            yield text
            continue
        for line in sys.stdin.buffer:
            yield line.decode("utf-8", "replace").rstrip("\r\n")


def _encoder(arguments: argparse.Namespace, *kinds: Kind) -> Encoder:
    options = opened(arguments)
    options["bundle"].want_kind(arguments.name, *kinds)
    return Encoder(**options, truncate=arguments.truncate)


def _assistant(arguments: argparse.Namespace, *kinds: Kind) -> Assistant:
    if arguments.max_tokens < 1:
        raise UsageError(f"--max-tokens: seen {arguments.max_tokens}, wanted at least 1")
    options = opened(arguments)
    options["bundle"].want_kind(arguments.name, *kinds)
    return Assistant(**options)


def _say_what_was_dropped(encoder: Encoder) -> None:
    if dropped := sum(encoder.dropped_tokens):
        cut = sum(over > 0 for over in encoder.dropped_tokens)
        note(f"stip-device: {cut} of {len(encoder.dropped_tokens)} texts were too long: {dropped} tokens were dropped")


def _figures(counters: Sequence[Counters]) -> dict[str, int]:
    return {name: sum(getattr(one, name) for one in counters) for name in FIGURES}


def _shortest(vector: np.ndarray) -> list[float]:
    """The floats with no more digits than float32 needs."""
    return [float(str(value)) for value in vector]
