"""`make families`: no loss of accuracy, family by family (the paper's table 5, on this machine, in float32).

The original is the stock model of transformers in float32. Ours are the two exported folders together: the device's
embeddings, hidden with its key, the cloud's checkpoint in the stock model, and results revealed with the key.

A result is a row of logits over the vocabulary or the classes or, of a model without a classifier, a hidden state. Its
class is the greatest entry. Another class is excused only at a tie: where the original's two greatest entries are no
further apart than twice the greatest difference, which is the last column. Σ|diff| is the sum over a result's entries
of |ours − original|, averaged over all results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor

from benchmarks.family_cases import CASES, Case
from benchmarks.plain import RESULTS, machine
from export.bundle import export_model
from export.check import TOLERANCE, written_rows
from export.families import Family, family_of
from export.original import has_pooler, original
from export.outputs import plain
from export.samples import IMAGE_AT, Samples
from export.source import Source, open_source
from export.streaming import streamed
from shared.wire import Array

POSITIONS = 128  # of a sequence
SEQUENCES = 8  # run at a time
IMAGES = 20  # run at a time


@dataclass
class Tally:
    """Figures of results that come in batches."""

    results: int = 0
    total: float = 0.0  # of all differences
    max_difference: float = 0.0
    largest: float = 0.0
    margins: list[Array] = field(default_factory=list)  # of the original's classes over the next best
    same: list[Array] = field(default_factory=list)

    def add(self, expected: Array, seen: Array) -> None:
        """Compares results [n, width]."""
        difference = np.abs(seen - expected)
        assert np.isfinite(difference).all()
        self.results += len(expected)
        self.total += float(difference.sum(dtype=np.float64))
        self.max_difference = max(self.max_difference, float(difference.max()))
        self.largest = max(self.largest, float(np.abs(expected).max()))
        top = np.partition(expected, -2, axis=-1)[:, -2:]
        self.margins.append(top[:, 1] - top[:, 0])
        self.same.append(expected.argmax(-1) == seen.argmax(-1))

    def figures(self) -> dict[str, Any]:
        """near_ties: results whose margin the greatest difference could turn; differing: margins where a class did."""
        margins, same = np.concatenate(self.margins), np.concatenate(self.same)
        return {
            "results": self.results,
            "sum_of_differences": self.total / self.results,
            "max_difference": self.max_difference,
            "largest": self.largest,
            "same_class": int(same.sum()),
            "near_ties": int((margins <= 2 * self.max_difference).sum()),
            "differing": sorted(map(float, margins[~same])),
        }


def main() -> None:
    """Prints a line for each case, stores the figures and the table, and fails for more than rounding explains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="repeatable")
    parser.add_argument("--results", type=int, help="at most so many results of each, for a quick look; not stored")
    parser.add_argument("--table", action="store_true", help="write families.md from the stored figures alone")
    options = parser.parse_args()
    figures = stored()
    if not options.table:
        for case in CASES:
            if options.only is None or case.name in options.only:
                figures[case.name] = measure(case, min(case.results, options.results or case.results))
                print("\n".join(lines({case.name: figures[case.name]})[2:]), flush=True)
    if options.results is None:
        RESULTS.mkdir(exist_ok=True)
        if not options.table:
            (RESULTS / "families.json").write_text(
                json.dumps({"machine": machine(), "cases": figures}, indent=2) + "\n"
            )
        (RESULTS / "families.md").write_text(table(figures), encoding="utf-8")
    print("\n" + table(figures))
    for name, row in figures.items():
        if not row["max_difference"] <= TOLERANCE * max(1.0, row["largest"]) or not tied(row):
            sys.exit(f"bench: error: {name}: it differs from the original by more than rounding explains")


def tied(row: dict[str, Any]) -> bool:
    """Whether the original's two best were the same but for the numeric error, wherever the class is another one."""
    return all(margin <= 2 * row["max_difference"] for margin in row["differing"])


def stored() -> dict[str, Any]:
    """The stored figures, by case."""
    path = RESULTS / "families.json"
    cases: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    return cases


def measure(case: Case, results: int) -> dict[str, Any]:
    """Exports the model and compares results of both."""
    started = time.monotonic()
    build = Path(__file__).resolve().parent.parent / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as scratch:
        model = case.checkpoint(Path(scratch) / "checkpoint")
        out = Path(scratch) / "out"
        export_model(str(model), out, dtype="float32", name="measured")
        source = open_source(str(model))
        family = family_of(source.config)
        read, tally = original(source, family, torch.float32), Tally()
        for samples in batches(source, family, model, case.real):
            expected = streamed(source.config, read, plain(samples.inputs(), pooled=has_pooler(source)))
            tally.add(expected, written_rows(family, out / "cloud", out / "device", samples, pooled=has_pooler(source)))
            if tally.results >= results:
                break
        parameters = sum(torch.Size(shape).numel() for shape in source.shapes.values())
    return {
        "weights": "real" if case.real else "random",
        "parameters": parameters,
        "kind": "hidden states" if family.kind == "encoder" else "logits",
        **tally.figures(),
        "seconds": round(time.monotonic() - started),
    }


def batches(source: Source, family: Family, model: Path, real: bool) -> Iterator[Samples]:
    """Samples without end: text for real weights, ids drawn evenly for random ones, pixels drawn evenly."""
    rng = np.random.default_rng(0)
    config = source.config.get_text_config()
    positions = min(POSITIONS, getattr(config, "max_position_embeddings", POSITIONS))
    text = read_text(source) if real else None
    while True:
        if family.text is None:
            images = _images(rng, family, source, IMAGES)
            yield Samples(images=images, pixels=_pixels(model, images))
            continue
        if text is not None:
            starts = rng.integers(0, len(text) - positions, SEQUENCES)
            ids = np.stack([text[start : start + positions] for start in starts])
        else:
            ids = rng.integers(3, config.vocab_size - 1, (SEQUENCES, positions))  # no special tokens
        if family.image is not None:
            yield _with_images(rng, family, source, model, ids)
        else:
            yield Samples(ids, ids[:, ::-1].copy() if family.kind == "encoder-decoder" else None)


def read_text(source: Source) -> Array:
    """Ids [tokens] of a real text that every Python carries: its language reference."""
    encoded = source.tokenizer()(list(topics.values()), add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray(ids, np.int64) for ids in encoded])


def _images(rng: np.random.Generator, family: Family, source: Source, count: int) -> Array:
    assert family.image is not None
    size = family.image.config(source.config).image_size
    return rng.integers(0, 256, (count, size, size, 3), np.uint8)


def _pixels(model: Path, images: Array) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    pixels: torch.Tensor = processor(list(images), return_tensors="pt")["pixel_values"]
    return pixels


def _with_images(rng: np.random.Generator, family: Family, source: Source, model: Path, ids: Array) -> Samples:
    """An image in each sequence."""
    assert family.image is not None
    images, vision = _images(rng, family, source, len(ids)), family.image.config(source.config)
    tokens = (vision.image_size // vision.patch_size) ** 2
    image = np.full((len(ids), tokens), source.config.image_token_id)
    ids = np.where(ids == source.config.image_token_id, 0, ids)
    ids = np.concatenate([ids[:, :IMAGE_AT], image, ids[:, IMAGE_AT:]], axis=1)
    return Samples(ids, images=images, pixels=_pixels(model, images), image_tokens=tokens)


def table(figures: dict[str, Any]) -> str:
    """The table in Markdown, with what its columns mean."""
    meaning = " ".join((__doc__ or "").split("\n\n")[2].split())
    return "\n".join(
        [*lines(figures), "", meaning, "Random weights have every tensor drawn, biases and gains too.", ""]
    )


def lines(figures: dict[str, Any]) -> list[str]:
    """Head and rows."""
    head = "model", "weights", "results", "Σ\\|diff\\|", "the paper's", "max \\|diff\\|", "greatest entry", "same class"
    rows = [f"| {' | '.join(head)} | ties |", "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for case in CASES:
        if (row := figures.get(case.name)) is None:
            continue
        share = "100 %" if tied(row) else f"{row['same_class']:,} of {row['results']:,}"
        if row["differing"]:
            margins = ", ".join(f"{margin:.1e}" for margin in row["differing"][:5])
            share += f", {len(row['differing'])} of them excused: margin {margins}" if tied(row) else f" ({margins})"
        rows.append(
            f"| {case.family} {case.size} | {row['weights']} | {row['results']:,} {row['kind']} | "
            f"{row['sum_of_differences']:.1e} | {case.paper or '–'} | {row['max_difference']:.1e} | "
            f"{row['largest']:.1f} | {share} | {row['near_ties']} |"
        )
    return rows


if __name__ == "__main__":
    main()
