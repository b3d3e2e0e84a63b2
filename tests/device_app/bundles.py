"""Device folders of every kind, made by hand: real ONNX graphs, a real tokenizer, a key of their own.

Their embeddings are those of the honest cloud, so that it knows what it was sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared.key import UserKey
from shared.manifest import DeviceManifest, ImageFormat, Kind, file_entry, write_manifest
from tests.checkpoints import LOOKING_TEMPLATE, TEMPLATE, tiny_tokenizer
from tests.device_app.honest_cloud import (
    HIDDEN,
    IMAGE_TOKENS,
    IMAGES,
    KEY,
    LONGEST_SOURCE,
    LOOKING,
    PATCH_SIZE,
    PATCHES,
    READING,
    VOCAB,
    embed,
    image,
)

PLACEHOLDER_ID, START_ID, END_ID = 0, 1, 2
IMAGE = ImageFormat(
    height=4, width=6, resize=(4, 6), resample=0, patches=PATCHES, tokens=IMAGE_TOKENS, token_id=PLACEHOLDER_ID
)
LABELS = ["cat", "dog", "a\x1b[31m\tbird\n", "fish"]
CLASSES = UserKey(KEY.key_id, KEY.residual, np.array([2, 0, 3, 1]))  # of an encoder with class logits
CONTEXT = 12  # of encoders


def make_bundle(
    folder: Path,
    kind: Kind,
    *,
    key: UserKey | None = None,
    template: str | None = None,
    step: float | None = None,
    **fields: Any,
) -> Path:
    """The device half of a model of `kind`; its key, chat template, positions and `fields` of its manifest may differ.

    step: as for `embedding`; that of an encoder is 1/1024 where it is None.
    """
    folder.mkdir()
    keys = {"vision-decoder": LOOKING, "encoder-decoder": READING, "encoder": CLASSES, "image-encoder": CLASSES}
    (key or keys.get(kind, KEY)).save(folder / "key.safetensors")
    texts = kind != "image-encoder"
    if texts:
        onnx.save(embedding(1 / 1024 if step is None and kind == "encoder" else step), folder / "embedding.onnx")
        tiny_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    if kind in ("vision-decoder", "image-encoder"):
        onnx.save(patches(PATCH_SIZE if kind == "vision-decoder" else HIDDEN), folder / "image.onnx")
    if kind in ("decoder", "vision-decoder"):
        usual_template = LOOKING_TEMPLATE if kind == "vision-decoder" else TEMPLATE
        (folder / "chat_template.jinja").write_text(template or usual_template)
    usual: dict[str, Any] = {
        "key_id": KEY.key_id,
        "served_name": "tiny",
        "scheme": "permutation",
        "dtype": "float32",
        "kind": kind,
        "family": "tiny",
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB if texts else 0,
        "context": {"encoder": CONTEXT, "image-encoder": PATCHES}.get(kind, 64),
        "tokenizer": "json" if texts else "none",
        "tokenizer_proof": "made by hand",
        "prefix_ids": [],
        "end_ids": [END_ID],
        "hidden_ids": [0, 1, 2],
        "special_tokens": {},
        "check": {},
    }
    of_kind: dict[str, dict[str, Any]] = {
        "decoder": {},
        "vision-decoder": {
            "encoder_size": IMAGES.encoder_size,
            "encoder_context": IMAGES.encoder_context,
            "image": IMAGE,
        },
        "encoder-decoder": {
            "encoder_size": HIDDEN,
            "encoder_context": LONGEST_SOURCE,
            "suffix_ids": [END_ID],
            "start_ids": [PLACEHOLDER_ID],
            "banned_ids": [PLACEHOLDER_ID],
        },
        "encoder": {
            "labels": LABELS,
            "outputs": ["hidden", "pooled", "logits"],
            "pooling": "mean",
            "normalize": True,
            "prefix_ids": [START_ID],
            "suffix_ids": [END_ID],
        },
        "image-encoder": {
            "labels": LABELS,
            "outputs": ["hidden", "logits"],
            "image": ImageFormat(height=4, width=6, resize=(4, 6), resample=0, patches=PATCHES),
        },
    }
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    write_manifest(DeviceManifest(**usual | of_kind[kind] | {"files": files} | fields), folder)
    return folder


def embedding(step: float | None) -> onnx.ModelProto:
    """The honest cloud's embeddings; with a table of 64 positions, which adds `step` for each, where it is not None."""
    table = numpy_helper.from_array(embed(range(VOCAB)), "table")
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    nodes = [helper.make_node("Gather", ["table", "ids"], ["embeddings" if step is None else "words"])]
    weights = [table]
    if step is not None:
        inputs.append(helper.make_tensor_value_info("positions", TensorProto.INT64, ["n"]))
        shift = np.arange(64, dtype=np.float32)[:, None].repeat(HIDDEN, 1) * np.float32(step)
        weights.append(numpy_helper.from_array(shift, "shift"))
        nodes.append(helper.make_node("Gather", ["shift", "positions"], ["places"]))
        nodes.append(helper.make_node("Add", ["words", "places"], ["embeddings"]))
    outputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", HIDDEN])]
    return _model(nodes, inputs, outputs, weights)


def patches(width: int) -> onnx.ModelProto:
    """`image(n)` (or its first features), n being the red of the first pixel."""
    shift = numpy_helper.from_array(image(0)[:, :width].copy(), "shift")
    corner = numpy_helper.from_array(np.array([0, 0, 0], np.int64), "corner")
    nodes = [
        helper.make_node("GatherND", ["pixels", "corner"], ["red"]),
        helper.make_node("Cast", ["red"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["number", "shift"], ["embeddings"]),
    ]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, [4, 6, 3])]
    outputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [PATCHES, width])]
    return _model(nodes, inputs, outputs, [shift, corner])


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model
