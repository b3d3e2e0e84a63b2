"""Decoders whose tensors several processes share: transformers splits them, torch.distributed sums what each computes.

The server's process is rank 0 and keeps the accounts: sessions, batches, pages. The others follow: each holds its part
of every weight and of every page, and does what rank 0 does at the same time. Where the model computes, rank 0 first
says what is to be computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as group
import transformers

from cloud_backend.decoder import DecoderEngine
from cloud_backend.kv_cache import Pages
from cloud_backend.opening import SHARE, free_memory, load_model, stock_class
from cloud_backend.step import Span
from cloud_backend.tensor_parallel.orders import Classify, Load, Piece, Run
from cloud_backend.tensor_parallel.split import Split, split_of
from shared.errors import StipError, UsageError
from shared.manifest import CloudManifest
from shared.wire import FloatName

if TYPE_CHECKING:
    from cloud_backend.tensor_parallel.ranks import Ranks

log = logging.getLogger("stip.cloud")
T = TypeVar("T")


class Part(DecoderEngine):
    """One rank's part of a model. Every rank calls the same of these at the same time."""

    def _captured(self) -> None:
        """No CUDA graphs: they would hold collectives."""

    @torch.inference_mode()
    def follow(self, order: Run | Classify) -> None:
        """Does what rank 0 does."""
        rows = order.rows if isinstance(order, Classify) else sum(piece.tokens for piece in order.pieces)
        given = torch.empty(rows, self.hidden_size, dtype=self._model.dtype, device=self._model.device)
        if isinstance(order, Classify):
            self._shared_logits(given)
        else:
            spans = [Span(Pages.of(self.pool, piece.pages), piece.start, piece.tokens) for piece in order.pieces]
            self._shared_step(spans, given)

    def _shared_step(self, spans: Sequence[Span], embeddings: torch.Tensor) -> torch.Tensor:
        group.broadcast(embeddings, 0)
        return super()._run_step(spans, embeddings)

    def _shared_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        group.broadcast(hidden, 0)
        return super()._logits(hidden)


class TensorParallelEngine(Part):
    """Rank 0's part, and the engine that the server sees.

    A failure in the middle of a step leaves the ranks at different places, from which none can go on: it raises
    EngineError, as the loss of a rank does.
    """

    def __init__(self, model: Any, order: Load, ranks: Ranks, number: int) -> None:
        self._ranks, self._number = ranks, number
        super().__init__(model, order.dtype, order.context, budget_of(order))

    def _run_step(self, spans: Sequence[Span], embeddings: torch.Tensor) -> torch.Tensor:
        pieces = tuple(Piece(span.pages.numbers, span.start, span.tokens) for span in spans)
        return self._together(Run(self._number, pieces), lambda: self._shared_step(spans, embeddings))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._together(Classify(self._number, len(hidden)), lambda: self._shared_logits(hidden))

    def _together(self, order: Run | Classify, compute: Callable[[], T]) -> T:
        try:
            self._ranks.tell(order)
            return compute()
        except Exception as error:  # its text could quote tensors
            raise self._ranks.loss(f"a step failed: {type(error).__name__}") from None


def open_split(
    folder: Path, manifest: CloudManifest, dtype: FloatName, context: int | None, kv_bytes: int | None, ranks: Ranks
) -> TensorParallelEngine:
    """Loads a checked folder into all ranks. Raises UsageError where it cannot be split over so many, BundleError where
    its checkpoint is not whole, and EngineError where a rank fails."""
    split = split_of_folder(folder, manifest, ranks.processes)
    log.info("%s: %s", manifest.served_name, split)
    order = Load(str(folder.resolve()), dtype, ranks.device, dict(split.rules), context, kv_bytes)
    number = ranks.start_loading(order)
    try:
        model = load_part(order)
        ranks.all_loaded()
        return TensorParallelEngine(model, order, ranks, number)
    except StipError:
        raise
    except Exception as error:
        raise ranks.loss(f"loading failed: {type(error).__name__}") from error


def split_of_folder(folder: Path, manifest: CloudManifest, processes: int) -> Split:
    """How so many processes share the model of a folder, by its manifest and its config.json alone.

    Raises UsageError where it cannot be split over so many, and BundleError where config.json cannot be read.
    """
    if manifest.weights == "gguf":
        raise UsageError(
            f"{folder}: --tensor-parallel: seen the engine llama.cpp, wanted torch",
            hint="serve it without --tensor-parallel, or export it again without --gguf",
        )
    if manifest.kind != "decoder":
        raise UsageError(
            f"{folder}: --tensor-parallel: seen a model of the kind {manifest.kind}, wanted a decoder",
            hint="serve it without, or by several replicas",
        )
    stock = stock_class(folder, manifest.kind)
    return split_of(stock, transformers.AutoConfig.from_pretrained(folder, local_files_only=True), processes)


def load_part(order: Load) -> Any:
    """The stock model, with this rank's part of its tensors. Raises BundleError if its checkpoint does not fit."""
    from transformers.distributed import DistributedConfig

    split = DistributedConfig(tp_size=group.get_world_size(), tp_plan=dict(order.rules))
    model = load_model(Path(order.folder), order.dtype, order.device, distributed_config=split)
    _plain(model)
    return model


def _plain(model: Any) -> None:
    """Makes ordinary tensors of its linear layers': transformers' distributed ones are unwrapped anew at every use.

    Only of theirs: what it sums of experts may depend on how their tensors are distributed.
    """
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            if hasattr(tensor, "to_local"):
                local = torch.nn.Parameter(tensor.to_local(), requires_grad=False)
                module.register_parameter(name, local)


def budget_of(order: Load) -> int:
    """Bytes of KV memory of each rank: the least that any of them has, as pages are the same in all.

    Every rank calls it at the same time. What was asked for is shared by all; so is a processor's memory.
    """
    processes = group.get_world_size()
    own = free_memory(order.device) // SHARE[order.device]
    if order.kv_bytes or order.device == "cpu":
        own = (order.kv_bytes or own) // processes
    least = torch.tensor(own, device=order.device)
    group.all_reduce(least, group.ReduceOp.MIN)
    return int(least)
