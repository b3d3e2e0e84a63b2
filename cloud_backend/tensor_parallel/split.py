"""Which tensors of a stock model several processes share: transformers' own plan, where their number divides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from shared.errors import UsageError

# The style of transformers' plans with which every process has all of a tensor; in training it is more than that.
WHOLE = "replicated_with_grad_allreduce"
MOST = 64  # processes that may share a model
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


@dataclass(frozen=True)
class Split:
    """How `processes` share a model: transformers' style of each module that its plan names."""

    processes: int
    rules: Mapping[str, str]
    whole: Sequence[str] = ()  # what each of them computes all of, in words

    def __str__(self) -> str:
        return "; ".join([f"split over {self.processes} processes", *self.whole])


def split_of(stock: Any, config: Any, processes: int) -> Split:
    """How so many processes share a model of the class `stock`.

    Attention is split by heads, which transformers' plan leaves to the caller to see to: where they do not divide, it
    stays whole and the feed-forward alone is split. Raises UsageError where nothing can be split.
    """
    text = config.get_text_config()
    plan = {f"{stock.base_model_prefix}.{name}": style for name, style in (text.base_model_tp_plan or {}).items()}
    if not plan:
        raise UsageError(
            f"--tensor-parallel: transformers has no plan to split the architecture {config.model_type!r}",
            hint="serve it without, or by several replicas",
        )
    heads = (text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    widths = tuple(width for name in WIDTHS if (width := getattr(text, name, None)))
    whole = []
    if gcd(*heads) % processes:
        whole.append(f"attention whole in each, as it has {_heads(heads)}")
    if gcd(*widths) % processes:
        whole.append(f"feed-forward whole in each, as it has {_features(widths)}")
    if len(whole) == 2:
        able = [count for count in range(2, MOST + 1) if not gcd(*heads) % count or not gcd(*widths) % count]
        raise UsageError(
            f"--tensor-parallel: seen {processes}, which divides neither {_heads(heads)} nor {_features(widths)}",
            hint=f"wanted one of {', '.join(map(str, able))}" if able else "serve it without, or by several replicas",
        )
    named = ("attention" if ".self_attn." in name else "feed-forward" for name in plan)
    rules = {
        name: WHOLE if any(one.startswith(part) for one in whole) else style
        for (name, style), part in zip(plan.items(), named, strict=True)
    }
    # The embedding is on devices: there is nothing of it to share.
    rules[f"{stock.base_model_prefix}.embed_tokens"] = WHOLE
    for name, style in (stock._tp_plan or {}).items():  # of the classifier
        rules[name] = WHOLE if text.vocab_size % processes else style
    return Split(processes, rules, whole)


def _heads(heads: tuple[int, int]) -> str:
    return f"{heads[0]} heads over {heads[1]} of keys and values"


def _features(widths: Sequence[int]) -> str:
    return f"{' and '.join(map(str, widths))} features"
