"""The user key: the two permutations a device needs (STIP §5.2), and its file.

`residual` hides embeddings, `vocab` reveals logits. The model developer keeps all the others.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
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

    residual: [hidden_size], vocab: [vocab_size]; position j of the permuted space holds feature `residual[j]`
    (token `vocab[j]`) of the plain one.
    """

    key_id: str
    residual: Index
    vocab: Index

    def __post_init__(self) -> None:
        for name, index in (("residual", self.residual), ("vocab", self.vocab)):
            if index.ndim != 1 or not np.array_equal(np.sort(index), np.arange(index.size)):
                raise BundleError(f"key: {name} is not a permutation")

    def __repr__(self) -> str:
        return f"UserKey(key_id={self.key_id!r})"  # never the permutations

    def hide(self, embeddings: Array) -> Array:
        """x → xπ for embeddings [n, hidden_size]. STIP §5.2, line 6 of algorithm 1."""
        if embeddings.shape[-1] != self.residual.size:  # take() would cut wider ones and say nothing
            raise BundleError(f"embeddings: seen width {embeddings.shape[-1]}, wanted the key's {self.residual.size}")
        return embeddings.take(self.residual, axis=-1)

    def reveal_ids(self, permuted: Array) -> Index:
        """Plain token ids of permuted ids, any shape. Ids must be below vocab_size."""
        return self.vocab[permuted]

    def reveal_rows(self, permuted: Array) -> Array:
        """o' → o'π_cᵀ for full logit rows [rows, vocab_size]. STIP §5.2, line 8 of algorithm 1."""
        plain = np.empty_like(permuted)
        plain[..., self.vocab] = permuted
        return plain

    def reveal_hidden(self, permuted: Array) -> Array:
        """y' → y'πᵀ for hidden states [rows, hidden_size]."""
        plain = np.empty_like(permuted)
        plain[..., self.residual] = permuted
        return plain

    def save(self, path: Path) -> None:
        """Writes the key, created with mode 0600. Raises FileExistsError if `path` exists."""
        data = save(
            {"residual": self.residual.astype(np.int32), "vocab": self.vocab.astype(np.int32)},
            metadata={"format": FORMAT, "key_id": self.key_id},
        )
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
                for name in ("residual", "vocab"):
                    if (dtype := file.get_slice(name).get_dtype()) != "I32":
                        raise BundleError(f"key file {path}: {name}: seen dtype {dtype}, wanted I32")
                residual, vocab = (file.get_tensor(name).astype(np.int64) for name in ("residual", "vocab"))
        except (OSError, SafetensorError) as error:
            raise BundleError(f"key file {path}: {error}", hint="is this the device folder of an export?") from None
        return cls(metadata["key_id"], residual, vocab)
