"""`make bench-equivalence`: the same tokens and logits as the original, over real sockets (SmolLM2-135M, float32).

1. Greedy: 20 prompts × 64 tokens through the websocket at default settings, against transformers' generate().
2. Logits: every full row of those answers, against the original model in one forward.
3. Sampled at several settings: tokens drawn from top rows, against those drawn from full rows with the same seed.

--scheme and --head choose the level. With the classifier on the device every row is full, and 3. compares nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plain import RESULTS, machine, plain_model, smollm2_source
from benchmarks.process import listening, run
from benchmarks.prompts import PROMPTS
from device_app.bundle import Bundle
from device_app.connection import Address, Connection
from device_app.sampler import Row, Sampler, Sampling
from device_app.session import Session
from examples.smollm2 import smollm2_gguf
from shared.levels import SCHEMES

TOKENS = 64
TOP_K = 256
DEFAULT = ("permutation", "cloud")
SAMPLINGS = (
    Sampling(temperature=0.5, top_p=0.95, seed=1),
    Sampling(temperature=1.0, top_p=0.9, min_p=0.02, seed=2),
    Sampling(temperature=1.0, repetition_penalty=1.2, seed=3),
    Sampling(temperature=1.5, seed=4),
    Sampling(temperature=1.5, top_p=0.8, min_p=0.05, repetition_penalty=1.1, seed=5),
    Sampling(temperature=1.0, top_k=40, repetition_penalty=0.9, seed=6),
)


class Stip:
    """The three parties, up to revealed rows."""

    def __init__(self, bundle: Bundle, url: str) -> None:
        manifest = bundle.manifest
        session = Session(
            bundle.key, bundle.embed, bundle.classify, served_name=manifest.served_name, context=manifest.context
        )
        self.connection = Connection(session, Address(url))
        self.vocab_size = manifest.vocab_size
        self.drawn = self.fetched = 0

    def answer(self, prompt: list[int], sampling: Sampling, top_k: int) -> tuple[list[int], list[Row]]:
        """TOKENS ids of an answer, on past its end, and the row that each was chosen from."""
        sampler, ids, rows = Sampler(sampling, self.vocab_size, prompt), list(prompt), []
        temperature = sampling.temperature or 1.0
        for _ in range(TOKENS):
            [row] = self.connection.rows(ids, top_k=top_k, temperature=temperature)
            token = sampler.choose(row, len(ids))
            self.drawn += 1
            if token is None:
                self.fetched += 1
                [row] = self.connection.rows(ids, top_k=0, temperature=temperature)
                token = sampler.choose(row, len(ids))
                assert token is not None
            sampler.observe(token)
            ids.append(token)
            rows.append(row)
        return ids[len(prompt) :], rows


def main() -> None:
    """Prints the figures, writes them, and fails if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=SCHEMES, default="permutation")
    parser.add_argument("--head", choices=("cloud", "device"), default="cloud")
    options = parser.parse_args()
    level = ["--scheme", options.scheme, "--head", options.head]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "smollm2"
        run([sys.executable, "-m", "export", "model", smollm2_gguf(), "--out", out, "--dtype", "float32", *level])
        bundle = Bundle.open(out / "device")
        serve: list[str | Path] = [sys.executable, "-m", "cloud_backend", "serve", out / "cloud", "--port", "0"]
        with listening(serve, log="stderr") as url:
            figures = {"scheme": options.scheme, "head": options.head} | measure(bundle, Stip(bundle, url))
    print(json.dumps(figures, indent=2))
    RESULTS.mkdir(exist_ok=True)
    name = "-".join(["equivalence", *(part for part in (options.scheme, options.head) if part not in DEFAULT)])
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    if figures["greedy"]["differing"] > figures["greedy"]["excused"] or figures["max_logit_difference"] > 1e-3:
        sys.exit("bench: error: the protected model does not compute what the original computes")
    if any(row["equal"] != row["answers"] for row in figures["sampled"]):
        sys.exit("bench: error: sampling from top rows differs from sampling from full rows")


def measure(bundle: Bundle, stip: Stip) -> dict[str, Any]:
    """Every figure."""
    assert bundle.template is not None
    prompts = [
        bundle.tokenizer.encode(bundle.template.render([{"role": "user", "content": prompt}])) for prompt in PROMPTS
    ]
    greedy, worst = compare_greedy(stip, prompts)
    return {
        "machine": machine(),
        "model": "SmolLM2-135M-Instruct, float32",
        "greedy": greedy,
        "max_logit_difference": worst,
        "sampled": [
            compare_sampled(stip, prompts[:6], sampling) for sampling in SAMPLINGS if bundle.manifest.head == "cloud"
        ],
    }


@torch.inference_mode()
def compare_greedy(stip: Stip, prompts: Sequence[list[int]]) -> tuple[dict[str, int], float]:
    """Counts of tokens that are generate()'s, and the largest difference of any logit."""
    model = plain_model(smollm2_source(), torch.float32)
    model.generation_config.eos_token_id = None  # so that every answer has all its tokens
    tokens = differing = excused = 0
    worst = 0.0
    for number, prompt in enumerate(prompts, 1):
        ids = torch.tensor([prompt])
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        expected = generated[0, len(prompt) :].tolist()
        seen, _ = stip.answer(prompt, Sampling(), TOP_K)
        _, rows = stip.answer(prompt, Sampling(), 0)
        logits = model(torch.tensor([prompt + seen])).logits[0, len(prompt) - 1 : -1].numpy()
        difference = max(float(np.abs(row.values - one).max()) for row, one in zip(rows, logits, strict=False))
        worst = max(worst, difference)
        tokens += len(expected)
        if seen != expected:
            at = next(at for at, pair in enumerate(zip(seen, expected, strict=False)) if pair[0] != pair[1])
            margin = float(np.diff(np.partition(logits[at], -2)[-2:])[0])
            differing += 1
            excused += margin <= 2 * difference
            print(f"prompt {number}: differs at token {at}, where the reference's margin is {margin:.1e}")
        print(f"prompt {number}: {len(seen)} tokens, max |diff| {difference:.1e}", file=sys.stderr)
    return {"prompts": len(prompts), "tokens": tokens, "differing": differing, "excused": excused}, worst


def compare_sampled(stip: Stip, prompts: Sequence[list[int]], sampling: Sampling) -> dict[str, Any]:
    """Answers drawn from top rows against the same drawn from full rows, and the share of rows fetched in full."""
    stip.drawn = stip.fetched = 0
    partial = [stip.answer(prompt, sampling, TOP_K)[0] for prompt in prompts]
    share = stip.fetched / stip.drawn
    full = [stip.answer(prompt, sampling, 0)[0] for prompt in prompts]
    return {
        "sampling": dict(vars(sampling)),
        "answers": len(prompts),
        "equal": sum(one == other for one, other in zip(partial, full, strict=True)),
        "tokens": sum(map(len, full)),
        "rows_fetched_in_full": share,
    }


if __name__ == "__main__":
    main()
