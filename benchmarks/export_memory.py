"""`make bench-export`: peak memory of exporting a random 1-billion-parameter LLaMA checkpoint in several shards."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks.plain import RESULTS, machine, smollm2_source
from benchmarks.process import run
from export.shards import TensorPlan, plan_shards, write_index, write_shard
from export.stock import empty_model

LIMIT = 1.5 * 2**30
SHARD = 500 * 2**20


def main() -> None:
    """Makes the checkpoint and exports it, each in a process of its own; fails if the export took 1.5 GiB or more."""
    if sys.argv[1:]:
        print(json.dumps(make_checkpoint(Path(sys.argv[1]))))
        return
    build = Path(__file__).resolve().parent.parent / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        made = json.loads(run([sys.executable, "-m", "benchmarks.export_memory", checkpoint]).stdout)
        command: list[str | Path] = [sys.executable, "-m", "export", "model", checkpoint, "--json"]
        exported = run([*command, "--out", Path(scratch) / "out"])
    figures = {
        "machine": machine(),
        **made,
        "seconds": exported.seconds,
        "peak_bytes": exported.peak_bytes,
        "check": json.loads(exported.stdout)["check"],
    }
    print(json.dumps(figures, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "export_memory.json").write_text(json.dumps(figures, indent=2) + "\n")
    if exported.peak_bytes >= LIMIT:
        sys.exit(f"bench: error: peak memory {exported.peak_bytes / 2**30:.2f} GiB, wanted less than 1.5 GiB")


def make_checkpoint(folder: Path) -> dict[str, int]:
    """A LLaMA checkpoint of TinyLlama's shape with SmolLM2's tokenizer, every tensor random; written as it is drawn."""
    folder.mkdir(parents=True)
    source = smollm2_source()
    source.tokenizer().save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=source.config.vocab_size,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}
    shards = plan_shards((TensorPlan(name, shape, torch.bfloat16) for name, shape in shapes.items()), SHARD)
    generator = torch.Generator().manual_seed(0)

    def tensors(plans: list[TensorPlan]) -> Iterator[tuple[str, torch.Tensor]]:
        for plan in plans:
            scale = 0.3 if len(plan.shape) == 1 else plan.shape[-1] ** -0.5
            values = torch.randn(plan.shape, generator=generator) * scale + (1.0 if len(plan.shape) == 1 else 0.0)
            yield plan.name, values.to(plan.dtype)

    for file, plans in shards.items():
        write_shard(folder / file, plans, tensors(plans), {})
    write_index(folder, shards)
    return {"parameters": sum(torch.Size(shape).numel() for shape in shapes.values()), "shards": len(shards)}


if __name__ == "__main__":
    main()
