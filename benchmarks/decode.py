"""`make bench`: what protection costs while decoding, all columns in one run on SmolLM2-135M.

(a) unprotected, in process: STIP's engine fed plain weights and ids
(b) full cloud: the unprotected model behind the same kind of server, ids up, sampling in the cloud, ids streamed down
(c) STIP over the websocket, without drafts: a token a round trip
(d) transformers' generate()

and behind the table, of several devices (see `together`) and of one:

(e) 16 devices together against one alone
(f) one device alone, (c), against generate(), (d), in tokens/s
(g) 15 devices beside the prefill of another's long prompt, against the same without it
(h) how soon the device app sends its first frame, and its memory (see `startup`)

The columns take turns, round after round; a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from websockets.sync.client import connect

from benchmarks import startup, together
from benchmarks.full_cloud import PlainEngine, plain_engine, row_of
from benchmarks.plain import DTYPES, RESULTS, machine, plain_model, smollm2_source
from benchmarks.process import listening, run
from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.counters import Counters
from device_app.drafting import NO_DRAFTS
from device_app.sampler import Sampler, Sampling
from examples.smollm2 import smollm2_gguf

PROMPT = "Describe a traffic jam at dusk, seen from the driver's seat, in many sentences with colours and sounds."
STEPS = ("embed", "hide", "encode", "decode", "reveal", "sample", "detokenise")


def main() -> None:
    """Runs all columns and writes the table and its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch) / "smollm2", options.dtype, options.rounds, options.tokens)
    show(figures)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"decode-{options.dtype}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nwritten to benchmarks/results/{path.name}")


def measure(out: Path, dtype: str, rounds: int, tokens: int) -> dict[str, Any]:
    """Every figure of the table."""
    command: list[str | Path] = [sys.executable, "-m", "export", "model", smollm2_gguf(), "--out", out]
    exported = run([*command, "--dtype", dtype])
    bundle = Bundle.open(out / "device")
    assert bundle.template is not None
    prompt = bundle.tokenizer.encode(bundle.template.render([{"role": "user", "content": PROMPT}]))
    engine, stock = plain_engine(dtype), plain_model(smollm2_source(), DTYPES[dtype])
    serve: list[str | Path] = [sys.executable, "-m", "cloud_backend", "serve", out / "cloud", "--port", "0"]
    serve_plain = [sys.executable, "-m", "benchmarks.full_cloud", dtype]
    with listening(serve, log="stderr") as url, listening(serve_plain) as port:
        stip = Stip(bundle, url, tokens)
        columns: dict[str, Callable[[], list[float]]] = {
            "a": lambda: in_process(engine, prompt, tokens),
            "b": lambda: full_cloud(port, prompt, tokens),
            "c": stip.run,
            "d": lambda: generate(stock, prompt, tokens),
        }
        for column in columns.values():
            column()  # warm up
        times: dict[str, list[float]] = {name: [] for name in columns}
        work: dict[str, list[float]] = {step: [] for step in STEPS}
        for _ in range(rounds):
            for name, column in columns.items():
                times[name].append(statistics.median(column()))
            for step in STEPS:
                work[step].append(stip.counters.work_ns.get(step, 0) / 1e6 / tokens)
        traffic = stip.traffic()
        several = together.measure(out / "device", url, rounds, tokens)
        start = startup.measure(out / "device", url)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        f"{one}/{other}": statistics.median(x / y for x, y in zip(times[one], times[other], strict=True))
        for one, other in (("c", "b"), ("a", "d"), ("c", "d"))
    }
    against_generate = statistics.median(d / c for c, d in zip(times["c"], times["d"], strict=True))
    steps = {step: statistics.median(values) for step, values in work.items()}
    return {
        "machine": machine(),
        "dtype": dtype,
        "rounds": rounds,
        "tokens": tokens,
        "prompt_tokens": len(prompt),
        "ms_per_token": medians,
        "tokens_per_second": {name: 1000 / value for name, value in medians.items()},
        "ratios": ratios,
        "device_ms_per_token": steps | {"total": sum(steps.values())},
        **traffic,
        "devices": several | {"one_alone_to_generate": against_generate},
        "start": start,
        "export_seconds": exported.seconds,
        "export_peak_bytes": exported.peak_bytes,
    }


def gaps(moments: list[float]) -> list[float]:
    """Milliseconds from token to token: the first waits for the prompt and is left out."""
    return [1000 * (after - before) for before, after in pairwise(moments)]


def in_process(engine: PlainEngine, prompt: list[int], tokens: int) -> list[float]:
    """(a)"""
    cache, sampler, ids, moments = engine.new_cache(), Sampler(Sampling(), engine.vocab_size), prompt, []
    for position in range(len(prompt), len(prompt) + tokens):
        token = sampler.choose(row_of(engine.rows(cache, ids)), position)
        assert token is not None
        ids = [token]
        moments.append(time.perf_counter())
    return gaps(moments)


def full_cloud(port: str, prompt: list[int], tokens: int) -> list[float]:
    """(b)"""
    moments = []
    with connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None) as socket:
        socket.send(struct.pack(f"<{len(prompt) + 1}I", tokens, *prompt))
        for _ in range(tokens):
            socket.recv()
            moments.append(time.perf_counter())
    return gaps(moments)


class Stip:
    """(c): text in, text out, a token a round trip."""

    def __init__(self, bundle: Bundle, url: str, tokens: int) -> None:
        self._assistant = Assistant(bundle, Address(url), drafting=NO_DRAFTS)
        self._tokens = tokens
        self.counters = Counters()  # of the last answer

    def run(self, tokens: int | None = None) -> list[float]:
        """One answer."""
        answer = self._assistant.chat([{"role": "user", "content": PROMPT}], max_tokens=tokens or self._tokens)
        moments: list[float] = []
        for _ in answer:
            # A token inside a character shows with the next one; it takes that one's time.
            moments += [time.perf_counter()] * (len(answer.ids) - len(moments))
        self.counters = answer.stats.counters
        return gaps(moments)

    def traffic(self) -> dict[str, float]:
        """Bytes for the prompt and its first token, and for each further token, up and down."""
        self._assistant.close()  # forgets what the cloud holds
        self.run(1)
        first = self.counters
        self._assistant.close()
        self.run()
        every, more = self.counters, self._tokens - 1
        return {
            "prompt_bytes_up": first.bytes_up,
            "prompt_bytes_down": first.bytes_down,
            "token_bytes_up": (every.bytes_up - first.bytes_up) / more,
            "token_bytes_down": (every.bytes_down - first.bytes_down) / more,
        }


class _Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the prompt comes first, as a batch
            self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, prompt: list[int], tokens: int) -> list[float]:
    """(d)"""
    clock = _Clock()
    ids = torch.tensor([prompt])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
        pad_token_id=0,
    )
    return gaps(clock.moments)


def show(figures: dict[str, Any]) -> None:
    """The table."""
    names = {"a": "(a) in process", "b": "(b) full cloud", "c": "(c) STIP", "d": "(d) generate()"}
    print(
        f"\nSmolLM2-135M, {figures['dtype']}, {figures['machine']['processor']}, "
        f"{figures['machine']['threads']} threads, {figures['rounds']} rounds of {figures['tokens']} tokens\n"
    )
    print(f"{'':<26}" + "".join(f"{title:>16}" for title in names.values()))
    for title, key in (("ms a token (median)", "ms_per_token"), ("tokens/s", "tokens_per_second")):
        print(f"{title:<26}" + "".join(f"{figures[key][name]:>16.2f}" for name in names))
    print("\nratios    " + "   ".join(f"{key} {value:.3f}" for key, value in figures["ratios"].items()))
    steps = figures["device_ms_per_token"]
    print("device    " + "   ".join(f"{step} {value:.3f}" for step, value in steps.items()) + "   (ms a token)")
    print(
        f"traffic   a token: {figures['token_bytes_up']:.0f} B up, {figures['token_bytes_down']:.0f} B down; "
        f"the prompt ({figures['prompt_tokens']} tokens): {figures['prompt_bytes_up']} B up, "
        f"{figures['prompt_bytes_down']} B down"
    )
    print(f"export    {figures['export_seconds']:.1f} s, peak {figures['export_peak_bytes'] / 2**20:.0f} MiB")
    together.show(figures["devices"], figures["devices"]["one_alone_to_generate"])
    startup.show(figures["start"])


if __name__ == "__main__":
    main()
