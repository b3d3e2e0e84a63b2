"""Writes shared/vectors/, one JSON file a case, from literal bytes: nothing here calls the code the vectors judge.

Run `python tests/shared/make_vectors.py` after a change. A test asserts that the committed files are what this makes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "shared" / "vectors"


# The encoder: MessagePack and the frame, after their specifications.


class Raw(bytes):
    """Bytes put into a header as they are."""


def pack(value: Any) -> bytes:
    match value:
        case Raw():
            return bytes(value)
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int() if value < 0:
            return struct.pack(">Bb", 0xD0, value)
        case int():
            for limit, head, form in ((1 << 7, b"", "B"), (1 << 8, b"\xcc", "B"), (1 << 16, b"\xcd", ">H")):
                if value < limit:
                    return head + struct.pack(form, value)
            return struct.pack(">BI", 0xCE, value) if value < 1 << 32 else struct.pack(">BQ", 0xCF, value)
        case float():
            return struct.pack(">Bd", 0xCB, value)
        case bytes():
            return struct.pack(">BB", 0xC4, len(value)) + value
        case str():
            data = value.encode()
            short = bytes([0xA0 | len(data)]) if len(data) < 32 else struct.pack(">BH", 0xDA, len(data))
            return short + data
        case list():
            assert len(value) < 16
            return bytes([0x90 | len(value)]) + b"".join(map(pack, value))
        case dict():
            pairs = b"".join(pack(key) + pack(item) for key, item in value.items())
            return (
                struct.pack(">BH", 0xDE, len(value)) + pairs if len(value) > 15 else bytes([0x80 | len(value)]) + pairs
            )
    raise TypeError(value)


def assemble(header: bytes, *tensors: bytes, fill: bytes = b"\x00") -> bytes:
    """Length, header, tensors at multiples of 16; `fill` is the padding byte."""
    frame = struct.pack("<I", len(header)) + header
    for tensor in tensors:
        frame += fill * (-len(frame) % 16) + tensor
    return frame


Tensor = tuple[str, list[int], bytes]


def build(fields: dict[str, Any], *tensors: Tensor, fill: bytes = b"\x00") -> bytes:
    """A frame whose header ends with the tensors' descriptions."""
    described = {"tensors": [[dtype, shape] for dtype, shape, _ in tensors]} if tensors else {}
    return assemble(pack(fields | described), *(data for _, _, data in tensors), fill=fill)


def f32(*shape: int) -> Tensor:
    """1, 2, 3, … as float32."""
    return "float32", list(shape), b"".join(struct.pack("<f", i + 1) for i in range(_count(shape)))


def f16(*shape: int) -> Tensor:
    """1, 2, 3, … as float16."""
    return "float16", list(shape), b"".join(struct.pack("<e", i + 1) for i in range(_count(shape)))


def bf16(*shape: int) -> Tensor:
    """1, 2, 3, … as bfloat16: the upper half of a float32."""
    return "bfloat16", list(shape), b"".join(struct.pack("<f", i + 1)[2:] for i in range(_count(shape)))


def u32(*shape: int) -> Tensor:
    """1, 2, 3, … as uint32."""
    return "uint32", list(shape), b"".join(struct.pack("<I", i + 1) for i in range(_count(shape)))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


# The cases.

TIMES = {"queue_us": 0, "compute_us": 0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "open": {"dtype": "auto", "token": None, "resume": None},
    "opened": {"encoder_size": 0, "encoder_context": 0, "image_tokens": 0},
    "append": {"rows": 1, "want": "logits", "top_k": 256, "temperature": 1.0, "kind": "text", "after": None},
    "logits": TIMES,
    "hidden": TIMES,
    "encode": {"want": "hidden"},
    "encoded": TIMES,
    "cancel": {},
    "error": {"seq": None, "kv_length": 0, "retryable": False},
}

APPEND = {"type": "append", "seq": 7, "keep": 3}
LOGITS = {"type": "logits", "seq": 7, "kv_length": 5}
ENCODE = {"type": "encode", "seq": 7, "lengths": [2, 1]}
OPENED = {
    "type": "opened",
    "session": "s-1",
    "resume": "0123456789abcdef0123456789abcdef",
    "kv_length": 0,
    "hidden_size": 576,
    "vocab_size": 49152,
    "dtype": "bfloat16",
    "context": 8192,
    "max_frame": 16777216,
    "max_rows": 64,
    "max_full_rows": 4,
    "max_top_k": 1024,
    "window": 67108864,
}
MAX = 2**32 - 1


def valid() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}

    def case(name: str, description: str, fields: dict[str, Any], *tensors: Tensor, frame: bytes | None = None) -> None:
        message = {"type": fields["type"]} | DEFAULTS[fields["type"]] | fields
        message["tensors"] = [{"dtype": t[0], "shape": t[1], "bytes": t[2].hex()} for t in tensors]
        frame = build(fields, *tensors) if frame is None else frame
        cases[name] = _frame(description, frame, {"message": message})

    case("open_minimal", "an Open with its required fields", {"type": "open", "model": "m", "key_id": "k"})
    secrets = {"token": "t" * 43, "resume": "0123456789abcdef0123456789abcdef"}
    full = {"type": "open", "model": "smollm2-135m", "key_id": "f" * 32, "dtype": "float16"} | secrets
    case("open_full", "an Open with every field", full)
    written = {"type": "open", "model": "m", "key_id": "k"} | DEFAULTS["open"] | {"tensors": []}
    case("open_defaults_written", "fields equal to their default may be written", written | {}, frame=build(written))
    case(
        "open_name_of_256", "256 code points, 1,024 bytes", {"type": "open", "model": "\U0001f511" * 256, "key_id": ""}
    )
    case("opened_minimal", "an Opened with its required fields", OPENED)
    images = {"encoder_size": 1024, "encoder_context": 577, "image_tokens": 576}
    case("opened_full", "an Opened with every field: a decoder that takes images", OPENED | images)
    source = OPENED | {"encoder_size": 512, "encoder_context": 512, "context": 512}
    case("opened_source", "a decoder that reads a source sequence: no image_tokens", source)
    classes = OPENED | {"vocab_size": 2, "context": 512}
    case("opened_encoder", "an encoder: vocab_size is the number of classes", classes)
    largest = {name: MAX if isinstance(value, int) else value for name, value in (OPENED | images).items()}
    case("opened_largest", "every integer at its largest", largest)

    case("append_minimal", "the worked example of PROTOCOL.md", APPEND, f32(1, 2))
    options = {"rows": 0, "want": "hidden", "top_k": 0, "temperature": 0.7, "kind": "image", "after": MAX - 1}
    case("append_full", "an Append with every field", APPEND | {"seq": MAX} | options, f32(3, 2))
    case("append_image", "an image: its patches, and no rows", APPEND | {"rows": 0, "kind": "image"}, bf16(5, 3))
    case("append_after_store", "the first Append behind a source sequence", APPEND | {"keep": 0, "after": 6}, f32(1, 2))
    case("append_no_rows", "an Append that wants an acknowledgement alone", APPEND | {"rows": 0}, f32(2, 2))
    case("append_all_rows", "rows equal to n", APPEND | {"rows": 2}, f32(2, 2))
    case("append_bfloat16", "bfloat16 embeddings, an odd number of bytes from alignment", APPEND, bf16(1, 3))
    case("append_float16", "float16 embeddings", APPEND, f16(1, 3))
    special = "float32", [1, 4], bytes.fromhex("0000c07f0000807f000080ff00000080")
    case("append_not_finite", "NaN and infinities pass the framing; the cloud answers not_finite", APPEND, special)
    integer = APPEND | {"temperature": Raw(b"\x02")}
    case(
        "append_temperature_integer",
        "a real may be written as an integer",
        APPEND | {"temperature": 2.0},
        f32(1, 2),
        frame=build(integer, f32(1, 2)),
    )
    single = APPEND | {"temperature": Raw(b"\xca\x3f\x00\x00\x00")}
    case(
        "append_temperature_float32",
        "a real may be written as a 32-bit float",
        APPEND | {"temperature": 0.5},
        f32(1, 2),
        frame=build(single, f32(1, 2)),
    )
    case("append_temperature_smallest", "any temperature above 0", APPEND | {"temperature": 5e-324}, f32(1, 2))
    case("append_temperature_largest", "a temperature of 1,000,000", APPEND | {"temperature": 1e6}, f32(1, 2))
    wide = APPEND | {"seq": Raw(b"\xcf" + bytes(7) + b"\x07"), "keep": Raw(b"\xd1\x00\x03")}
    case(
        "append_wide_integers",
        "an integer may be written in any width and sign",
        APPEND,
        f32(1, 2),
        frame=build(wide, f32(1, 2)),
    )
    last = {"tensors": [["float32", [1, 2]]], "keep": 3, "seq": 7, "type": "append"}
    case(
        "append_type_last",
        "fields come in any order, the type too",
        APPEND,
        f32(1, 2),
        frame=assemble(pack(last), f32(1, 2)[2]),
    )
    unknown = APPEND | {"priority": 3, "trace": {"id": b"\x00\x01", "hops": [1, 2.5, None]}, "x": Raw(b"\xd4\x05\x00")}
    case(
        "append_unknown_fields",
        "unknown fields are ignored: an integer, a map, an extension type",
        APPEND,
        f32(1, 2),
        frame=build(unknown, f32(1, 2)),
    )
    for letters in range(16):
        frame = build(APPEND | {"x": "a" * letters}, f32(1, 2))
        padding = -_header_end(frame) % 16
        case(f"append_padding_{padding:02}", f"{padding} bytes of padding", APPEND, f32(1, 2), frame=frame)
    filler = 65536 - len(pack(APPEND | {"x": "", "tensors": [["float32", [1, 2]]]})) - 2  # 2: the longer string head
    case(
        "header_at_limit",
        "a header of 65,536 bytes",
        APPEND,
        f32(1, 2),
        frame=build(APPEND | {"x": "a" * filler}, f32(1, 2)),
    )

    lse = f32(2, 2)
    case(
        "logits_top_k",
        "three tensors, padded",
        LOGITS | {"queue_us": 12, "compute_us": 20817},
        f32(2, 3),
        u32(2, 3),
        lse,
    )
    case("logits_full_rows", "full rows: ids has no columns", LOGITS, f32(2, 5), u32(2, 0), lse)
    case(
        "logits_no_rows",
        "an acknowledgement: padding before tensors without bytes",
        LOGITS,
        f32(0, 3),
        u32(0, 3),
        f32(0, 2),
    )
    case("logits_bfloat16", "bfloat16 values, float32 log-sum-exp", LOGITS, bf16(2, 3), u32(2, 3), lse)
    case("logits_float16", "float16 values, float32 log-sum-exp", LOGITS, f16(1, 1), u32(1, 1), f32(1, 2))
    case("hidden_float32", "two hidden states", LOGITS | {"type": "hidden"}, f32(2, 4))
    case(
        "hidden_bfloat16",
        "a hidden state, with times",
        LOGITS | {"type": "hidden", "queue_us": MAX, "compute_us": 1},
        bf16(1, 5),
    )
    case("hidden_no_rows", "an acknowledgement", LOGITS | {"type": "hidden"}, f16(0, 4))
    case("encode_minimal", "two ragged sequences", ENCODE, f32(3, 2))
    case("encode_pooled", "one pooled vector a sequence", ENCODE | {"want": "pooled"}, bf16(3, 4))
    case("encode_logits", "class logits", ENCODE | {"lengths": [3], "want": "logits"}, f16(3, 1))
    case("encode_store", "a source sequence to keep", ENCODE | {"lengths": [3], "want": "store"}, f32(3, 2))
    case("encoded_minimal", "a result", LOGITS | {"type": "encoded"}, f32(3, 2))
    stored = {"type": "encoded", "seq": 7, "kv_length": 0, "compute_us": 300}
    case("encoded_stored", "an acknowledgement of store: the KV cache is empty", stored, f32(0, 2))
    case("cancel_minimal", "a Cancel; no tensors, so no padding", {"type": "cancel", "seq": 7})
    case("error_minimal", "an Error about the connection", {"type": "error", "code": "shutting_down", "message": ""})
    full = {
        "code": "out_of_step",
        "message": "keep: seen 9, wanted at most 5",
        "seq": 7,
        "kv_length": 5,
        "retryable": True,
    }
    case("error_full", "an Error about a request", {"type": "error"} | full)
    case("error_message_of_2048", "2,048 code points", {"type": "error", "code": "internal", "message": "é" * 2048})
    return cases


def _header_end(frame: bytes) -> int:
    return 4 + int.from_bytes(frame[:4], "little")


def invalid() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}

    def case(name: str, reason: str, frame: bytes, code: str = "bad_frame") -> None:
        cases[f"bad_{name}"] = _frame("refused", frame, {"error": code, "reason": reason})

    good = build(APPEND, f32(1, 2))  # 4 + 45 bytes, 15 of padding, 8 of tensor
    one = f32(1, 2)[2]

    # The frame, region by region.
    case("frame_empty", "no bytes", b"")
    case("frame_ends_in_length", "3 bytes: the length takes 4", good[:3])
    case("frame_ends_after_length", "no header", good[:4])
    case("frame_ends_in_header", "the header is cut", good[:40])
    case("frame_ends_after_header", "the padding and the tensor are missing", good[:49])
    case("frame_ends_in_padding", "the padding is cut", good[:57])
    case("frame_ends_before_tensor", "the tensor is missing", good[:64])
    case("frame_ends_in_tensor", "the tensor lacks its last byte", good[:-1])
    two = build(LOGITS, f32(1, 1), u32(1, 1), f32(1, 2))
    case("frame_ends_in_last_tensor", "the third tensor lacks its last byte", two[:-1])
    case("frame_ends_before_last_tensor", "the third tensor is missing", two[:-8])
    case("frame_trailing_byte", "a byte after the tensor", good + b"\x00")
    case("frame_trailing_block", "16 zero bytes after the tensor", good + bytes(16))
    case(
        "frame_trailing_padding",
        "padding after a header without tensors",
        build({"type": "cancel", "seq": 7}) + bytes(11),
    )
    case("frame_is_text", "JSON text, not a frame", b'{"type": "cancel", "seq": 7}')
    case("padding_before_tensor", "the padding is 0xff", build(APPEND, f32(1, 2), fill=b"\xff"))
    case("padding_last_byte", "the last byte of the padding is 1", good[:63] + b"\x01" + good[64:])
    between = build(LOGITS, f32(1, 1), u32(1, 1), f32(1, 2))
    first = _header_end(between) + -_header_end(between) % 16
    case(
        "padding_between_tensors",
        "a byte between two tensors is 1",
        between[: first + 4] + b"\x01" + between[first + 5 :],
    )
    case("padding_missing", "the tensor follows the header at once", good[:49] + one)
    case("padding_to_eight", "the tensor is aligned to 8 bytes, not 16", good[:49] + bytes(7) + one)

    # The header length.
    case("header_length_beyond", "the header ends one byte after the frame", struct.pack("<I", 46) + good[4:49])
    case("header_length_largest", "a header of 4,294,967,295 bytes", b"\xff\xff\xff\xff" + good[4:])
    case("header_length_big_endian", "the length is big-endian", struct.pack(">I", 45) + good[4:])
    filler = 65536 - len(pack(APPEND | {"x": "", "tensors": [["float32", [1, 2]]]})) - 2
    case("header_over_limit", "a header of 65,537 bytes", build(APPEND | {"x": "a" * (filler + 1)}, f32(1, 2)))
    case("header_empty", "a header of 0 bytes", assemble(b""))
    case("header_short", "the length is one too small", struct.pack("<I", 44) + good[4:])

    # The header as MessagePack.
    case("header_reserved_byte", "0xc1 is no MessagePack type", assemble(b"\xc1"))
    case("header_array", "an array, not a map", assemble(pack(["cancel", 7])))
    case("header_nil", "nil, not a map", assemble(b"\xc0"))
    case("header_map_empty", "an empty map has no type", assemble(b"\x80"))
    case(
        "header_trailing_byte",
        "a byte after the map, inside the header",
        assemble(pack({"type": "cancel", "seq": 7}) + b"\xc0"),
    )
    case("header_utf8_type", "the type is not UTF-8", assemble(pack({"type": Raw(b"\xa2\xff\xfe"), "seq": 7})))
    case(
        "header_utf8_string",
        "a name is not UTF-8",
        assemble(pack({"type": "open", "model": Raw(b"\xa2\xc3\x28"), "key_id": "k"})),
    )
    deep = {"type": "cancel", "seq": 7, "x": Raw(b"\x91" * 5000)}
    case("header_deep_unknown", "5,000 nested arrays without an end", assemble(pack(deep)))
    case(
        "header_deep_tensors",
        "5,000 nested arrays in tensors",
        assemble(pack(APPEND | {"tensors": Raw(b"\x91" * 5000 + b"\xc0")})),
    )
    case("header_key_integer", "a key is not a string", assemble(pack({"type": "cancel", "seq": 7, 1: 1})))
    case(
        "header_huge_map",
        "a map of 4,294,967,295 pairs",
        assemble(b"\xdf\xff\xff\xff\xff" + pack("type") + pack("cancel")),
    )
    case(
        "header_huge_array",
        "lengths of 4,294,967,295 entries",
        assemble(pack(ENCODE | {"lengths": Raw(b"\xdd\xff\xff\xff\xff")})),
    )
    case(
        "header_huge_tensors",
        "tensors of 4,294,967,295 entries",
        assemble(pack(APPEND | {"tensors": Raw(b"\xdd\xff\xff\xff\xff")})),
    )
    case(
        "header_huge_string", "a string of 4,294,967,295 bytes", assemble(pack({"type": Raw(b"\xdb\xff\xff\xff\xff")}))
    )

    # Types and fields.
    case("type_missing", "no type", build({"seq": 7}))
    case("type_unknown", "no message has this type", build({"type": "reset", "seq": 7}))
    case("type_case", "types are lower case", build({"type": "Cancel", "seq": 7}))
    case("type_not_string", "the type is an integer", build({"type": 7, "seq": 7}))
    case("field_missing_append", "no keep", build({"type": "append", "seq": 7}, f32(1, 2)))
    case("field_missing_open", "no key_id", build({"type": "open", "model": "m"}))
    case(
        "field_missing_opened", "no window", build({name: value for name, value in OPENED.items() if name != "window"})
    )
    case("field_missing_logits", "no kv_length", build({"type": "logits", "seq": 7}, f32(1, 1), u32(1, 1), f32(1, 2)))
    case("field_missing_encode", "no lengths", build({"type": "encode", "seq": 7}, f32(3, 2)))
    case("field_missing_error", "no code", build({"type": "error", "message": ""}))
    for name, value, reason in (
        ("string", "7", "seq is a string"),
        ("boolean", True, "seq is a boolean"),
        ("float", 7.0, "seq is a float"),
        ("nil", None, "seq is nil"),
        ("binary", b"\x07", "seq is binary"),
        ("negative", -1, "seq is below 0"),
        ("too_large", 2**32, "seq is over 4,294,967,295"),
        ("largest", 2**64 - 1, "seq is over 4,294,967,295"),
    ):
        case(f"integer_{name}", reason, build({"type": "cancel", "seq": value}))
    for name, value in (
        ("nan", float("nan")),
        ("zero", 0.0),
        ("negative_zero", -0.0),
        ("negative", -1.0),
        ("infinity", float("inf")),
        ("too_large", 1000001.0),
        ("string", "1"),
        ("nil", None),
    ):
        case(f"temperature_{name}", f"temperature is {value!r}", build(APPEND | {"temperature": value}, f32(1, 2)))
    case("string_binary", "a name is binary", build({"type": "open", "model": b"m", "key_id": "k"}))
    case("string_name_long", "a name of 257 code points", build({"type": "open", "model": "m" * 257, "key_id": "k"}))
    case(
        "string_token_long",
        "a token of 513 code points",
        build({"type": "open", "model": "m", "key_id": "k", "token": "t" * 513}),
    )
    case(
        "string_message_long",
        "a message of 2,049 code points",
        build({"type": "error", "code": "internal", "message": "m" * 2049}),
    )
    case(
        "boolean_integer",
        "retryable is an integer",
        build({"type": "error", "code": "idle", "message": "", "retryable": 1}),
    )
    case("choice_want", "no such want", build(APPEND | {"want": "tokens"}, f32(1, 2)))
    case("choice_kind", "no such kind", build(APPEND | {"kind": "audio"}, f32(1, 2)))
    case("choice_code", "no such code", build({"type": "error", "code": "teapot", "message": ""}))
    case("choice_dtype", "no such dtype", build({"type": "open", "model": "m", "key_id": "k", "dtype": "float64"}))
    case("choice_opened_dtype", "auto is for Open alone", build(OPENED | {"dtype": "auto"}))
    case("lengths_not_array", "lengths is an integer", build(ENCODE | {"lengths": 3}, f32(3, 2)))
    case("lengths_negative", "a length is below 0", build(ENCODE | {"lengths": [4, -1]}, f32(3, 2)))

    # Descriptions of tensors.
    def described(tensors: Any, data: bytes = one) -> bytes:
        return assemble(pack(APPEND | {"tensors": tensors}), data)

    case("tensors_nil", "tensors is nil", described(None))
    case("tensors_map", "tensors is a map", described({"float32": [1, 2]}))
    case("tensors_entry_string", "an entry is no pair", described(["float32"]))
    case("tensors_entry_triple", "an entry has three parts", described([["float32", [1, 2], 0]]))
    case("tensors_entry_swapped", "shape before dtype", described([[[1, 2], "float32"]]))
    case("tensors_nine", "nine tensors", build(APPEND, *[f32(1, 1)] * 9))
    case("tensors_one_too_many", "an Append carries one tensor", build(APPEND, f32(1, 2), f32(1, 2)))
    case("tensors_one_too_few", "a Logits carries three tensors", build(LOGITS, f32(1, 1), u32(1, 1)))
    case("tensors_none", "an Append carries one tensor", build(APPEND))
    once = pack(APPEND | {"tensors": [["float32", [1, 2]]]})
    twice = bytes([once[0] + 1]) + once[1:] + pack("tensors") + pack([["float32", [1, 2]]])
    case("tensors_twice", "the key tensors twice, and bytes for both", assemble(twice, one, one))
    case("tensors_not_wanted", "a Cancel carries none", build({"type": "cancel", "seq": 7}, f32(1, 1)))
    case("dtype_unknown", "float64 is no wire dtype", described([["float64", [1, 1]]]))
    case("dtype_not_string", "the dtype is an integer", described([[4, [1, 2]]]))
    case("shape_not_array", "the shape is an integer", described([["float32", 2]]))
    case("shape_five_dimensions", "five dimensions", described([["float32", [1, 1, 1, 1, 2]]]))
    case("shape_negative", "a dimension is below 0", described([["float32", [-1, -2]]]))
    case("shape_float", "a dimension is a float", described([["float32", [1.0, 2]]]))
    case("shape_boolean", "a dimension is a boolean", described([["float32", [True, 2]]]))
    case("shape_too_large", "a dimension is 4,294,967,296", described([["float32", [0, 2**32]]], b""))
    case("shape_larger_than_frame", "a tensor of 4 GiB", described([["float32", [32768, 32768]]]))
    case("shape_overflow", "4,294,967,295 × 4,294,967,295", described([["float32", [MAX, MAX]]]))
    case("shape_wraps_32_bits", "65,536 × 65,536 is 0 in 32 bits", described([["float32", [65536, 65536]]], b""))
    case("shape_wraps_64_bits", "2^31 × 2^31 × 4 is 0 in 64 bits", described([["float32", [2**31, 2**31]]], b""))

    # Tensors of one message.
    case("append_integers", "embeddings are uint32", build(APPEND, u32(1, 2)))
    case("append_one_dimension", "embeddings have one dimension", build(APPEND, f32(2)))
    case("append_three_dimensions", "embeddings have three dimensions", build(APPEND, f32(1, 1, 2)))
    case("append_no_dimensions", "embeddings are a scalar", build(APPEND, f32()))
    case("append_too_many_rows", "2 rows of 1 embedding", build(APPEND | {"rows": 2}, f32(1, 2)), "bad_request")
    case("append_no_embeddings", "0 embeddings", build(APPEND | {"rows": 0}, f32(0, 2)), "bad_request")
    lse = f32(2, 2)
    case("logits_values_integers", "values are uint32", build(LOGITS, u32(2, 3), u32(2, 3), lse))
    case("logits_ids_floats", "ids are float32", build(LOGITS, f32(2, 3), f32(2, 3), lse))
    case("logits_ids_columns", "ids has fewer columns than values", build(LOGITS, f32(2, 3), u32(2, 2), lse))
    case("logits_ids_rows", "ids has fewer rows than values", build(LOGITS, f32(2, 3), u32(1, 3), lse))
    case("logits_ids_transposed", "ids is [k, rows]", build(LOGITS, f32(2, 3), u32(3, 2), lse))
    case("logits_ids_no_rows", "ids is [0, k]", build(LOGITS, f32(2, 3), u32(0, 3), lse))
    case("logits_one_log_sum_exp", "log_sum_exp is [rows, 1]", build(LOGITS, f32(2, 3), u32(2, 3), f32(2, 1)))
    case("logits_log_sum_exp_rows", "log_sum_exp is [rows - 1, 2]", build(LOGITS, f32(2, 3), u32(2, 3), f32(1, 2)))
    case("logits_log_sum_exp_half", "log_sum_exp is float16", build(LOGITS, f32(2, 3), u32(2, 3), f16(2, 2)))
    case("logits_one_dimension", "values have one dimension", build(LOGITS, f32(3), u32(1, 3), f32(1, 2)))
    case("hidden_integers", "hidden is uint32", build(LOGITS | {"type": "hidden"}, u32(2, 4)))
    case("hidden_three_dimensions", "hidden has three dimensions", build(LOGITS | {"type": "hidden"}, f32(1, 2, 2)))
    case("encode_one_dimension", "embeddings have one dimension", build(ENCODE, f32(3)))
    case("encode_lengths_sum", "lengths sum to 3, embeddings are 4", build(ENCODE, f32(4, 2)), "bad_request")
    case(
        "encode_lengths_wrap",
        "lengths sum to 3 in 32 bits",
        build(ENCODE | {"lengths": [MAX, 4]}, f32(3, 2)),
        "bad_request",
    )
    case("encode_no_lengths", "no sequence", build(ENCODE | {"lengths": []}, f32(0, 2)), "bad_request")
    case(
        "encode_length_zero",
        "a sequence of 0 embeddings",
        build(ENCODE | {"lengths": [3, 0]}, f32(3, 2)),
        "bad_request",
    )
    case("encoded_integers", "result is uint32", build(LOGITS | {"type": "encoded"}, u32(3, 2)))
    return cases


def _frame(description: str, frame: bytes, expect: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "kind": "frame", "frame": frame.hex(), "expect": expect}


def keys() -> dict[str, dict[str, Any]]:
    residual, vocab = [2, 0, 3, 1], [4, 2, 0, 1, 3]
    key = {"kind": "key", "residual": residual, "vocab": vocab, "encoder": None}
    header = (
        b'{"__metadata__":{"format":"stip-key-1","key_id":"00112233445566778899aabbccddeeff"},'
        b'"residual":{"dtype":"I32","shape":[4],"data_offsets":[0,16]},'
        b'"vocab":{"dtype":"I32","shape":[5],"data_offsets":[16,36]}}'
    )
    header += b" " * (-len(header) % 8)
    file = struct.pack("<Q", len(header)) + header + struct.pack("<9i", *residual, *vocab)
    # Orthogonal, not symmetric, and of halves: products with small integers are exact in every dtype and order.
    matrix = [[0.5, -0.5, 0.5, -0.5], [0.5, 0.5, -0.5, -0.5], [0.5, -0.5, -0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    rotating = {"kind": "key", "residual": matrix, "vocab": None, "encoder": None}
    matrix_header = (
        b'{"__metadata__":{"format":"stip-key-1","key_id":"00112233445566778899aabbccddeeff"},'
        b'"residual":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}'
    )
    matrix_header += b" " * (-len(matrix_header) % 8)
    flat = [value for row in matrix for value in row]
    matrix_file = struct.pack("<Q", len(matrix_header)) + matrix_header + struct.pack("<16f", *flat)
    # An encoder's stream of another width than the decoder's, one a permutation and one a matrix.
    reading = {"kind": "key", "residual": residual, "vocab": None, "encoder": [1, 2, 0]}
    reading_header = (
        b'{"__metadata__":{"format":"stip-key-1","key_id":"00112233445566778899aabbccddeeff"},'
        b'"encoder":{"dtype":"I32","shape":[3],"data_offsets":[0,12]},'
        b'"residual":{"dtype":"I32","shape":[4],"data_offsets":[12,28]}}'
    )
    reading_header += b" " * (-len(reading_header) % 8)
    reading_file = struct.pack("<Q", len(reading_header)) + reading_header + struct.pack("<7i", 1, 2, 0, *residual)
    reading_matrix = {"kind": "key", "residual": [1, 0], "vocab": None, "encoder": matrix}
    return {
        "key_hide": {"description": "embeddings [2, 4] hidden: permuted[j] = plain[residual[j]]"}
        | key
        | {
            "of": "hide",
            "plain": [[10, 11, 12, 13], [20, 21, 22, 23]],
            "permuted": [[12, 10, 13, 11], [22, 20, 23, 21]],
        },
        "key_reveal_hidden": {"description": "hidden states [1, 4] revealed: plain[residual[j]] = permuted[j]"}
        | key
        | {"of": "reveal_hidden", "permuted": [[10, 11, 12, 13]], "plain": [[11, 13, 10, 12]]},
        "key_reveal_ids": {"description": "permuted ids [2, 3] revealed: plain = vocab[permuted]"}
        | key
        | {"of": "reveal_ids", "permuted": [[0, 1, 2], [4, 3, 0]], "plain": [[4, 2, 0], [3, 1, 4]]},
        "key_reveal_rows": {"description": "full rows [1, 5] revealed: plain[vocab[j]] = permuted[j]"}
        | key
        | {"of": "reveal_rows", "permuted": [[10, 11, 12, 13, 14]], "plain": [[12, 13, 11, 14, 10]]},
        "key_file": {"description": "the bytes of a key file"} | key | {"of": "load", "file": file.hex()},
        "key_matrix_hide": {"description": "embeddings [2, 4] hidden by a matrix: permuted = plain R"}
        | rotating
        | {"of": "hide", "plain": [[2, 0, 0, 0], [2, 4, 6, 8]], "permuted": [[1, -1, 1, -1], [10, 2, 0, 4]]},
        "key_matrix_reveal_hidden": {"description": "a hidden state [1, 4] revealed: plain = permuted Rᵀ"}
        | rotating
        | {"of": "reveal_hidden", "permuted": [[2, 4, 6, 8]], "plain": [[-2, -4, 0, 10]]},
        "key_matrix_file": {"description": "the bytes of a key file with a matrix and no vocab"}
        | rotating
        | {"of": "load", "file": matrix_file.hex()},
        "key_encoder_hide": {"description": "image patches [2, 3] hidden: permuted[j] = plain[encoder[j]]"}
        | reading
        | {"of": "hide_encoder", "plain": [[10, 11, 12], [20, 21, 22]], "permuted": [[11, 12, 10], [21, 22, 20]]},
        "key_encoder_matrix_hide": {"description": "a source sequence [2, 4] hidden by a matrix: permuted = plain E"}
        | reading_matrix
        | {"of": "hide_encoder", "plain": [[2, 0, 0, 0], [2, 4, 6, 8]], "permuted": [[1, -1, 1, -1], [10, 2, 0, 4]]},
        "key_encoder_file": {"description": "the bytes of a key file with an encoder's permutation and no vocab"}
        | reading
        | {"of": "load", "file": reading_file.hex()},
    }


def draws() -> dict[str, dict[str, Any]]:
    pairs = ((0, 0), (0, 1), (0, 2), (1, 0), (42, 1000), (2**32, 2**32 - 1), (2**64 - 1, 0))
    cases = {}
    for seed, position in pairs:
        digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
        cases[f"draw_{seed}_{position}"] = {
            "description": "u = numerator / 2^53; the seed is a string, as it may pass 2^53",
            "kind": "draw",
            "seed": str(seed),
            "position": position,
            "numerator": struct.unpack("<Q", digest)[0] >> 11,
        }
    return cases


def vectors() -> dict[str, str]:
    """File name → content, of every file in shared/vectors."""
    cases = valid() | invalid() | keys() | draws()
    return {f"{name}.json": json.dumps(case, indent=1) + "\n" for name, case in cases.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    wanted = vectors()
    for stale in (path for path in FOLDER.glob("*.json") if path.name not in wanted):
        stale.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
    print(f"{len(wanted)} files in {FOLDER}")
