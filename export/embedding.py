"""The embedding as ONNX: a Gather over the plain table, which stays on devices."""

from __future__ import annotations

from pathlib import Path

import torch
from onnx import TensorProto, helper

ONNX_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
OPSET, IR_VERSION = 17, 8  # what ONNX Runtime 1.20 and later read everywhere, JetPack 6 included
TABLE = "embedding.onnx.data"


def export_embedding(table: torch.Tensor, folder: Path) -> None:
    """Writes embedding.onnx: `ids` int64 [n] → `embeddings` float32 [n, hidden_size], and its table beside it.

    table: [vocab_size, hidden_size], stored in its own dtype. As external data it is mapped, not read: a device opens
    it in milliseconds and holds the rows it looks up, where a table inside the graph is read and held whole.
    """
    (folder / TABLE).write_bytes(table.contiguous().view(torch.uint8).reshape(-1).numpy().data)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            helper.make_node("Cast", ["rows"], ["embeddings"], to=TensorProto.FLOAT),
        ],
        "embedding",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", table.shape[1]])],
        initializer=[stored_table(table.dtype, tuple(table.shape))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    (folder / "embedding.onnx").write_bytes(model.SerializeToString())


def stored_table(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorProto:
    """The initializer `table`, whose values are the bytes of TABLE."""
    proto = TensorProto(name="table", data_type=ONNX_DTYPES[dtype], dims=list(shape))
    proto.data_location = TensorProto.EXTERNAL
    length = torch.Size(shape).numel() * dtype.itemsize
    for key, value in (("location", TABLE), ("offset", "0"), ("length", str(length))):
        proto.external_data.add(key=key, value=value)
    return proto
