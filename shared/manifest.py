"""What each half of an export says about itself, and the checks that it is whole.

Each manifest carries digests of its own half's files and of itself. They find damage and mixed-up folders; they are
not signatures, and whoever can write the folder can write new ones.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from shared.errors import BundleError
from shared.wire import SUBPROTOCOL, FloatName

DEVICE_MANIFEST = "manifest.json"
CLOUD_MANIFEST = "stip.json"
GGUF_HEADER = 2**20  # bytes at a GGUF file's beginning: its metadata and tensor list lie there, as it has no tokenizer
# Fields that are younger than the format, and what they are where they say nothing.
LATER: dict[str, object] = {"weights": "safetensors", "quantisation": None}


Kind = Literal[
    "decoder",  # text in, the next token's logits out
    "encoder",  # text in, hidden states and perhaps pooled vectors or class logits out
    "image-encoder",  # the same for images
    "vision-decoder",  # a decoder that images may be given to, between texts
    "encoder-decoder",  # a source text to an encoder, the next token's logits out of a decoder
]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Length in bytes and SHA-256 of one file; for files of weights also the SHA-256 of the header alone."""

    bytes: int
    sha256: str
    header_sha256: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What both halves carry."""

    protocol: str = SUBPROTOCOL
    key_id: str
    served_name: str
    scheme: str
    dtype: FloatName
    warning: str | None = None  # set where the export was seeded: not for use
    files: dict[str, FileEntry] = {}
    digest: str = ""


class CloudManifest(Manifest, frozen=True, kw_only=True, tag_field="format", tag="stip-cloud-1"):
    """`stip.json`. Nothing in it says anything about the device half's content."""

    kind: Kind = "decoder"
    absent: list[str]  # parameters of the stock architecture that are not in the checkpoint, on purpose
    weights: Literal["safetensors", "gguf"] = "safetensors"
    quantisation: str | None = None  # how a GGUF file stores its matrices: f32, q8_0, …


class ImageFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes the pixels that image.onnx takes: resized, then perhaps cut out of the middle."""

    height: int  # of image.onnx's pixels
    width: int
    resize: tuple[int, int] | int  # to [height, width] whatever the shape was; or the shorter side to this length
    resample: int  # Pillow's resampling filter
    patches: int  # rows of embeddings that image.onnx gives
    tokens: int = 0  # positions of the KV cache that an image takes; 0 where there is none
    token_id: int | None = None  # what stands for an image in the chat template's text


class DeviceManifest(Manifest, frozen=True, kw_only=True, tag_field="format", tag="stip-device-1"):
    """`manifest.json` of the device folder."""

    kind: Kind = "decoder"
    family: str
    head: Literal["cloud", "device"] = "cloud"  # where the classifier runs
    hidden_size: int
    vocab_size: int  # token ids; 0 where there is no text
    context: int  # positions of the decoder, or of the encoder where there is no other
    encoder_size: int = 0  # width of image patches or source embeddings, where a decoder reads an encoder
    encoder_context: int = 0  # rows of every image, or of the longest source sequence
    labels: list[str] = []  # names of the classes, where the model has any
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"  # from class logits to probabilities, or scores
    outputs: list[Literal["hidden", "pooled", "logits"]] = []  # what an encoder can be asked for
    pooling: Literal["mean", "first"] | None = None  # how hidden states become one vector of a sentence
    normalize: bool = False  # whether that vector is brought to length 1
    image: ImageFormat | None = None
    streams: dict[str, Literal["permutation", "rotation"]] = {}  # what hides each residual stream
    tokenizer: Literal["onnx", "json", "sentencepiece", "none"]
    tokenizer_proof: str  # how many strings it was proven on, or why the fallback was taken
    prefix_ids: list[int]  # what the tokenizer puts before plain text (begin-of-sequence)
    suffix_ids: list[int] = []  # and behind it (end of sequence)
    start_ids: list[int] = []  # what a decoder that reads an encoder begins with
    banned_ids: list[int] = []  # never generated
    end_ids: list[int]  # generation stops at any of these
    hidden_ids: list[int]  # special tokens: never shown as text
    special_tokens: dict[str, str]  # what the chat template may name: bos_token, eos_token, …
    check: dict[str, Any]  # figures of the equivalence check at export


M = TypeVar("M", CloudManifest, DeviceManifest)


def file_entry(path: Path) -> FileEntry:
    """Length and digest of `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        length = file.tell()
    weights = path.suffix in (".safetensors", ".gguf") and path.name != "key.safetensors"
    header = shard_header_digest(path) if weights else None
    return FileEntry(bytes=length, sha256=digest.hexdigest(), header_sha256=header)


def _digest(file: Any) -> Any:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def shard_header_digest(path: Path) -> str:
    """SHA-256 of the header of a file of weights, which names its tensors, their shapes, its key and, in safetensors,
    its own file name."""
    with path.open("rb") as file:
        if path.suffix == ".gguf":
            return hashlib.sha256(file.read(GGUF_HEADER)).hexdigest()
        prefix = file.read(8)
        header = file.read(min(int.from_bytes(prefix, "little"), 100_000_000))
    return hashlib.sha256(prefix + header).hexdigest()


def _own_digest(manifest: CloudManifest | DeviceManifest) -> str:
    bare = msgspec.to_builtins(msgspec.structs.replace(manifest, digest=""))
    for field, default in LATER.items():  # where they say nothing, older exports have the digest they always had
        if field in bare and bare[field] == default:
            del bare[field]
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()


def write_manifest(manifest: CloudManifest | DeviceManifest, folder: Path) -> None:
    """Writes the manifest into its folder, with the digest of everything else in it."""
    name = CLOUD_MANIFEST if isinstance(manifest, CloudManifest) else DEVICE_MANIFEST
    sealed = msgspec.structs.replace(manifest, digest=_own_digest(manifest))
    (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n")


def read_manifest(folder: Path, kind: type[M]) -> M:
    """The manifest of one half of an export. Raises BundleError if it is missing, edited or of another version."""
    name = CLOUD_MANIFEST if kind is CloudManifest else DEVICE_MANIFEST
    other = DEVICE_MANIFEST if kind is CloudManifest else CLOUD_MANIFEST
    half = "cloud" if kind is CloudManifest else "device"
    path = folder / name
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        hint = f"give the export's {half} folder, for example OUT/{half}"
        if (folder / other).exists():
            hint = f"this is the other half; {hint}"
        raise BundleError(f"{path}: {error.strerror or error}", hint=hint) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: {error}", hint="export again with this version of stip-export") from None
    if manifest.protocol != SUBPROTOCOL:
        raise BundleError(f"{path}: seen protocol {manifest.protocol!r}, wanted {SUBPROTOCOL!r}", hint="export again")
    if manifest.digest != _own_digest(manifest):
        raise BundleError(f"{path}: its content does not fit its digest, so it was edited", hint="export again")
    return manifest


def check_files(folder: Path, manifest: Manifest, *, contents: bool) -> None:
    """Every file of the manifest is there with its length, and shards with their headers; `contents`: all bytes too.

    Raises BundleError naming the file, what was seen and what was wanted.
    """
    for name in manifest.files:
        check_file(folder, manifest, name, contents=contents)


def check_file(folder: Path, manifest: Manifest, name: str, *, contents: bool) -> None:
    """The same for one of the manifest's files."""
    if Path(name).name != name:
        raise BundleError(f"{folder}: manifest names {name!r}, wanted a plain file name", hint="export again")
    try:
        _check(folder / name, manifest.files[name], contents)
    except OSError as error:
        raise BundleError(f"{folder / name}: {error.strerror or error}", hint="may this user read it?") from None


def _check(path: Path, entry: FileEntry, contents: bool) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing", hint="copy the whole folder again")
    length = path.stat().st_size
    if length != entry.bytes:
        raise BundleError(
            f"{path}: seen {length} bytes, wanted {entry.bytes}", hint="truncated? copy it again from the export"
        )
    if entry.header_sha256 and shard_header_digest(path) != entry.header_sha256:
        raise BundleError(
            f"{path}: its header is not the one this export wrote",
            hint="swapped with another shard, or from another export; copy it again",
        )
    if (contents or entry.header_sha256 is None) and file_entry(path).sha256 != entry.sha256:
        raise BundleError(f"{path}: its SHA-256 is not the one in the manifest", hint="damaged; copy it again")
