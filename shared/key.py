"""The user key: the secrets a device needs (STIP §5.2), and its file.

`residual` hides embeddings and reveals hidden states, `vocab` reveals logits, `encoder` hides what an encoder reads
for the decoder. The model developer keeps all the others.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shared.errors import BundleError
from shared.wire import Array

Index = npt.NDArray[np.int64]

FORMAT = "stip-key-1"


def new_key_id() -> str:
    """A random name (128 bit) that ties the two halves of one export together. It is not secret."""
    return secrets.token_hex(16)


@dataclass(frozen=True, repr=False, eq=False)
class UserKey:
    """Hides embeddings [n, hidden_size] and reveals permuted ids, rows and hidden states.

    residual: a permutation [hidden_size], whose position j holds feature `residual[j]` of the plain space; or an
        orthogonal matrix [hidden_size, hidden_size] in float32, whose column j is basis vector j.
    vocab: a permutation [vocab_size], whose position j holds token (or class) `vocab[j]`; None where no logits travel,
        as the classifier is on the device or there is none.
    encoder: like `residual`, for the stream of an encoder that a decoder reads: image patches, or a source text.
    Raises BundleError where they are neither.
    """

    key_id: str
    residual: Array
    vocab: Index | None
    encoder: Array | None = None

    def __post_init__(self) -> None:
        for name, secret in (("residual", self.residual), ("encoder", self.encoder)):
            if secret is not None and _rotates(secret):
                _check_basis(name, secret)
            elif secret is not None:
                _check_permutation(name, secret)
        if self.vocab is not None:
            _check_permutation("vocab", self.vocab)

    def __repr__(self) -> str:
        return f"UserKey(key_id={self.key_id!r})"  # never the secrets

    @property
    def rotates(self) -> bool:
        """Whether `residual` is a matrix."""
        return _rotates(self.residual)

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""
        return len(self.residual)

    @property
    def vocab_size(self) -> int:
        """Width of a full row of permuted logits; 0 where the classifier is on the device."""
        return 0 if self.vocab is None else self.vocab.size

    def hide(self, embeddings: Array) -> Array:
        """x → xπ for embeddings [n, hidden_size]. STIP §5.2, line 6 of algorithm 1. A matrix gives float32."""
        return _hidden(embeddings, self._residual)

    def hide_encoder(self, embeddings: Array) -> Array:
        """The same for what an encoder reads: image patches or a source text [n, encoder_size]."""
        if self._encoder is None:
            raise BundleError("key: it hides nothing for an encoder, as its model has none beside the decoder")
        return _hidden(embeddings, self._encoder)

    def reveal_ids(self, permuted: Array) -> Index:
        """Plain token ids of permuted ids, any shape. Ids must be below vocab_size."""
        return self._order()[permuted]

    def reveal_rows(self, permuted: Array) -> Array:
        """o' → o'π_cᵀ for full logit rows [rows, vocab_size]. STIP §5.2, line 8 of algorithm 1."""
        plain = np.empty_like(permuted)
        plain[..., self._order()] = permuted
        return plain

    def reveal_hidden(self, permuted: Array) -> Array:
        """y' → y'πᵀ for hidden states [rows, hidden_size]. A matrix gives float32."""
        if self.rotates:
            return _product(permuted, self._residual.T)
        plain = np.empty_like(permuted)
        plain[..., self.residual] = permuted
        return plain

    @cached_property
    def _residual(self) -> Array:
        return _exact(self.residual)

    @cached_property
    def _encoder(self) -> Array | None:
        return None if self.encoder is None else _exact(self.encoder)

    def _order(self) -> Index:
        if self.vocab is None:
            raise BundleError("key: it reveals no logits, as its export has no classifier in the cloud")
        return self.vocab

    def save(self, path: Path) -> None:
        """Writes the key, created with mode 0600. Raises FileExistsError if `path` exists."""
        secrets_of = {"residual": self.residual, "vocab": self.vocab, "encoder": self.encoder}
        tensors = {
            name: secret.astype(np.float32 if _rotates(secret) else np.int32)
            for name, secret in secrets_of.items()
            if secret is not None
        }
        data = save(tensors, metadata={"format": FORMAT, "key_id": self.key_id})
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)

    @classmethod
    def load(cls, path: Path) -> UserKey:
        """Reads a key. Raises BundleError if it is unreadable, open to others, or not a key."""
        try:
            mode = path.stat().st_mode & 0o777
            if os.name == "posix" and mode & 0o077:
                raise BundleError(
                    f"key file {path}: seen mode {mode:04o}, wanted 0600, as others could read it",
                    hint=f"chmod 600 {path}",
                )
            with safe_open(path, "np") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise BundleError(
                        f"key file {path}: seen format {metadata.get('format')!r}, wanted {FORMAT!r}",
                        hint="export the bundle again with this version",
                    )
                if not metadata.get("key_id"):
                    raise BundleError(f"key file {path}: no key_id", hint="export the bundle again with this version")
                optional = [name for name in ("vocab", "encoder") if name in file.keys()]  # noqa: SIM118
                names = ["residual", *optional]
                for name in names:
                    allowed = ("I32",) if name == "vocab" else ("I32", "F32")
                    if (dtype := file.get_slice(name).get_dtype()) not in allowed:
                        raise BundleError(f"key file {path}: {name}: seen dtype {dtype}, wanted {' or '.join(allowed)}")
                read = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise BundleError(f"key file {path}: {error}", hint="is this the device folder of an export?") from None
        stored = {name: read[name] if read[name].dtype == np.float32 else read[name].astype(np.int64) for name in names}
        return cls(metadata["key_id"], stored["residual"], stored.get("vocab"), stored.get("encoder"))


def _rotates(secret: Array) -> bool:
    """Whether a secret is a matrix."""
    return secret.ndim == 2 and secret.dtype.kind == "f"


def _exact(secret: Array) -> Array:
    """A secret as it is computed with: matrices in float64."""
    return secret.astype(np.float64) if _rotates(secret) else secret


def _hidden(embeddings: Array, secret: Array) -> Array:
    """x → xπ, or x → x·basis in float32."""
    if embeddings.shape[-1] != len(secret):  # take() would cut wider ones and say nothing
        raise BundleError(f"embeddings: seen width {embeddings.shape[-1]}, wanted the key's {len(secret)}")
    return _product(embeddings, secret) if _rotates(secret) else embeddings.take(secret, axis=-1)


def _product(rows: Array, matrix: Array) -> Array:
    """rows·matrix in float64, rounded to float32.

    In float32 a row among others rounds otherwise than the same row alone, and the cloud must recognise an embedding
    that it is sent again.
    """
    product: Array = (rows.astype(np.float64) @ matrix).astype(np.float32)
    return product


def _check_permutation(name: str, index: Array) -> None:
    if index.ndim != 1 or index.dtype.kind not in "iu" or not np.array_equal(np.sort(index), np.arange(index.size)):
        raise BundleError(f"key: {name} is not a permutation")


def _check_basis(name: str, basis: Array) -> None:
    """Tries the matrix on one vector: its length must survive there and back."""
    probe = np.cos(np.arange(len(basis), dtype=np.float32))
    if basis.shape != (len(probe),) * 2 or not np.allclose(basis.T @ (basis @ probe), probe, atol=1e-3):
        raise BundleError(f"key: {name} is not an orthogonal matrix")
