"""Rows on disk: shards of fixed stride, written in order, read in shuffled blocks, and never trusted half written.

A folder holds ``manifest.json`` and ``shard-00000.safetensors``, ``shard-00001.safetensors``, ...: all of `shard_rows`
rows but the last, with the tensors ``x [n, d_in]`` (bf16, fp16 or fp32), ``token`` int32, ``document`` int64 and
``position`` int32 ``[n]``. A shard is an ordinary safetensors file, so any language can map it into memory; row r of
``x`` lies ``r * d_in * itemsize`` bytes after its start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..errors import ConfigError, DataError, FormatError, InputError, ShapeError, listed
from ..files import (
    LOCK_NAME,
    check_path,
    digest_bytes,
    digest_file,
    read_sealed,
    remove_file,
    write_bytes,
    write_sealed,
)
from ..forms import COUNT, NATURAL, check_form
from ..models.pretrained import DTYPES, as_dtype, dtype_name
from ..sae.finite import check_finite
from ..settings import differences
from ..store.tensorfile import read_header
from .arrays import ArrayRows
from .shuffle import ShufflePlan, planned_block, read_ahead
from .source import Batch, Block, Columns, Source, check_reading, rows_in_words
from .synthetic import ADDRESS, synthetic_rows

SCHEMA = 2
"""Version of the folder's layout; raised at every change that older releases cannot read."""

MANIFEST = "manifest.json"
_PART = "part-"
_FORMAT = "saekit-rows"
_SHARD_BYTES = 64 * 2**20
_COLUMNS = {"token": torch.int32, "document": torch.int64, "position": torch.int32}
# how numpy can map types (it has no bfloat16)
_NUMPY = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2", torch.int32: "<i4", torch.int64: "<i8"}
_MANIFEST_KEYS = {
    "format", "schema", "complete", "d_in", "dtype", "n_rows", "shard_rows", "shards", "fingerprint", "info",
}  # fmt: skip
_FORM = {
    "complete": bool, "d_in": COUNT, "dtype": str, "n_rows": NATURAL, "shard_rows": COUNT, "fingerprint": dict,
    "info": dict,
    "shards": [{"file": str, "rows": COUNT, "bytes": COUNT, "digest": str, "cursor": dict}],
}  # fmt: skip


@dataclass
class ShardWriter:
    """Writes rows into a folder, shard by shard; a new writer on the same folder goes on after the last whole shard.

    The caller holds the folder (`saekit.files.locked_folder`). The manifest comes first, without rows; after every
    shard it is replaced, with the caller's `cursor` in it: where to find the first row that is not yet in a shard.
    """

    folder: Path
    d_in: int
    dtype: torch.dtype
    fingerprint: dict[str, Any]
    """What the rows depend on; a folder that holds rows with another fingerprint is not touched."""
    shard_rows: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    _part: dict[str, Any] | None = None
    """The rows of an interrupted capture that fill no shard, as a file."""
    _parts: list[Columns] = field(default_factory=list)
    _waiting: int = 0

    @staticmethod
    def open(
        folder: str | os.PathLike[str],
        d_in: int,
        dtype: str | torch.dtype,
        fingerprint: Mapping[str, object],
        *,
        shard_rows: int | None = None,
    ) -> ShardWriter:
        """Start a folder, or go on with one that holds the same capture.

        Parameters
        ----------
        folder
            Where to write; created.
        d_in
            Width of a row.
        dtype
            ``bfloat16``, ``float16`` or ``float32``.
        fingerprint
            Plain JSON that settles the rows: model, data, hook, filters, ...
        shard_rows
            Rows in a shard; None: about 64 MiB.

        Raises
        ------
        ConfigError
            The folder holds something else, or a setting cannot work.
        FormatError
            The manifest is damaged or from a newer release.
        """
        number_type = as_dtype(dtype)
        if number_type is None or number_type not in DTYPES.values():
            raise ConfigError(f"shards hold {listed(DTYPES)}; got {dtype!r}. Choose one of them as `dtype`.")
        rows = _rows_of_a_shard(shard_rows, d_in, number_type)
        fingerprint = {**json.loads(json.dumps(dict(fingerprint), allow_nan=False)), "shard_rows": rows}
        writer = ShardWriter(check_path(folder), d_in, number_type, fingerprint, rows)
        writer._claim()
        return writer

    def _claim(self) -> None:
        """Go on with what is in the folder, or make it the folder of these rows."""
        if (self.folder / MANIFEST).exists():
            self._resume(read_manifest(self.folder))
        elif self.folder.is_dir() and (foreign := {path.name for path in self.folder.iterdir()} - {LOCK_NAME}):
            raise ConfigError(
                f"the output folder `{self.folder}` must be empty or hold rows; it holds {listed(sorted(foreign))}. "
                "Give another --out."
            )
        if not self.complete:
            self._remove_parts()
        if not self.shards and self._part is None:
            self._write_manifest()  # before the first shard: what a kill leaves is known as ours

    def _resume(self, manifest: dict[str, Any]) -> None:
        different = differences(manifest["fingerprint"], self.fingerprint)
        if different and manifest["shards"]:
            raise ConfigError(
                f"the output folder `{self.folder}` holds rows of another capture: {different}. "
                "Repeat its settings, give another --out, or delete the folder."
            )
        self.shards = [shard for shard in manifest["shards"] if not shard["file"].startswith(_PART)]
        self.complete = manifest["complete"]
        self.info = manifest["info"]
        for shard in self.shards:
            _check_shard(self.folder, shard)
        for part in manifest["shards"][len(self.shards) :]:
            self._read_part(part)

    def _read_part(self, part: dict[str, Any]) -> None:
        """Go on behind the rows that an interrupted capture kept; from the last whole shard if they are damaged."""
        path = self.folder / part["file"]
        if not path.is_file() or digest_file(path) != part["digest"]:
            return
        columns = {
            name: torch.from_numpy(values.copy())
            for name, values in _map(path, part["rows"], self.d_in, self.dtype).items()
        }
        self._part, self._waiting = part, part["rows"]
        self._parts = [Columns(**columns | {"x": columns["x"].view(self.dtype)})]

    @property
    def cursor(self) -> dict[str, Any] | None:
        """The cursor given with the last rows on disk; None at the beginning."""
        last = self._part or (self.shards[-1] if self.shards else None)
        return None if last is None else last["cursor"]

    @property
    def n_rows(self) -> int:
        """Rows given so far, those not yet on disk included."""
        return sum(shard["rows"] for shard in self.shards) + self._waiting

    def append(self, rows: Columns, cursor: Mapping[str, object], row: int = 0) -> None:
        """Add rows; write every shard that is full.

        Parameters
        ----------
        rows
            Rows with all three columns.
        cursor
            Where these rows come from, as plain JSON.
        row
            Number of the first of these rows at that place; the cursor of a shard is `cursor` with ``row`` in it.

        Raises
        ------
        DataError
            A value is NaN or infinite in the type of the shards.
        StorageError
            The disk is full, say; what is written is whole, and running again goes on from there.
        """
        if rows.x.shape[1] != self.d_in:
            raise ShapeError(
                f"rows must be {self.d_in} wide; got {rows.x.shape[1]}. Was the folder begun with another model?"
            )
        rows = Columns(rows.x.to(self.dtype), rows.token, rows.document, rows.position)
        check_finite(rows.x.float(), self.n_rows, "the capture")
        first = 0
        while first < len(rows):
            taken = min(self.shard_rows - self._waiting, len(rows) - first)
            self._parts.append(rows.map(lambda column, a=first, b=first + taken: column[a:b]))  # type: ignore[misc]
            self._waiting += taken
            first += taken
            if self._waiting == self.shard_rows:
                self._flush({**cursor, "row": row + first})

    def finish(self, info: Mapping[str, object]) -> None:
        """Write what is left and mark the folder complete.

        Raises
        ------
        DataError
            There are no rows.
        """
        if not self.n_rows:
            raise DataError(
                "there must be at least one row; the filters left none. Is every text empty or a special token?"
            )
        # The short last shard and the mark go into one manifest: no row can follow a short shard.
        self.info, self.complete = dict(info), True
        if self._waiting:
            self._flush({})
        else:
            self._write_manifest()

    def pause(self, cursor: Mapping[str, object]) -> None:
        """Keep the rows that fill no shard yet, for the writer that goes on.

        Parameters
        ----------
        cursor
            Where the next row comes from, as plain JSON.

        Raises
        ------
        StorageError
            The system refused.
        """
        if self._waiting:
            self._part = self._write(f"{_PART}{len(self.shards):05d}.safetensors", dict(cursor))
            self._write_manifest()

    def _flush(self, cursor: dict[str, Any]) -> None:
        self.shards = [*self.shards, self._write(_shard_name(len(self.shards)), cursor)]
        self._part, self._parts, self._waiting = None, [], 0
        self._write_manifest()
        self._remove_parts()

    def _write(self, name: str, cursor: dict[str, Any]) -> dict[str, Any]:
        """Write the waiting rows as one file, and return what the manifest says about it."""
        from safetensors.torch import save

        rows = Columns.cat(self._parts)
        tensors = {"x": rows.x.contiguous()}
        for column, kind in _COLUMNS.items():
            values = getattr(rows, column)
            tensors[column] = (
                torch.full((len(rows),), -1, dtype=kind) if values is None else values.to(kind).contiguous()
            )
        data = save(tensors)
        write_bytes(self.folder / name, data)
        return {"file": name, "rows": len(rows), "bytes": len(data), "digest": digest_bytes(data), "cursor": cursor}

    def _remove_parts(self) -> None:
        """Remove rows of interrupted captures that are in shards by now, or that no manifest names."""
        for path in self.folder.glob(f"{_PART}*.safetensors"):
            if self._part is None or path.name != self._part["file"]:
                remove_file(path)

    def _write_manifest(self) -> None:
        shards = self.shards if self._part is None else [*self.shards, self._part]
        write_sealed(
            self.folder / MANIFEST,
            {
                "format": _FORMAT,
                "schema": SCHEMA,
                "complete": self.complete,
                "d_in": self.d_in,
                "dtype": dtype_name(self.dtype),
                "n_rows": sum(shard["rows"] for shard in shards),
                "shard_rows": self.shard_rows,
                "shards": shards,
                "fingerprint": self.fingerprint,
                "info": self.info,
            },
        )


def _rows_of_a_shard(asked: int | None, d_in: int, dtype: torch.dtype) -> int:
    """Return the rows of a shard: those asked for, or whole chunks, so that a chunk of the shuffle lies in one file."""
    stride = d_in * dtype.itemsize + sum(kind.itemsize for kind in _COLUMNS.values())
    rows = asked or max(4096, _SHARD_BYTES // stride // 64 * 64)
    if not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"`shard_rows` must be a positive integer; got {asked!r}.")
    return rows


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder of rows and check it.

    Raises
    ------
    FormatError
        It is damaged, of another kind, or from a newer release.
    DataError
        There is none.
    """
    path = folder / MANIFEST
    if not path.is_file():
        inner = (
            sorted(str(p.parent.relative_to(folder)) for p in folder.glob(f"**/{MANIFEST}")) if folder.is_dir() else []
        )
        advice = f"It holds {listed(inner)}: name one of them." if inner else "Make rows with `saekit capture`."
        raise InputError(f"`{folder}` must be a folder of rows; it has no {MANIFEST}. {advice}")
    manifest = read_sealed(path, since=2)
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != _FORMAT
        or not isinstance(manifest.get("schema"), int)
    ):
        raise FormatError(
            f"`{path}` must describe rows of saekit; it does not. Give the folder that `saekit capture` wrote."
        )
    if manifest["schema"] > SCHEMA:
        raise FormatError(
            f"`{path}` has schema {manifest['schema']}; this release reads up to {SCHEMA}. Install a newer saekit."
        )
    if set(manifest) != _MANIFEST_KEYS:
        raise FormatError(
            f"`{path}` must have the entries {listed(sorted(_MANIFEST_KEYS), 12)}; missing or unknown: "
            f"{listed(sorted(set(manifest) ^ _MANIFEST_KEYS))}. Restore it, or capture again."
        )
    check_form(manifest, _FORM, path)
    _check_consistent(manifest, path)
    return manifest


def _check_consistent(manifest: Mapping[str, Any], path: Path) -> None:
    """Refuse entries that contradict each other: without a seal (schema 1) that is all that can be checked."""
    rows, stride = [shard["rows"] for shard in manifest["shards"]], manifest["shard_rows"]
    names = [shard["file"] for shard in manifest["shards"]]
    in_order = list(map(_shard_name, range(len(names)))) if manifest["complete"] else list(map(os.path.basename, names))
    checks = {
        "`dtype`": manifest["dtype"] in DTYPES,
        "`n_rows`": manifest["n_rows"] == sum(rows) and (bool(rows) or not manifest["complete"]),
        "`shard_rows`": {*rows[:-1]} <= {stride} and max(rows, default=0) <= stride,
        "the order of `shards`": names == in_order,
    }
    wrong = [name for name, fits in checks.items() if not fits]
    if wrong:
        raise FormatError(
            f"`{path}` must describe the shards beside it; {wrong[0]} does not fit the rest. "
            "Restore it, or capture again."
        )


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


@dataclass(frozen=True, init=False, eq=False)
class ShardRows:
    """Rows from a folder that `saekit.rows.capture` wrote, mapped into memory and read in blocks.

    Parameters
    ----------
    folder
        The folder with ``manifest.json``.
    verify
        ``"digest"``: each shard's SHA-256 is checked before its first row is used. ``"size"``: only its size.

    Raises
    ------
    DataError
        There is no such folder.
    FormatError
        A shard is missing, truncated or altered, the capture was not finished, or the schema is newer.
    """

    __repr__ = rows_in_words

    folder: Path
    info: dict[str, Any] = field(repr=False)
    plan: ShufflePlan = field(repr=False)
    verify: Literal["digest", "size"]
    _manifest: dict[str, Any] = field(repr=False)
    _mapped: dict[int, dict[str, np.ndarray]] = field(repr=False)

    def __init__(self, folder: str | os.PathLike[str], *, verify: Literal["digest", "size"] = "digest") -> None:
        if verify not in ("digest", "size"):
            raise ConfigError(f"`verify` must be `digest` or `size`; got {verify!r}.")
        folder = check_path(folder)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise FormatError(
                f"the capture in `{folder}` was not finished: {manifest['n_rows']} rows are there. "
                "Run the same capture again; it goes on where it stopped."
            )
        for shard in manifest["shards"]:
            _check_shard(folder, shard)
        width = manifest["d_in"] * DTYPES[manifest["dtype"]].itemsize
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "verify", verify)
        object.__setattr__(self, "plan", ShufflePlan.for_rows(manifest["n_rows"], width))
        object.__setattr__(self, "_manifest", manifest)
        object.__setattr__(self, "_mapped", {})
        digests = "".join(shard["digest"] for shard in manifest["shards"])
        object.__setattr__(
            self,
            "info",
            {
                **manifest["info"],
                "kind": "shards",
                "rows_path": str(folder.resolve()),
                "n_rows": manifest["n_rows"],
                "d_in": manifest["d_in"],
                "dtype": manifest["dtype"],
                "digest": digest_bytes(digests.encode()),
            },
        )

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return int(self._manifest["d_in"])

    @property
    def n_rows(self) -> int:
        """Rows of one pass."""
        return int(self._manifest["n_rows"])

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Yield rows in batches, see `saekit.rows.source.Source.batches`; a thread reads the next block meanwhile."""
        start = check_reading(self, batch_rows, seed, start)
        return read_ahead(lambda number: self._block(seed, number), batch_rows, start)

    def _block(self, seed: int | None, number: int) -> Block | None:
        return planned_block(self.plan, seed, number, self.read)

    def read(self, ranges: list[tuple[int, int]]) -> Columns:
        """Return the rows of these ranges, one after the other, copied out of the mapped files."""
        columns: dict[str, np.ndarray] = {}
        size, place = sum(last - first for first, last in ranges), 0
        for first, last in ranges:
            while first < last:
                index, row = divmod(first, self._manifest["shard_rows"])
                mapped = self._shard(index)
                # numpy asks the system for large pages: the rows of a block are read in any order.
                columns = columns or {n: np.empty((size, *a.shape[1:]), a.dtype) for n, a in mapped.items()}
                taken = min(last - first, len(mapped["x"]) - row)
                for name, values in columns.items():
                    values[place : place + taken] = mapped[name][row : row + taken]
                first += taken
                place += taken
        tensors = {name: torch.from_numpy(values) for name, values in columns.items()}
        return Columns(**tensors | {"x": tensors["x"].view(DTYPES[self._manifest["dtype"]])})

    def _shard(self, index: int) -> dict[str, np.ndarray]:
        """Return the mapped columns of a shard; its digest is checked the first time."""
        if index not in self._mapped:
            shard = self._manifest["shards"][index]
            path = self.folder / shard["file"]
            _check_shard(self.folder, shard)
            if self.verify == "digest" and digest_file(path) != shard["digest"]:
                raise FormatError(
                    f"the shard `{path}` has been altered: its digest is not the one in {MANIFEST}. "
                    "Restore it from a copy, or delete the folder and capture again."
                )
            self._mapped[index] = _map(path, shard["rows"], self.d_in, DTYPES[self._manifest["dtype"]])
        return self._mapped[index]


def _check_shard(folder: Path, shard: dict[str, Any]) -> None:
    """Refuse a shard that is missing or has another size than when it was written."""
    path = folder / shard["file"]
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
        came = "it is missing" if size is None else f"it has {size}, so it is truncated or altered"
        raise FormatError(
            f"the shard `{path}` must have {shard['bytes']} bytes; {came}. "
            "Restore it from a copy, or delete the folder and capture again."
        )


def _map(path: Path, rows: int, d_in: int, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file as read-only memory maps, bfloat16 as int16."""
    try:
        entries = read_header(path).entries
        mapped: dict[str, np.ndarray] = {}
        for name, kind in {"x": dtype, **_COLUMNS}.items():
            entry, shape = entries[name], (rows, d_in) if name == "x" else (rows,)
            if (entry.shape, entry.dtype) != (shape, kind):
                raise ValueError(f"`{name}` is {entry.dtype} {entry.shape}, not {kind} {shape}")
            values = np.memmap(path, dtype=_NUMPY[kind], mode="r", offset=entry.start, shape=shape)
            mapped[name] = values.view(np.ndarray)  # cutting one is several times faster than cutting a memmap
        return mapped
    except (KeyError, ValueError, OSError) as error:
        raise FormatError(
            f"the shard `{path}` cannot be read: {error}. "
            "Restore it from a copy, or delete the folder and capture again."
        ) from None


def open_rows(path: str | os.PathLike[str]) -> Source:
    """Open rows: a folder of shards, a ``.npy`` or a ``.safetensors`` file, or what an address stands for.

    Addresses are ``synthetic:d_in=32,n_features=64``, ``joined:base=PATH,tuned=PATH`` and ``joined-null:…``.

    Raises
    ------
    DataError
        There is nothing there, or something else.
    FormatError
        It is damaged.
    ConfigError
        An address of synthetic rows that cannot be.
    """
    if os.fspath(path).startswith(ADDRESS):
        return synthetic_rows(os.fspath(path))
    if os.fspath(path).startswith(("joined:", "joined-null:")):
        from .joined import joined_rows  # which opens each of its sources

        return joined_rows(os.fspath(path))
    if check_path(path).is_dir():
        return ShardRows(path)
    return ArrayRows.from_file(path)
