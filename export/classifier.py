"""The tied classifier as ONNX: a product with the very table that embedding.onnx looks up, which stays on devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from export.embedding import IR_VERSION, OPSET, stored_table

CLASSIFIER = "classifier.onnx"


def export_classifier(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    folder: Path,
    *,
    gain: torch.Tensor | None = None,
    cap: float | None = None,
) -> None:
    """Writes classifier.onnx: `hidden` float32 [n, hidden_size] → `logits` float32 [n, vocab_size].

    dtype, shape: of the table that `export_embedding` wrote into `folder`; its bytes serve both.
    gain: [hidden_size], multiplied in first: the last norm's, where a scheme took it out of the norm.
    cap: logits are cap · tanh(logits / cap), as Gemma 2 has them.

    Features lie along columns once the table is transposed, which is what one row is multiplied by fastest. It is
    transposed before it is widened, as ONNX Runtime does both once, when it loads, and holds what is between them.
    """
    nodes = [
        helper.make_node("Transpose", ["table"], ["columns"], perm=[1, 0]),
        helper.make_node("Cast", ["columns"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["hidden" if gain is None else "normed", "weights"], ["logits"]),
    ]
    initializers = [stored_table(dtype, shape)]
    if gain is not None:
        nodes.insert(0, helper.make_node("Mul", ["hidden", "gain"], ["normed"]))
        initializers.append(numpy_helper.from_array(gain.float().numpy(), "gain"))
    if cap is not None:
        nodes[-1].output[0] = "uncapped"
        nodes += [
            helper.make_node("Div", ["uncapped", "cap"], ["scaled"]),
            helper.make_node("Tanh", ["scaled"], ["bounded"]),
            helper.make_node("Mul", ["bounded", "cap"], ["logits"]),
        ]
        initializers.append(numpy_helper.from_array(np.float32(cap), "cap"))
    vocab_size, hidden_size = shape
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["n", hidden_size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", vocab_size])],
        initializer=initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    (folder / CLASSIFIER).write_bytes(model.SerializeToString())
