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
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..files import check_file, digest_bytes, local_path, parse_json, remove_file, write_bytes
from ..ranks import Ranks, agreed, current
from ..sae.model import SAE
from .asks import Ask
from .document_pools import Matrix, Pooled

SCHEMA = 1
"""Version of the layout and of what pooling means; a file of another version is not used."""

DIGEST_BYTES = 16
"""Length of the digest of a document, the first bytes of its SHA-256."""


Computed = tuple[list[Pooled], np.ndarray, np.ndarray]
"""Matrices per ask, rows pooled per document, tokens per document before any cut."""


@dataclass(frozen=True)
class Rows:
    """Pooled features of some documents under one key."""

    digests: tuple[bytes, ...]
    """Digest of each document."""
    x: Matrix
    """Features, float32: CSR ``[n, n_latents]`` or an array ``[n, d]``."""
    n_rows: np.ndarray
    """Tokens of each document that were pooled, int64; 0 for one without tokens."""
    n_tokens: np.ndarray
    """Tokens of each document before any were cut off, int64."""

    def __len__(self) -> int:
        return len(self.digests)

    def pick(self, index: Sequence[int] | np.ndarray) -> Rows:
        """Return some of the documents, in the order given."""
        index = np.asarray(index, np.int64)
        return Rows(tuple(self.digests[i] for i in index), self.x[index], self.n_rows[index], self.n_tokens[index])

    def only(self, digests: Collection[bytes]) -> Rows:
        """Return the documents whose digest is among `digests`, in their order."""
        if len(digests) == len(self):
            return self
        return self.pick([i for i, digest in enumerate(self.digests) if digest in digests])

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """Return the documents of all parts, one after another."""
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0].x, np.ndarray):
            x: Matrix = np.concatenate([part.x for part in parts])
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
    """Return the digest that a document is kept under."""
    data = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def folder_of(cache: str | os.PathLike[str], key: Mapping[str, object]) -> Path:
    """Return the folder for a key (plain JSON)."""
    return local_path(cache) / digest_bytes(_text(key).encode()).removeprefix("sha256:")[:32]


def read_rows(cache: str | os.PathLike[str], key: Mapping[str, object]) -> Rows | None:
    """Return everything that is kept under a key; None when there is nothing. Damaged files are removed."""
    parts = []
    for path in sorted(folder_of(cache, key).glob("*.safetensors")):
        try:
            parts.append(_read(path, key))
        except FormatError:
            remove_file(path)
    return Rows.cat(parts) if parts else None


def write_rows(cache: str | os.PathLike[str], key: Mapping[str, object], rows: Rows) -> Path:
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
    data = save(arrays, {"saekit": _text({"key": key, "content": digest_arrays(arrays)})})
    name = digest_bytes(b"".join(rows.digests)).removeprefix("sha256:")[:32]
    path = folder_of(cache, key) / f"{name}.safetensors"
    write_bytes(path, data)
    return path


def _text(value: Mapping[str, object]) -> str:
    return json.dumps({"schema": SCHEMA, **value}, sort_keys=True, allow_nan=False)


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 over names, types, shapes and values of arrays, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _read(path: Path, key: Mapping[str, object]) -> Rows:
    """Read one file and check it.

    Raises
    ------
    FormatError
        It is truncated, altered, or of another key or version.
    """
    import scipy.sparse
    from safetensors import SafetensorError, safe_open

    try:
        check_file(path)
        with safe_open(path, framework="numpy") as file:
            about = parse_json((file.metadata() or {}).get("saekit", "{}"), path)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError) as error:  # numpy lacks some of the number types
        raise FormatError(f"`{path}` cannot be read: {error}. It can be deleted.") from None
    if not isinstance(about, dict) or about.get("content") != digest_arrays(arrays) or about.get("key") != key:
        raise FormatError(f"`{path}` is not what was written for this key. It can be deleted.")
    digests = tuple(row.tobytes() for row in arrays["digest"])
    if "x" in arrays:
        x: Matrix = arrays["x"]
    else:
        parts = (arrays["values"], arrays["indices"], arrays["offsets"])
        x = scipy.sparse.csr_matrix(parts, shape=tuple(arrays["shape"].tolist()), dtype=np.float32)
    return Rows(digests, x, arrays["n_rows"], arrays["n_tokens"])


def through_cache(
    digests: Sequence[bytes],
    asks: Sequence[Ask],
    about: Mapping[str, object],
    cache: str | os.PathLike[str] | None,
    compute: Callable[[Sequence[int], Sequence[Ask]], Computed],
) -> Computed:
    """Return the rows of every document for every ask: from the cache, the others computed in one pass and kept.

    Each different document is computed once, in the order of the digests: which other documents it shares a batch with
    then does not depend on the order they came in. Of several ranks rank 0 has the cache, and gets the rows.

    Parameters
    ----------
    digests
        Digest of each document; see `digest_of`.
    asks
        What is wanted.
    about
        What decides the rows besides the asks: model, tokenizer, settings (plain JSON).
    cache
        The folder; None: nothing is read or kept.
    compute
        From the indices of documents and asks to what is computed for them.

    Raises
    ------
    ConfigError
        There are no asks.
    """
    if not asks:
        raise ConfigError("there must be at least one ask; got none.")
    first: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        first.setdefault(digest, i)
    ranks = current()
    tables = {}
    if ranks.rank == 0:
        tables = {
            (n, pool): _Table.opened(cache, _key(ask, pool, about)) for n, ask in enumerate(asks) for pool in ask.pools
        }
    _fill(tables, first, asks, compute, ranks)
    if ranks.rank:
        return [], np.zeros(0, np.int64), np.zeros(0, np.int64)
    results: list[Pooled] = [{} for _ in asks]
    for (n, pool), table in tables.items():
        chosen = table.pick(digests)
        results[n][pool] = chosen.x
    return results, chosen.n_rows, chosen.n_tokens


def _fill(
    tables: Mapping[tuple[int, str], _Table],
    first: Mapping[bytes, int],
    asks: Sequence[Ask],
    compute: Callable[[Sequence[int], Sequence[Ask]], Computed],
    ranks: Ranks,
) -> None:
    """Compute in one pass whatever is missing in any table; `first` is where each document lies among those asked."""
    missing = agreed(ranks, lambda: {place: first.keys() - table.index.keys() for place, table in tables.items()})
    to_run = sorted(set().union(*missing.values()))
    if not to_run:
        return
    part = _asks_for([place for place, digests in missing.items() if digests], asks)
    pooled, n_rows, n_tokens = compute([first[digest] for digest in to_run], list(part.values()))
    if ranks.rank:
        return
    for n, result in zip(part, pooled):
        for pool, x in result.items():
            new = Rows(tuple(to_run), x, n_rows, n_tokens)
            tables[n, pool].add(new.only(missing[n, pool]))


def _asks_for(places: Sequence[tuple[int, str]], asks: Sequence[Ask]) -> dict[int, Ask]:
    """Return the asks for these places (numbers of asks and poolings), by their numbers."""
    pools: dict[int, tuple[str, ...]] = {}
    for n, pool in places:
        pools[n] = (*pools.get(n, ()), pool)
    return {n: replace(asks[n], pools=wanted) for n, wanted in pools.items()}


@dataclass
class _Table:
    """The rows under one key: those that were in the cache, and those that are added."""

    cache: str | os.PathLike[str] | None
    key: dict[str, Any]
    rows: Rows | None
    index: dict[bytes, int] = field(default_factory=dict)
    """Where the row of each document lies."""

    @staticmethod
    def opened(cache: str | os.PathLike[str] | None, key: dict[str, Any]) -> _Table:
        rows = None if cache is None else read_rows(cache, key)
        return _Table(cache, key, rows, {} if rows is None else {d: i for i, d in enumerate(rows.digests)})

    def add(self, new: Rows) -> None:
        """Add rows, and write them into the cache."""
        if self.cache is not None:
            write_rows(self.cache, self.key, new)
        self.rows = new if self.rows is None else Rows.cat([self.rows, new])
        self.index = {digest: i for i, digest in enumerate(self.rows.digests)}

    def pick(self, digests: Sequence[bytes]) -> Rows:
        """Return the rows of documents, in the order given."""
        assert self.rows is not None
        return self.rows.pick([self.index[digest] for digest in digests])


def _key(ask: Ask, pool: str, about: Mapping[str, object]) -> dict[str, Any]:
    sae = None if ask.sae is None else encoder_digest(ask.sae)
    return {**about, "hook": ask.place, "sae": sae, "pool": pool}


_encoder_digests: weakref.WeakKeyDictionary[SAE, str] = weakref.WeakKeyDictionary()


def encoder_digest(sae: SAE) -> str:
    """Return the digest of an SAE with an empty decoder: what decides its codes, and nothing else."""
    if sae not in _encoder_digests:
        encoder = sae.replace(W_dec=sae.W_dec[:, :0], b_dec=sae.b_dec[:0], W_skip=None)
        _encoder_digests[sae] = encoder.digest()
    return _encoder_digests[sae]
