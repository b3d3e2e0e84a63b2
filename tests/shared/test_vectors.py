"""shared/vectors/ against this implementation, and against the script that writes them."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared import wire
from shared.errors import WireError
from shared.key import UserKey

FOLDER = Path(wire.__file__).parent / "vectors"
CASES: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_bytes()) for path in sorted(FOLDER.glob("*.json"))}
FRAMES = {name: case for name, case in CASES.items() if case["kind"] == "frame"}
VALID = {name: case for name, case in FRAMES.items() if "message" in case["expect"]}
INVALID = {name: case for name, case in FRAMES.items() if "error" in case["expect"]}


def of_kind(kind: str) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] == kind]


def fields_of(message: wire.Message) -> dict[str, Any]:
    """A message in the vectors' form."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    fields["tensors"] = [
        {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "bytes": tensor.tobytes().hex()}
        for tensor in message.tensors
    ]
    if "lengths" in fields:
        fields["lengths"] = list(fields["lengths"])
    return {"type": message.__struct_config__.tag} | fields


@pytest.mark.parametrize("name", VALID)
def test_a_valid_frame_decodes_to_its_message(name: str) -> None:
    assert fields_of(wire.decode(bytes.fromhex(VALID[name]["frame"]))) == VALID[name]["expect"]["message"]


@pytest.mark.parametrize("name", VALID)
def test_a_valid_frame_re_encodes_to_a_frame_of_the_same_message(name: str) -> None:
    again = wire.encode(wire.decode(bytes.fromhex(VALID[name]["frame"])))
    assert fields_of(wire.decode(again)) == VALID[name]["expect"]["message"]


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_frame_is_refused_with_its_code(name: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode(bytes.fromhex(INVALID[name]["frame"]))
    assert caught.value.code == INVALID[name]["expect"]["error"], INVALID[name]["expect"]["reason"]


SECRETS = ("residual", "vocab", "encoder")


def key_of(case: dict[str, Any]) -> UserKey:
    """The key of a vector: lists of integers are permutations, lists of rows a matrix."""
    arrays = {name: None if case[name] is None else np.array(case[name]) for name in SECRETS}
    secrets = {name: array.astype(np.float32) if np.ndim(array) == 2 else array for name, array in arrays.items()}
    return UserKey("", **secrets)


@pytest.mark.parametrize("name", [name for name in of_kind("key") if "plain" in CASES[name]])
def test_a_key_hides_and_reveals_as_specified(name: str) -> None:
    case = CASES[name]
    key = key_of(case)
    given, wanted = ("plain", "permuted") if case["of"].startswith("hide") else ("permuted", "plain")
    assert getattr(key, case["of"])(np.array(case[given])).tolist() == case[wanted]


@pytest.mark.parametrize("name", [name for name in of_kind("key") if "file" in CASES[name]])
def test_a_key_file_holds_its_secrets(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "key.safetensors"
    path.touch(mode=0o600)
    path.write_bytes(bytes.fromhex(case["file"]))
    key = UserKey.load(path)
    read = {name: getattr(key, name) for name in SECRETS}
    assert all((None if read[name] is None else read[name].tolist()) == case[name] for name in SECRETS)


@pytest.mark.parametrize("name", of_kind("draw"))
def test_a_draw_is_blake2b_of_seed_and_position(name: str) -> None:
    case = CASES[name]
    message = int(case["seed"]).to_bytes(8, "little") + case["position"].to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8).digest()
    assert int.from_bytes(digest, "little") // 2**11 == case["numerator"]


def test_there_are_enough_cases() -> None:
    assert len(FRAMES) >= 40
    assert of_kind("key")
    assert of_kind("draw")


@pytest.mark.parametrize("tag", [tag for tag, _ in wire.messages()])
def test_every_message_has_a_valid_case(tag: str) -> None:
    assert any(case["expect"]["message"]["type"] == tag for case in VALID.values())


def test_padding_of_every_length_has_a_valid_case() -> None:
    ends = {4 + int.from_bytes(bytes.fromhex(case["frame"])[:4], "little") for case in VALID.values()}
    assert {-end % wire.ALIGNMENT for end in ends} == set(range(wire.ALIGNMENT))


def test_the_committed_files_are_what_the_script_writes() -> None:
    wanted = runpy.run_path(str(Path(__file__).with_name("make_vectors.py")))["vectors"]()
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == wanted
