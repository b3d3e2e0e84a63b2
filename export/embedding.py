"""The embedding as ONNX: a Gather over the plain table, which stays on devices."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

ONNX_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
OPSET, IR_VERSION = 17, 8  # what ONNX Runtime 1.20 and later read everywhere, JetPack 6 included
MOST_INLINE = 2**31 - 2**20  # protobuf's limit on one message, less the graph around the table


def export_embedding(table: torch.Tensor, folder: Path, most_inline: int = MOST_INLINE) -> list[str]:
    """Writes embedding.onnx: `ids` int64 [n] → `embeddings` float32 [n, hidden_size]; gives the names of its files.

    table: [vocab_size, hidden_size], stored in its own dtype. Past `most_inline` bytes it goes to external data.
    """
    proto = TensorProto(name="table", data_type=ONNX_DTYPES[table.dtype], dims=list(table.shape))
    raw = table.contiguous().view(torch.uint8).reshape(-1).numpy().data
    names = ["embedding.onnx"]
    if raw.nbytes > most_inline:
        names.append("embedding.onnx.data")
        (folder / names[1]).write_bytes(raw)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", names[1]), ("offset", "0"), ("length", str(raw.nbytes))):
            proto.external_data.add(key=key, value=value)
    else:
        proto.raw_data = bytes(raw)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            helper.make_node("Cast", ["rows"], ["embeddings"], to=TensorProto.FLOAT),
        ],
        "embedding",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", table.shape[1]])],
        initializer=[proto],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.save(model, str(folder / names[0]))
    return names
