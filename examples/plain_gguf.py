"""An unprotected GGUF file of a model, with its weights in one type: what a protected one is compared with."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

METADATA_OF_READER = "GGUF."  # what a reader says of the file itself, under names like metadata's
REPLACED = ("general.architecture", "general.file_type", "general.quantization_version")
TABLE = "token_embd.weight"  # the classifier too, where that is tied


def write_plain_gguf(source: Path, path: Path, kind: str = "f32") -> None:
    """Copies a GGUF file, every matrix made float32 and then `kind`: f32, f16, bf16, q8_0, q5_0, q5_1, q4_0 or q4_1.

    Matrices are quantised as an export with `--gguf` quantises them: by the gguf package, and the table in q8_0 where
    the others have fewer bits.
    """
    reader = gguf.GGUFReader(source)
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    table = gguf.GGMLQuantizationType.Q8_0 if kind.startswith(("q4", "q5")) else wanted
    names = {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    writer.add_file_type(gguf.LlamaFileType[names])
    if kind.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, field in reader.fields.items():
        if not name.startswith(METADATA_OF_READER) and name not in REPLACED:
            of_elements = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], of_elements)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
            continue
        chosen = table if tensor.name == TABLE else wanted
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
