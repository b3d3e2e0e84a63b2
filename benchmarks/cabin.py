"""`python -m benchmarks.cabin`: the cabin example for 10 minutes over a line that is cut 20 times.

The images are as large as LLaVA-1.5's to a device (336 × 336 pixels, 576 patches of 1,024 values); the model behind
them is a small one of random weights, so that two cores can be the cloud as well. Frames come faster than it can
describe them. What must hold:

- no frame is told of twice, and none is lost: each is described, or named as dropped where the queue was full, or as
  no image where it is none
- memory is flat: over the last third of the time it is on average at most 2 % above the middle third. Files that are
  mapped do not count
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig

from benchmarks.drive import Drive, drive
from benchmarks.plain import RESULTS, machine, smollm2_source
from benchmarks.process import run, serving
from benchmarks.random_weights import write_random
from benchmarks.tunnel import tunnels
from benchmarks.watch import Sample

IMAGE_TOKEN = 7  # one of SmolLM2's vocabulary that no text contains
GROWTH_MOST = 0.02
QUEUE = 4
OPTIONS = ("--remove", "--max-tokens", "16")
SILENT = 4  # stretches beside the cuts in which packets are only late
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    """Prints the figures, writes them, and fails if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--longest", type=float, default=60.0, metavar="S", help="of the stretches without network")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="from one frame to the next one")
    options = parser.parse_args()
    seconds = 60 * options.minutes
    if options.cuts < 2 or options.every <= 0 or not 0 < options.longest < seconds / 3:
        parser.error("wanted at least 2 cuts, frames, and a longest stretch below a third of the time")
    darks = tunnels(random.Random(1), options.cuts, SILENT, seconds, options.longest)
    with cloud() as (bundle, url):
        drove = drive(bundle, url, darks, every=options.every, queue=QUEUE, options=OPTIONS)
    figures = {"machine": machine(), "minutes": options.minutes, "every_seconds": options.every} | figures_of(drove)
    print(json.dumps(figures, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cabin.json").write_text(json.dumps(figures, indent=2) + "\n")
    broken = drove.broken_claims()
    if drove.cuts < options.cuts:
        broken.append(f"cuts: seen {drove.cuts}, wanted {options.cuts}")
    if (growth := figures["memory_bytes"]["growth"]) > GROWTH_MOST:
        broken.append(f"growth: seen {growth:.1%} in the last third, wanted {GROWTH_MOST:.0%}")
    if broken:
        sys.exit("bench: error: " + "; ".join(broken))


@contextmanager
def cloud() -> Iterator[tuple[Path, str]]:
    """The device half of the model, and the URL of a server of the other one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "llava", Path(scratch) / "export"
        _checkpoint(folder)
        run([sys.executable, "-m", "export", "model", folder, "--out", out, "--dtype", "float32"])
        serve: list[str | Path] = [sys.executable, "-m", "cloud_backend", "serve", out / "cloud", "--port", "0"]
        with serving([*serve, "--kv-bytes", "256M"], log="stderr") as server:
            yield out / "device", server.address


def _checkpoint(folder: Path) -> None:
    text = smollm2_source().config.to_dict() | {"num_hidden_layers": 4}
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=1024,
        num_attention_heads=16,
        num_hidden_layers=3,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        architectures=["LlavaForConditionalGeneration"],
    )
    write_random(config, folder)
    tokenizer = smollm2_source().tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("PLACEHOLDER", tokenizer.convert_ids_to_tokens(IMAGE_TOKEN))
    tokenizer.save_pretrained(folder)
    size = vision.image_size
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )


def figures_of(drove: Drive) -> dict[str, Any]:
    """What the program did and took."""
    described = [said.fields for said in drove.said if "text" in said.fields]
    return {
        "options": ["--queue", str(QUEUE), *OPTIONS],
        "seconds": drove.seconds,
        "cuts": drove.cuts,
        "offline_seconds": [state["offline_seconds"] for state in drove.states("online")],
        "frames": {
            "written": len(drove.written),
            "described": len(described),
            "dropped": len(drove.frames("dropped")),
            "no_image": len(drove.frames("error")),
        },
        "a_description": {
            name: statistics.median(fields[name] for fields in described)
            for name in ("seconds", "tokens", "bytes_up", "bytes_down")
        },
        "memory_bytes": _memory(drove.samples) | {"peak_with_mapped_files": drove.peak_resident},
        "cpu": {
            "cores_used": drove.cpu_seconds / drove.seconds,
            "seconds_a_description": drove.cpu_seconds / len(described),
        },
    }


def _memory(samples: list[Sample]) -> dict[str, float]:
    """That of the program itself, without the files that it maps."""
    memory = [sample.memory for sample in samples]
    third = len(memory) // 3
    first, middle, last = (statistics.mean(memory[at * third : (at + 1) * third]) for at in range(3))
    return {
        "start": memory[0],
        "first_third": first,
        "middle_third": middle,
        "last_third": last,
        "end": memory[-1],
        "peak": max(memory),
        "growth": last / middle - 1,
    }


if __name__ == "__main__":
    main()
