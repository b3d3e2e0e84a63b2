"""`make bench-gpu`: what protection costs on a GPU, at the shapes of LLaMA2-7B and GPT-2 with random weights.

Batch 1, a prompt of 128 tokens, ms a token:
(s) STIP over loopback: a real cloud process, a real device session in a process of its own, greedy
(u) unprotected, in process: STIP's engine fed plain weights and ids
(t) unprotected, transformers alone: a static cache, launched kernel by kernel
(w) reading the weights once, at the bandwidth of a large copy on the card: no decoder of this batch can be faster

The columns take turns, round after round; a ratio is the median of the rounds' own ratios. Batch 32 is the throughput
of (s) and (u), and GPT-2 that of one forward of the stock model on transformed weights, as the paper measured it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, LlamaConfig
from transformers.utils import logging as transformers_logging

from benchmarks.card import Card
from benchmarks.full_cloud import PlainEngine
from benchmarks.gpu_table import table
from benchmarks.plain import RESULTS, machine
from benchmarks.process import listening
from benchmarks.random_devices import Decoded, Devices, devices
from benchmarks.random_export import RandomSource, write_export
from benchmarks.unprotected import in_process, static_cache
from cloud_backend.opening import load_model
from shared.wire import FloatName

PAPER = 45_366  # tokens/s: GPT-2 124m, batch 100 × 100 tokens
AIM = 1.5  # × reading the weights once


@dataclass(frozen=True)
class Shapes:
    """What is measured."""

    llama: Any
    gpt2: Any
    dtype: FloatName  # of LLaMA
    prompt: int
    tokens: int  # after the first, which waits for the prompt
    rounds: int
    together: int  # devices that decode at once
    forward: tuple[int, int]  # sequences and tokens of GPT-2's forward


def real() -> Shapes:
    """The paper's models, on any card that has the memory."""
    llama = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )
    return Shapes(llama, GPT2Config(architectures=["GPT2LMHeadModel"]), "bfloat16", 128, 64, 7, 32, (100, 100))


def tiny() -> Shapes:
    """The same path in seconds: says that all of it runs, and nothing about speed."""
    llama = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    )
    gpt2 = GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    gpt2.architectures = ["GPT2LMHeadModel"]
    return Shapes(llama, gpt2, "float32", 12, 8, 2, 5, (4, 16))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all of it, and writes the table and its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it runs; not stored")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the figures (default: among the results)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        hint = "run it where there is one, or try it out with --device cpu --tiny"
        sys.exit(f"bench: error: torch finds no CUDA device\nhint: {hint}")
    if options.device == "cpu" and not options.tiny:
        sys.exit("bench: error: --device cpu: a processor takes hours for these models\nhint: add --tiny")
    transformers_logging.set_verbosity_error()  # it would report the embedding as missing: it is, on purpose
    transformers_logging.disable_progress_bar()
    card = Card(options.device, machine()["processor"])
    build = Path(__file__).resolve().parent.parent / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as scratch:
        figures = measure(tiny() if options.tiny else real(), card, Path(scratch))
    print(table(figures))
    path = options.out or (None if options.tiny else RESULTS / f"gpu-{card.slug}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"\nwritten to {path.name}")


def measure(shapes: Shapes, card: Card, scratch: Path) -> dict[str, Any]:
    """Every figure of the table."""
    bandwidth = card.bandwidth()
    card.empty()
    llama = measure_llama(shapes, card, scratch / "llama", bandwidth)
    gpt2 = measure_gpt2(shapes, card, scratch / "gpt2")
    return {
        "machine": machine() | {"card": card.name, "cores": os.cpu_count()},
        "bandwidth": bandwidth,
        "llama": llama,
        "gpt2": gpt2,
        "card_peak_bytes": card.peak_bytes,
    }


def measure_llama(shapes: Shapes, card: Card, out: Path, bandwidth: float) -> dict[str, Any]:
    """Batch 1 and batch 32."""
    source = RandomSource(shapes.llama, shapes.dtype, card.device)
    started = time.monotonic()
    write_export(source, out, shapes.dtype)
    written, before = time.monotonic() - started, card.used()
    positions = shapes.prompt + shapes.tokens + 64
    kv_bytes = shapes.together * positions * position_bytes(shapes)
    serve: list[str | Path] = [sys.executable, "-m", "cloud_backend", "serve", out / "cloud", "--port", "0"]
    # Twice as much as is used: sessions that have just ended must not be waited for.
    serve += ["--device", card.device, "--kv-bytes", str(2 * kv_bytes)]
    with listening(serve, log="stderr") as url:
        cloud = card.used() - before
        engine = PlainEngine(source.model(), shapes.dtype, kv_bytes=kv_bytes)
        weights = weight_bytes(engine)
        with devices(out / "device", url, 1) as alone:
            single = batch_1(shapes, card, engine, alone, 1000 * weights / bandwidth)
        processes = min(shapes.together, max(1, (os.cpu_count() or 1) - 4))  # the cloud's two threads want cores too
        with devices(out / "device", url, processes) as many:
            together = batch_many(shapes, card, engine, many) | {"device_processes": processes}
        in_use = card.used()
    graphs = engine._graphs
    return {
        "parameters": sum(torch.Size(shape).numel() for shape in source.shapes.values()),
        "weight_bytes": weights,  # that a token reads: all but the embedding table
        "dtype": shapes.dtype,
        "prompt": shapes.prompt,
        "tokens": shapes.tokens,
        "rounds": shapes.rounds,
        "single": single,
        "together": together,
        "graphs": 0 if graphs is None else len(graphs._captured),  # of the unprotected engine, which is the same
        "export_seconds": written,
        "cloud_bytes": {"after_loading": cloud, "kv_budget": 2 * kv_bytes},
        "bytes_in_use": in_use,
    }


def batch_1(shapes: Shapes, card: Card, engine: PlainEngine, alone: Devices, read_ms: float) -> dict[str, Any]:
    """Milliseconds a token of the columns, and their ratios. read_ms: of column (w)."""
    (prompt,) = prompts(shapes, 1)
    last: list[Decoded] = []

    def stip() -> list[float]:
        alone.prefill([prompt])
        last[:] = [alone.decode(shapes.tokens)]
        return last[0].moments[0]

    columns: dict[str, Callable[[], list[float]]] = {
        "s": stip,
        "u": lambda: in_process(engine, [prompt], shapes.tokens)[1],
        "t": lambda: static_cache(engine._model, prompt, shapes.tokens),
    }
    for column in columns.values():
        column()  # warm up
    times: dict[str, list[float]] = {name: [] for name in columns}
    for _ in range(shapes.rounds):
        for name, column in columns.items():
            times[name].append(statistics.median(gaps(column())))
        card.used()
    times["w"] = [read_ms] * shapes.rounds
    ratios = {
        f"{one}/{other}": statistics.median(x / y for x, y in zip(times[one], times[other], strict=True))
        for one, other in (("s", "u"), ("s", "w"), ("u", "w"), ("s", "t"))
    }
    decoded = last[0]
    return {
        "ms_per_token": {name: statistics.median(values) for name, values in times.items()},
        "ratios": ratios,
        "aim": AIM,  # of s/w
        "cloud_ms_per_token": decoded.compute_us / 1000 / decoded.tokens,  # of (s), its last round
        "queue_ms_per_token": decoded.queue_us / 1000 / decoded.tokens,
        "device_cpu_ms_per_token": 1000 * sum(decoded.cpu_seconds) / decoded.tokens,
        "bytes_up_per_token": decoded.bytes_up / decoded.tokens,
        "bytes_down_per_token": decoded.bytes_down / decoded.tokens,
        "same_tokens": same(decoded.ids, in_process(engine, [prompt], shapes.tokens)[0]),
        "all_tokens": shapes.tokens + 1,
    }


def batch_many(shapes: Shapes, card: Card, engine: PlainEngine, many: Devices) -> dict[str, Any]:
    """Tokens a second of many devices that decode at once, after their prompts."""
    asked = prompts(shapes, shapes.together)
    rates: dict[str, list[float]] = {"s": [], "u": []}
    busiest = []
    for at in range(1 + max(1, shapes.rounds // 2)):
        many.prefill(asked)
        decoded = many.decode(shapes.tokens)
        ids, moments = in_process(engine, asked, shapes.tokens)
        card.used()
        if at:  # the first warms up
            rates["s"].append(decoded.tokens / decoded.seconds)
            rates["u"].append(shapes.together * shapes.tokens / (moments[-1] - moments[0]))
            busiest.append(decoded.busiest)
    return {
        "devices": shapes.together,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(x / y for x, y in zip(rates["s"], rates["u"], strict=True)),
        "busiest_process": statistics.median(busiest),
        "cloud_ms_per_step": decoded.compute_us / 1000 / decoded.tokens,
        "same_tokens": same(decoded.ids, ids),
        "all_tokens": shapes.together * (shapes.tokens + 1),
    }


def measure_gpt2(shapes: Shapes, card: Card, out: Path) -> dict[str, Any]:
    """One forward of the stock model on transformed weights, full logits of every token."""
    card.empty()
    write_export(RandomSource(shapes.gpt2, "float32", card.device), out, "float32")
    count, tokens = shapes.forward
    rates: dict[str, float] = {}
    dtypes: tuple[FloatName, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        model = load_model(out / "cloud", dtype, card.device)
        embeddings = torch.randn(count, tokens, shapes.gpt2.n_embd, dtype=model.dtype, device=card.device)
        with torch.inference_mode():
            taken = card.seconds(lambda: model(inputs_embeds=embeddings, use_cache=False).logits, 9)  # noqa: B023
        rates[dtype] = count * tokens / taken
        card.used()
    return {"sequences": count, "tokens": tokens, "tokens_per_second": rates, "paper": PAPER}


def prompts(shapes: Shapes, count: int) -> list[list[int]]:
    """Random ids."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, shapes.llama.vocab_size, shapes.prompt).tolist() for _ in range(count)]


def gaps(moments: list[float]) -> list[float]:
    """Milliseconds from token to token."""
    return [1000 * (after - before) for before, after in pairwise(moments)]


def same(seen: list[list[int]], wanted: list[list[int]]) -> int:
    """How many tokens are the same, of each answer up to the first that is not."""
    pairs = [zip(one, other, strict=True) for one, other in zip(seen, wanted, strict=True)]
    return sum(len(list(takewhile(lambda pair: pair[0] == pair[1], one))) for one in pairs)


def position_bytes(shapes: Shapes) -> int:
    """Of the KV cache."""
    config = shapes.llama
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[shapes.dtype]
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size)


def weight_bytes(engine: PlainEngine) -> int:
    """What a token reads of the model: every parameter but the embedding table, of which it takes a row."""
    embedding = engine._model.get_input_embeddings().weight
    return sum(one.nbytes for one in engine._model.parameters() if one is not embedding)


if __name__ == "__main__":
    main()
