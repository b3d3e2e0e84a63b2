"""What this machine can run: every engine, its version and what it can use, or why not and what would change that."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from shared.errors import UsageError


@dataclass(frozen=True)
class Available:
    """One engine on this machine."""

    name: str
    runs: bool
    version: str | None  # None where it is not installed
    detail: str  # what it can use, or why it does not run
    command: str | None = None  # what would make it run


def engines() -> Iterator[Available]:
    """Every engine that `stip-cloud serve` knows."""
    yield _torch_cpu()
    yield _torch_cuda()
    yield _tensor_parallel()
    yield _llama()
    yield _ray()


def _torch_cpu() -> Available:
    import torch

    from cloud_backend.opening import has_bfloat16

    bfloat16 = "bfloat16 in hardware" if has_bfloat16() else "no bfloat16 instructions, so float32"
    instructions = torch.backends.cpu.get_cpu_capability()
    return Available(
        "torch on cpu", True, torch.__version__, f"{instructions}, {bfloat16}, {torch.get_num_threads()} threads"
    )


def _torch_cuda() -> Available:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
        return Available("torch on cuda", True, torch.__version__, ", ".join(cards))
    if torch.version.cuda is None:
        why, command = "this build of torch is for processors alone", "pip install --force-reinstall torch"
    else:
        why, command = "torch finds no CUDA device", "nvidia-smi  # is there a card, and a driver that is new enough?"
    return Available("torch on cuda", False, torch.__version__, why, command)


def _tensor_parallel() -> Available:
    import torch
    import torch.distributed

    if not torch.distributed.is_available():
        return Available(
            "tensor parallel",
            False,
            torch.__version__,
            "this build of torch has no torch.distributed",
            "pip install --force-reinstall torch",
        )
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    detail = f"nccl over {cards} cards" if cards > 1 else "gloo, between processes on this machine's cores"
    return Available("tensor parallel", True, torch.__version__, detail)


def _llama() -> Available:
    from cloud_backend.llama import library as llama_library

    try:
        parts = llama_library.features()
        cards = llama_library.gpus()
    except UsageError as error:
        return Available("llama.cpp", False, None, str(error).partition(": ")[2], error.hint)
    listed = "; ".join(f"{part}: {' '.join(features)}" for part, features in parts.items())
    cards_listed = f"cards: {', '.join(cards)}" if cards else "no graphics card"
    return Available("llama.cpp", True, llama_library.version(), f"{listed}; {cards_listed}")


def _ray() -> Available:
    command = "pip install 'stip[ray]'"
    try:
        installed = version("ray")
    except PackageNotFoundError:
        return Available("Ray Serve", False, None, "ray is not installed", command)
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        return Available("Ray Serve", False, installed, "ray is installed without Serve", command)
    return Available("Ray Serve", True, installed, "replicas on this machine, or on a cluster that it joins")


def lines(found: list[Available]) -> Iterator[str]:
    """The same for people."""
    for one in found:
        yield f"{one.name:16} {'yes' if one.runs else 'no':4} {one.version or '-':14} {one.detail}"
        if one.command is not None:
            yield f"{'':16} to change that: {one.command}"
