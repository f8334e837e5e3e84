"""Pooled features on disk, so that a text is run through a model once.

One folder per key (model, hook, SAE, pooling, settings: everything that decides a row), in it one file per call that
had something new. A file holds rows of documents by the digest of each document, so that any selection of documents in
any order, as cross-validation makes them, finds what earlier calls left. Files are safetensors, written atomically; one
that is damaged is removed and its rows are computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..files import digest_bytes, write_bytes

SCHEMA = 1
"""Version of the layout and of what pooling means; a file of another version is not used."""

DIGEST_BYTES = 16
"""Length of the digest of a document, the first bytes of its SHA-256."""


@dataclass(frozen=True)
class Rows:
    """Pooled features of some documents under one key."""

    digests: tuple[bytes, ...]
    """Digest of each document."""
    x: Any
    """Features, float32: CSR ``[n, n_latents]`` or an array ``[n, d]``."""
    n_rows: np.ndarray
    """Tokens of each document that were pooled, int64; 0 for one without tokens."""
    n_tokens: np.ndarray
    """Tokens of each document before any were cut off, int64."""

    def __len__(self) -> int:
        return len(self.digests)

    def pick(self, index: Sequence[int] | np.ndarray) -> Rows:
        """Some of the documents, in the order given."""
        index = np.asarray(index, np.int64)
        return Rows(tuple(self.digests[i] for i in index), self.x[index], self.n_rows[index], self.n_tokens[index])

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """The documents of all parts, one after another."""
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0].x, np.ndarray):
            x: Any = np.concatenate([part.x for part in parts])
        else:
            import scipy.sparse

            x = scipy.sparse.vstack([part.x for part in parts], format="csr", dtype=np.float32)
        return Rows(
            tuple(digest for part in parts for digest in part.digests),
            x,
            np.concatenate([part.n_rows for part in parts]),
            np.concatenate([part.n_tokens for part in parts]),
        )


def digest_of(document: str | bytes) -> bytes:
    """The digest that a document is kept under."""
    data = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def folder_of(cache: str | os.PathLike[str], key: Mapping[str, Any]) -> Path:
    """The folder for a key (plain JSON)."""
    return Path(cache).expanduser() / digest_bytes(_text(key).encode()).removeprefix("sha256:")[:32]


def read_rows(cache: str | os.PathLike[str], key: Mapping[str, Any]) -> Rows | None:
    """Everything that is kept under a key; None when there is nothing. Damaged files are removed."""
    parts = []
    for path in sorted(folder_of(cache, key).glob("*.safetensors")):
        try:
            parts.append(_read(path, key))
        except FormatError:
            with suppress(OSError):
                path.unlink()
    return Rows.cat(parts) if parts else None


def write_rows(cache: str | os.PathLike[str], key: Mapping[str, Any], rows: Rows) -> Path:
    """Keep rows under a key, in a file of their own.

    Raises
    ------
    OSError
        What the system raised; no part of a file is left.
    """
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {
        "digest": np.frombuffer(b"".join(rows.digests), np.uint8).reshape(len(rows), DIGEST_BYTES),
        "n_rows": rows.n_rows.astype(np.int64),
        "n_tokens": rows.n_tokens.astype(np.int64),
    }
    if isinstance(rows.x, np.ndarray):
        arrays["x"] = np.ascontiguousarray(rows.x, np.float32)
    else:
        arrays |= {
            "values": rows.x.data.astype(np.float32),
            "indices": rows.x.indices.astype(np.int32),
            "offsets": rows.x.indptr.astype(np.int64),
            "shape": np.array(rows.x.shape, np.int64),
        }
    # one entry only: the library writes several in any order, and equal rows should be equal bytes
    data = save(arrays, {"saekit": _text({"key": key, "content": _content(arrays)})})
    name = digest_bytes(b"".join(rows.digests)).removeprefix("sha256:")[:32]
    path = folder_of(cache, key) / f"{name}.safetensors"
    write_bytes(path, data)
    return path


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps({"schema": SCHEMA, **value}, sort_keys=True, allow_nan=False)


def _content(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _read(path: Path, key: Mapping[str, Any]) -> Rows:
    """One file, checked.

    Raises
    ------
    FormatError
        It is truncated, altered, or of another key or version.
    """
    import scipy.sparse
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("saekit", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"`{path}` cannot be read: {error}. It can be deleted.") from None
    if about.get("content") != _content(arrays) or about.get("key") != key:
        raise FormatError(f"`{path}` is not what was written for this key. It can be deleted.")
    digests = tuple(row.tobytes() for row in arrays["digest"])
    if "x" in arrays:
        x: Any = arrays["x"]
    else:
        parts = (arrays["values"], arrays["indices"], arrays["offsets"])
        x = scipy.sparse.csr_matrix(parts, shape=tuple(arrays["shape"].tolist()), dtype=np.float32)
    return Rows(digests, x, arrays["n_rows"], arrays["n_tokens"])
