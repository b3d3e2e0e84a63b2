"""How llama.cpp stores the tensors of stock models: its architectures, and every tensor's form, in both directions.

Both sides hold the same values; names differ, and for some architectures the order of rows, which axis comes first,
or whether a tensor is one or two. The forms are those of llama.cpp's own converter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import torch
from transformers import PretrainedConfig

from shared.errors import FamilyError


@dataclass(frozen=True)
class Layout:
    """What is peculiar to how llama.cpp stores one kind of model."""

    architecture: gguf.MODEL_ARCH
    interleaved: bool = False  # the two features of each rotary plane are neighbours, not half a head apart
    # The activations of the feed-forward block, by transformers' names, that llama.cpp computes for it.
    activations: tuple[str, ...] = ("silu", "swish")
    scaled_frequencies: bool = False  # whether factors of rotary frequencies may be stored (Llama 3)

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture, which its metadata keys begin with."""
        return str(gguf.MODEL_ARCH_NAMES[self.architecture])


_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_LLAMA = Layout(gguf.MODEL_ARCH.LLAMA, interleaved=True, scaled_frequencies=True)
LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "smollm3": Layout(gguf.MODEL_ARCH.SMOLLM3, interleaved=True),
    "qwen2": Layout(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Layout(gguf.MODEL_ARCH.QWEN3),
    "qwen2_moe": Layout(gguf.MODEL_ARCH.QWEN2MOE),
    "qwen3_moe": Layout(gguf.MODEL_ARCH.QWEN3MOE),
    # Gemma is not here. llama.cpp scales embeddings in the graphs of Gemma 1 and 2, those that it is given too; Gemma 3
    # has sliding windows, and what is behind one cannot be gone back to: see `settings`.
    "phi": Layout(gguf.MODEL_ARCH.PHI2, activations=_TANH_GELU),
    "phi3": Layout(gguf.MODEL_ARCH.PHI3),
    "gpt2": Layout(gguf.MODEL_ARCH.GPT2, activations=_TANH_GELU),
}

TOKEN_TABLE = "token_embd.weight"
CLASSIFIER = "output.weight"
FREQUENCIES = "rope_freqs.weight"  # factors of rotary frequencies, which no stock model stores
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_CONV1D = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
_TURNED = re.compile(r".*\.self_attn\.(q|k)_proj\.(weight|bias)")


def layout_of(model_type: str) -> Layout:
    """The layout of a stock model type. Raises FamilyError naming those there are."""
    if model_type not in LAYOUTS:
        raise FamilyError(
            f"architecture {model_type!r}: has no form in GGUF here, wanted one of: {', '.join(LAYOUTS)}",
            hint="export it without --gguf",
        )
    return LAYOUTS[model_type]


@dataclass(frozen=True)
class Form:
    """How llama.cpp stores one tensor of a stock model."""

    names: tuple[str, ...]  # of the stored tensors that make it up, side by side on the axis of its outputs
    transposed: bool = False  # the stock model has it [in, out], as Conv1D does
    heads: int = 0  # of these the rotary halves are interleaved; 0: of none
    flat: bool = False  # the stock model has one row of it, llama.cpp no axis for that

    def stored(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A tensor of the stock model as the tensors `names`."""
        if self.flat:
            tensor = tensor.squeeze(0)
        if self.transposed:
            tensor = tensor.mT
        if self.heads:  # [heads, halves, planes, …] → [heads, planes, halves, …]
            halves = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return tensor.chunk(len(self.names), dim=_outputs(tensor))

    def stock(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The way back."""
        tensor = parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=_outputs(parts[0]))
        if self.heads:
            planes = tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
            tensor = planes.transpose(1, 2).reshape(tensor.shape)
        if self.transposed:
            tensor = tensor.mT
        return tensor.unsqueeze(0) if self.flat else tensor

    def shapes(self, stock: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of the tensors `names`, from that of the stock model's."""
        return [tuple(part.shape) for part in self.stored(torch.empty(stock, device="meta"))]


def _outputs(tensor: torch.Tensor) -> int:
    return max(0, tensor.ndim - 2)


class Forms:
    """The form of every tensor of a stock model, by its name."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Raises FamilyError for a model type that has none."""
        self.layout = layout_of(config.model_type)
        self._heads = {"q": config.num_attention_heads, "k": _key_value_heads(config)}
        self._names = gguf.get_tensor_name_map(self.layout.architecture, config.num_hidden_layers)

    def __call__(self, name: str) -> Form:
        """Raises FamilyError for a tensor that llama.cpp has no place for."""
        if expert := _EXPERTS.fullmatch(name):
            layer, which = expert.groups()
            parts = ("ffn_gate_exps", "ffn_up_exps") if which == "gate_up_proj" else ("ffn_down_exps",)
            return Form(tuple(f"blk.{layer}.{part}.weight" for part in parts))
        if name == "lm_head.weight":
            return Form((CLASSIFIER,))
        module, _, suffix = name.rpartition(".")
        known = self._names.get_name(module)
        if known is None:
            raise FamilyError(
                f"tensor {name!r}: llama.cpp's {self.layout.name} has no place for it", hint="export it without --gguf"
            )
        turned = _TURNED.fullmatch(name) if self.layout.interleaved else None
        return Form(
            (f"{known}.{suffix}",),
            transposed=_CONV1D.fullmatch(name) is not None,
            heads=self._heads[turned[1]] if turned else 0,
            flat=name.endswith("shared_expert_gate.weight"),
        )


def _key_value_heads(config: PretrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
