"""Rows from an array in memory or an array file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError, InputError, ShapeError, listed, nearest
from ..files import check_file, check_path, digest_bytes
from ..sae.finite import check_finite
from .shuffle import CHUNK_ROWS, ShufflePlan, planned_block, read_batches
from .source import _SCAN_ROWS, Batch, Block, Columns, check_reading, rows_in_words

_DIGEST_BYTES = 2**30  # beyond this, a digest is made from evenly spaced chunks and is marked as such


@dataclass(frozen=True, init=False, eq=False)
class ArrayRows:
    """Rows that are already there: a tensor, a numpy array or a memory map.

    Parameters
    ----------
    x
        Rows ``[n, d_in]``, any real number type; batches hold them as float32. Never copied as a whole nor changed.
    token, document, position
        Optional columns ``[n]`` of integers.
    target
        For transcoders: what they must predict from each row, ``[n, d_out]`` in memory.
    info
        What the rows are (plain JSON); completed with kind, sizes, dtype and digest.

    Raises
    ------
    ShapeError
        `x` is not two-dimensional, or a column has another length.
    DataError
        There are no rows, or a value is NaN or infinite (a memory map is checked as it is read).

    Examples
    --------
    >>> rows = ArrayRows(torch.arange(6.0).reshape(3, 2))
    >>> [batch.x.tolist() for batch in rows.batches(2)]
    [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0]]]
    """

    __repr__ = rows_in_words

    x: Any = field(repr=False)
    token: Tensor | None = field(repr=False)
    document: Tensor | None = field(repr=False)
    position: Tensor | None = field(repr=False)
    target: Tensor | None = field(repr=False)
    info: dict[str, Any]
    plan: ShufflePlan = field(repr=False)
    _read: Callable[[int, int], Tensor] = field(repr=False)
    _checked: bool = field(repr=False)

    def __init__(
        self,
        x: Any,
        token: Any = None,
        document: Any = None,
        position: Any = None,
        info: Mapping[str, Any] | None = None,
        *,
        target: Any = None,
    ) -> None:
        x, read, dtype, lazy = _as_rows(x)
        n_rows, d_in = x.shape if hasattr(x, "shape") else x.get_shape()
        if not n_rows or not d_in:
            raise InputError(
                f"there must be at least one row; got an array of shape {(n_rows, d_in)}. Is the source empty?"
            )
        columns = {
            name: _as_column(name, column, n_rows)
            for name, column in (("token", token), ("document", document), ("position", position))
        }
        info = dict(info or {})
        row_bytes = d_in * dtype.itemsize
        for name, value in columns.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "target", None if target is None else _as_target(target, n_rows))
        object.__setattr__(self, "_read", read)
        object.__setattr__(self, "plan", ShufflePlan.for_rows(n_rows, row_bytes))
        if not lazy:
            for first in range(0, n_rows, _SCAN_ROWS):
                check_finite(read(first, min(first + _SCAN_ROWS, n_rows)).float(), first, self._name(info))
        object.__setattr__(self, "_checked", not lazy)
        digest = info.get("digest") or _digest_rows(read, n_rows, d_in, row_bytes, dtype)
        if self.target is not None:
            info["d_out"] = self.target.shape[1]
            if "digest" not in info:
                digest = digest_bytes(f"{digest} {_digest_target(self.target)}".encode())
        object.__setattr__(
            self,
            "info",
            {
                "kind": "array",
                **info,
                "n_rows": n_rows,
                "d_in": d_in,
                "dtype": str(dtype).removeprefix("torch."),
                "digest": digest,
            },
        )

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return int(self.info["d_in"])

    @property
    def n_rows(self) -> int:
        """Rows of one pass."""
        return int(self.info["n_rows"])

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Yield rows in batches; see `Source.batches`."""
        start = check_reading(self, batch_rows, seed, start)
        return read_batches(lambda number: self._block(seed, number), batch_rows, start)

    def read(self, ranges: list[tuple[int, int]]) -> Columns:
        """Return the rows of these ranges; see `saekit.rows.source.Stored`."""
        return Columns.cat([self._columns(first, last) for first, last in ranges])

    def _block(self, seed: int | None, number: int) -> Block | None:
        return planned_block(self.plan, seed, number, self.read)

    def _columns(self, first: int, last: int) -> Columns:
        x = self._read(first, last)
        if not self._checked:
            check_finite(x.float(), first, self._name(self.info))

        def cut(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[first:last]

        return Columns(x, cut(self.token), cut(self.document), cut(self.position), cut(self.target))

    @staticmethod
    def _name(info: Mapping[str, Any]) -> str:
        return f"`{info['path']}`" if "path" in info else "the array"

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> ArrayRows:
        """Return rows from a ``.npy`` or ``.safetensors`` file, memory-mapped.

        A safetensors file holds ``x`` (or exactly one two-dimensional tensor of any name) and optionally ``token``,
        ``document``, ``position`` and ``target``.

        Raises
        ------
        FormatError
            The file is truncated or holds no rows.
        DataError
            There is no such file, or it has another ending.
        """
        path = check_path(path)
        if not path.is_file():
            raise InputError(f"`{path}` must be a file of rows; there is no such file. Check the path.")
        info = {"kind": "array", "path": path.name, "rows_path": str(path.resolve())}
        if path.suffix == ".npy":
            return ArrayRows(_open_npy(path), info=info)
        if path.suffix == ".safetensors":
            return ArrayRows(info=info, **_open_safetensors(path))
        raise InputError(
            f"rows come from .npy or .safetensors files; got `{path.name}`. Save the array as one of these."
        )


def _as_rows(x: Any) -> tuple[Any, Callable[[int, int], Tensor], torch.dtype, bool]:
    """Return the array, a reader of row ranges, its type, and whether reading is lazy (from disk)."""
    if hasattr(x, "get_shape"):  # a slice of a safetensors file
        dtype = x[0:0].dtype
        return x, lambda first, last: x[first:last], dtype, True
    if not isinstance(x, Tensor | np.ndarray):
        try:
            x = np.asarray(x, dtype=np.float32)
        except (TypeError, ValueError):
            raise ShapeError(
                f"rows must be a tensor or array [n, d_in]; got {type(x).__name__}. Convert it with numpy.asarray."
            ) from None
    if x.ndim != 2:
        raise ShapeError(
            f"rows must be two-dimensional [n, d_in]; got shape {tuple(x.shape)}. Reshape or flatten them first."
        )
    if isinstance(x, Tensor):
        x = x.detach()
        if x.dtype.is_complex:
            raise InputError(f"rows must be real numbers; got {x.dtype}. Split them into real and imaginary columns.")
        return x, lambda first, last: x[first:last].cpu(), x.dtype, False
    if x.dtype.kind not in "fiub":
        raise InputError(
            f"rows must be real numbers; got an array of type {x.dtype}. Convert it with .astype('float32')."
        )
    # longdouble, big-endian and unsigned types have no torch twin; float32 is what batches hold anyway
    native = x.dtype in (np.dtype("float16"), np.dtype("float32"), np.dtype("float64"))
    target = x.dtype if native else np.dtype("float32")
    dtype = torch.from_numpy(np.empty(0, target)).dtype
    return (
        x,
        lambda first, last: torch.from_numpy(np.array(x[first:last], dtype=target)),
        dtype,
        isinstance(x, np.memmap),
    )


def _as_target(target: Any, n_rows: int) -> Tensor:
    """Return the rows that a transcoder must predict, checked."""
    x, read, *_ = _as_rows(target)
    if x.shape[0] != n_rows or not x.shape[1]:
        raise ShapeError(f"`target` must have one row per row, ({n_rows}, d_out); got {tuple(x.shape)}.")
    rows = read(0, n_rows)
    check_finite(rows.float(), 0, "the target")
    return rows


def _digest_target(target: Tensor) -> str:
    n_rows, d_out = target.shape
    return _digest_rows(
        lambda first, last: target[first:last], n_rows, d_out, d_out * target.element_size(), target.dtype
    )


def _as_column(name: str, column: Any, n_rows: int) -> Tensor | None:
    """Return a column of integers `[n_rows]`, or None."""
    if column is None:
        return None
    column = column.detach().cpu() if isinstance(column, Tensor) else torch.from_numpy(np.array(column))
    if tuple(column.shape) != (n_rows,):
        raise ShapeError(f"`{name}` must have one entry per row, shape ({n_rows},); got {tuple(column.shape)}.")
    if column.dtype.is_floating_point or column.dtype.is_complex or column.dtype == torch.bool:
        raise InputError(f"`{name}` must hold integers; got {column.dtype}.")
    return column


def _digest_rows(read: Callable[[int, int], Tensor], n_rows: int, d_in: int, row_bytes: int, dtype: torch.dtype) -> str:
    """SHA-256 over shape, type and values; very large arrays by 1,024 evenly spaced chunks, marked as such."""
    digest = hashlib.sha256(f"{n_rows} {d_in} {dtype} ".encode())
    whole = n_rows * row_bytes <= _DIGEST_BYTES
    step = _SCAN_ROWS if whole else CHUNK_ROWS
    starts = range(0, n_rows, step) if whole else [n_rows * i // 1024 for i in range(1024)]
    for first in starts:
        digest.update(read(first, min(first + step, n_rows)).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return ("sha256:" if whole else "sha256-sampled:") + digest.hexdigest()


def _open_npy(path: Path) -> np.ndarray:
    try:
        check_file(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python text and raises whatever that leads to
        raise FormatError(
            f"`{path}` must be a .npy array of numbers; it cannot be read: {error}. Save it again."
        ) from None


def _open_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        check_file(path)
        stream = safe_open(str(path), framework="pt")
    except (SafetensorError, FormatError) as error:
        raise FormatError(
            f"`{path}` must be a safetensors file; it cannot be read: {error}. Restore it from its source."
        ) from None
    names = list(stream.keys())
    columns = {name: stream.get_tensor(name) for name in ("token", "document", "position", "target") if name in names}
    matrices = [name for name in names if name not in columns and len(stream.get_slice(name).get_shape()) == 2]
    if "x" in matrices:
        matrices = ["x"]
    if len(matrices) != 1:
        raise FormatError(
            f"`{path}` must hold the rows as `x` [n, d_in]; it holds {listed(names)}.{nearest('x', names)}"
            if names
            else f"`{path}` must hold the rows as `x` [n, d_in]; it is empty."
        )
    return {"x": stream.get_slice(matrices[0]), **columns}
