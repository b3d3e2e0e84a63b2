"""Embeddings as ONNX, which stay on devices: of token ids, and of the pixels of an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

ONNX_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
OPSET, IR_VERSION = 17, 8  # what ONNX Runtime 1.20 and later read everywhere, JetPack 6 included
TABLE = "embedding.onnx.data"
IMAGE = "image.onnx"


def export_embedding(
    table: torch.Tensor, folder: Path, *, scale: float = 1.0, positions: torch.Tensor | None = None
) -> None:
    """Writes embedding.onnx: `ids` int64 [n] → `embeddings` float32 [n, hidden_size], and its table beside it.

    table: [vocab_size, hidden_size], stored in its own dtype. As external data it is mapped, not read: a device opens
    it in milliseconds and holds the rows it looks up, where a table inside the graph is read and held whole.
    scale: of the table's rows. positions: [context, hidden_size], added by a second input `positions` int64 [n].
    """
    (folder / TABLE).write_bytes(table.contiguous().view(torch.uint8).reshape(-1).numpy().data)
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    initializers = [stored_table(table.dtype, tuple(table.shape))]
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0)]
    value = _step(nodes, "Cast", "rows", to=TensorProto.FLOAT)
    if scale != 1.0:
        initializers.append(numpy_helper.from_array(np.float32(scale), "scale"))
        value = _step(nodes, "Mul", value, "scale")
    if positions is not None:
        inputs.append(helper.make_tensor_value_info("positions", TensorProto.INT64, ["n"]))
        initializers.append(numpy_helper.from_array(positions.float().contiguous().numpy(), "position_table"))
        value = _step(nodes, "Add", value, _step(nodes, "Gather", "position_table", "positions", axis=0))
    nodes[-1].output[0] = "embeddings"
    _write(folder / "embedding.onnx", nodes, inputs, initializers, table.shape[1])


@dataclass(frozen=True, eq=False)
class Patches:
    """How pixels are embedded. kernel: [width, 3, patch, patch]; bias, class_token: [width];
    positions: [patches + 1, width]; pixels are (p · rescale − mean) / std, each of three channels."""

    kernel: torch.Tensor
    bias: torch.Tensor | None
    class_token: torch.Tensor
    positions: torch.Tensor
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def export_image(patches: Patches, folder: Path, height: int, width: int) -> None:
    """Writes image.onnx: `pixels` uint8 [height, width, 3] → `embeddings` float32 [patches + 1, stream's width]."""
    kernel = patches.kernel.float()
    size, patch = kernel.shape[0], kernel.shape[2]
    std = np.asarray(patches.std, np.float32).reshape(1, 3, 1, 1)
    initializers = [
        numpy_helper.from_array(kernel.numpy(), "kernel"),
        numpy_helper.from_array(np.float32(patches.rescale), "rescale"),
        numpy_helper.from_array(np.asarray(patches.mean, np.float32).reshape(1, 3, 1, 1), "mean"),
        numpy_helper.from_array(std, "std"),
        numpy_helper.from_array(patches.class_token.float().reshape(1, size).numpy(), "class_token"),
        numpy_helper.from_array(patches.positions.float().reshape(-1, size).numpy(), "position_table"),
        numpy_helper.from_array(np.asarray([1, 3, height, width]), "batch"),
        numpy_helper.from_array(np.asarray([size, -1]), "flat"),
    ]
    convolution = ["kernel"]
    if patches.bias is not None:
        initializers.append(numpy_helper.from_array(patches.bias.float().numpy(), "bias"))
        convolution.append("bias")
    nodes: list[NodeProto] = []
    value = _step(nodes, "Cast", "pixels", to=TensorProto.FLOAT)
    value = _step(nodes, "Reshape", _step(nodes, "Transpose", value, perm=[2, 0, 1]), "batch")
    value = _step(nodes, "Sub", _step(nodes, "Mul", value, "rescale"), "mean")
    value = _step(nodes, "Conv", _step(nodes, "Div", value, "std"), *convolution, strides=[patch, patch])
    value = _step(nodes, "Transpose", _step(nodes, "Reshape", value, "flat"), perm=[1, 0])  # [patches, width]
    value = _step(nodes, "Add", _step(nodes, "Concat", "class_token", value, axis=0), "position_table")
    nodes[-1].output[0] = "embeddings"
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, [height, width, 3])]
    _write(folder / IMAGE, nodes, inputs, initializers, size)


def stored_table(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorProto:
    """The initializer `table`, whose values are the bytes of TABLE."""
    proto = TensorProto(name="table", data_type=ONNX_DTYPES[dtype], dims=list(shape))
    proto.data_location = TensorProto.EXTERNAL
    length = torch.Size(shape).numel() * dtype.itemsize
    for key, value in (("location", TABLE), ("offset", "0"), ("length", str(length))):
        proto.external_data.add(key=key, value=value)
    return proto


def _step(nodes: list[NodeProto], kind: str, *inputs: str, **attributes: object) -> str:
    """Adds a node and gives the name of its one output."""
    output = f"value{len(nodes)}"
    nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
    return output


def _write(
    path: Path, nodes: list[NodeProto], inputs: list[object], initializers: list[TensorProto], width: int
) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        inputs,
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", width])],
        initializer=initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString())
