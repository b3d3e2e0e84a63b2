"""Where a model comes from: a hub id, a local folder, or a GGUF file. Tensors are read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from export.families import family_of
from export.gguf.config import differences, mended
from export.gguf.file import GgufFile
from export.gguf.layout import FREQUENCIES, LAYOUTS, Form, Forms
from export.gguf.settings import frequency_factors
from export.progress import listed
from export.shards import Shards
from export.spaces import Dropped
from export.stock import StockNames, empty_model
from shared.errors import SourceError

WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.spm", "*.txt"]
UNREADABLE = "give the model's safetensors"
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "source.spm",
)


class Source(Protocol):
    """A model to export."""

    config: PretrainedConfig  # its `architectures` name the class that is served
    shapes: dict[str, tuple[int, ...]]  # of every tensor, under the stock model's names
    tied: dict[str, str]  # tensors of the stock model that are other ones
    dtype: torch.dtype  # the one that holds every stored value exactly

    def read(self, name: str) -> torch.Tensor:
        """One tensor, shape `shapes[name]`."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reference tokenizer."""

    def end_ids(self) -> list[int]:
        """Token ids at which generation ends."""

    def banned_ids(self) -> list[int]:
        """Token ids that are never generated."""

    def image_settings(self) -> dict[str, Any]:
        """What the stock image processor does to an image: its settings, as transformers names them."""

    def pooling(self) -> dict[str, Any]:
        """How hidden states become a sentence's vector, as sentence-transformers says it; empty if nothing does."""


def open_source(model: str) -> Source:
    """Opens a hub id, a folder of safetensors, or a `.gguf` file. Raises SourceError."""
    path = Path(model).expanduser()
    if path.is_dir():
        return FolderSource(path)
    if path.suffix == ".gguf":
        return GgufSource(path)
    if path.exists() or model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise SourceError(
            f"model {model!r}: {'not a folder or .gguf file' if path.exists() else 'no such folder or file'}",
            hint="give a hub id such as org/name, a folder with config.json and *.safetensors, or a .gguf file",
        )
    return FolderSource(_download(model))


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=WANTED_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"model {model!r}: cannot be had from the hub: {_first_line(error)}",
            hint="check the id, the network, and `hf auth login` for gated models; or give a local folder",
        ) from None


def _config(folder: Path, **options: Any) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(
            f"{folder}: its config cannot be read: {_first_line(error)}",
            hint="an architecture that the installed transformers does not know cannot be exported",
        ) from None


def _tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    except ImportError:
        raise
    except Exception as error:  # the tokenizers library raises no narrower one
        raise SourceError(
            f"{folder / options.get('gguf_file', '')}: its tokenizer cannot be read: {_first_line(error)}",
            hint="download the model again",
        ) from None
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


class FolderSource:
    """A local Hugging Face checkpoint in safetensors."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise SourceError(f"{folder}: no config.json", hint="give the folder that save_pretrained() wrote")
        self.folder = folder
        self.config = _config(folder)
        family = family_of(self.config)
        self.config.architectures = [family.served_class(self.config)]
        shards = Shards(folder)
        names = StockNames(self.config, shards.shapes, shards.read)
        self.tied, self.read = names.tied, names.read
        # Every tensor must be in the table; what the stock model of this config has no place for, it does not load.
        needed = [name for name in names.shapes if not isinstance(family.axes(name), Dropped) and name in names.known]
        self.shapes = {name: names.shapes[name] for name in needed}
        stored = [one for name in needed for one in names.stored(name)]
        self.dtype = _exact_dtype({name: shards.dtypes[name] for name in stored}, folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if not any((self.folder / name).exists() for name in TOKENIZER_FILES):
            raise SourceError(f"{self.folder}: no tokenizer", hint="copy tokenizer.json into the model's folder")
        tokenizer = _tokenizer(self.folder)
        if tokenizer.chat_template is None:  # models that see may have it in a file of their processor's
            tokenizer.chat_template = _json(self.folder / "chat_template.json").get("chat_template")
        return tokenizer

    def end_ids(self) -> list[int]:
        ids = _as_list(self.config.get_text_config().eos_token_id) + _as_list(self._generation().get("eos_token_id"))
        return sorted(set(ids))

    def banned_ids(self) -> list[int]:
        # Old checkpoints have it in their config, which transformers no longer reads it from.
        settings = _json(self.folder / "config.json") | self._generation()
        words = settings.get("bad_words_ids") or []
        return sorted({word[0] for word in words if len(word) == 1})

    def _generation(self) -> dict[str, Any]:
        return _json(self.folder / "generation_config.json")

    def image_settings(self) -> dict[str, Any]:
        if not any((self.folder / name).exists() for name in IMAGE_FILES):
            raise SourceError(f"{self.folder}: no {IMAGE_FILES[0]}", hint="copy it into the model's folder")
        try:
            processor = AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        except (ValueError, OSError, KeyError) as error:
            raise SourceError(
                f"{self.folder}: its image processor cannot be read: {_first_line(error)}",
                hint="download the model again",
            ) from None
        settings: dict[str, Any] = processor.to_dict()
        return settings

    def pooling(self) -> dict[str, Any]:
        modules = self.folder / "modules.json"
        if not modules.exists():
            return {}
        try:
            kinds = [module["type"].rpartition(".")[2] for module in _parsed(modules)]
        except (TypeError, KeyError, AttributeError):
            raise SourceError(
                f"{modules}: wanted a list of modules, each with its type", hint="download the model again"
            ) from None
        if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
            raise SourceError(
                f"{modules}: seen the module {sorted(unknown)[0]}, wanted Transformer, Pooling, Normalize"
            )
        settings = _json(self.folder / "1_Pooling" / "config.json") | _json(self.folder / "sentence_bert_config.json")
        return settings | {"normalize": "Normalize" in kinds}


def _json(path: Path) -> dict[str, Any]:
    """A file of settings; empty where there is none. Raises SourceError if it cannot be read."""
    settings = _parsed(path) if path.exists() else {}
    if not isinstance(settings, dict):
        raise SourceError(
            f"{path}: seen a {type(settings).__name__}, wanted an object", hint="download the model again"
        )
    return settings


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SourceError(f"{path}: {_first_line(error)}", hint="download the model again") from None


def _exact_dtype(dtypes: dict[str, str], folder: Path) -> torch.dtype:
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    odd = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in known]
    if odd:
        raise SourceError(
            f"{folder}: tensors that are not float32, float16 or bfloat16: {listed(odd)}",
            hint="quantised safetensors are not supported; give the unquantised model",
        )
    found = {known[dtype] for dtype in dtypes.values()}
    return found.pop() if len(found) == 1 and found <= {torch.float16, torch.bfloat16} else torch.float32


class GgufSource:
    """A GGUF file, dequantised one tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)  # the tensors as they are stored
        architecture = self.file.metadata["general.architecture"]
        known = sorted({layout.name for layout in LAYOUTS.values()})
        if architecture not in known:
            raise SourceError(
                f"{path}: seen the architecture {architecture!r}, wanted one of: {', '.join(known)}",
                hint="llama.cpp stores others differently: give the safetensors",
            )
        self._said = self.file.metadata.without(f"{architecture}.")
        factors = self.file.read(FREQUENCIES).float() if FREQUENCIES in self.file.tensors else None
        self.config = mended(_config(path.parent, gguf_file=path.name), self._said, self.file.tensors, factors)
        self._check_settings(factors)
        self.config.architectures = [family_of(self.config).served_class(self.config)]
        self.tied = dict(empty_model(self.config).all_tied_weights_keys or {})
        self.forms = self._under_stock_names()  # of every tensor that the file has
        self.shapes = {name: tuple(self._stock(name, meta=True).shape) for name in self.forms}
        self.dtype = torch.float32  # dequantised values need it, and norm weights are stored in it

    def _under_stock_names(self) -> dict[str, Form]:
        form, stored = Forms(self.config), set(self.file.tensors)
        forms = {name: form(name) for name in _stock_parameters(self.config)}
        forms = {name: one for name, one in forms.items() if stored.issuperset(one.names)}
        if odd := sorted(stored - {part for one in forms.values() for part in one.names} - {FREQUENCIES}):
            raise SourceError(f"{self.path}: tensors without a stock name: {listed(odd)}")
        return forms

    def _check_settings(self, factors: torch.Tensor | None) -> None:
        """Raises SourceError where the config is not what the file says."""
        if odd := differences(self.config, self._said):
            raise SourceError(f"{self.path}: cannot be read as a stock config: {listed(odd)}", hint=UNREADABLE)
        if factors is not None:
            wanted = frequency_factors(self.config)
            if not torch.allclose(factors, torch.ones_like(factors) if wanted is None else wanted, rtol=1e-4):
                raise SourceError(f"{self.path}: its rotary frequencies are scaled in an unknown way", hint=UNREADABLE)

    def _stock(self, name: str, *, meta: bool = False) -> torch.Tensor:
        """A tensor as the stock model has it; meta: without its values."""
        form, tensors = self.forms[name], self.file.tensors
        if meta:
            return form.stock([torch.empty(tensors[part].shape, device="meta") for part in form.names])
        return form.stock([self.file.read(part).float() for part in form.names])

    def read(self, name: str) -> torch.Tensor:
        return self._stock(name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return _tokenizer(self.path.parent, gguf_file=self.path.name)

    def end_ids(self) -> list[int]:
        return sorted(self.file.end_ids.union(_as_list(self.config.eos_token_id)))

    def banned_ids(self) -> list[int]:
        return []

    def image_settings(self) -> dict[str, Any]:
        raise SourceError(f"{self.path}: a GGUF file says nothing about images")

    def pooling(self) -> dict[str, Any]:
        return {}


def _stock_parameters(config: PretrainedConfig) -> list[str]:
    return [name for name, _ in empty_model(config).named_parameters()]
