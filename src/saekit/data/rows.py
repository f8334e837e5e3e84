"""Rows: what every consumer reads.

One row is one activation vector, with the token, document and position it came from.

A source is anything with ``d_in``, ``n_rows``, ``info`` and ``batches``. The order of rows is *computed*, never
remembered: rows lie in chunks of neighbours; each epoch permutes the chunks, groups them into blocks, and permutes
the rows inside a block. All permutations are functions of (seed, epoch, block), so a place in the stream is two
integers, and starting there gives bitwise what reading up to there would have given.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, FormatError, ShapeError, did_you_mean, listed

CHUNK_ROWS = 64
"""Rows that are read together: the grain of the shuffle on disk. Unit: rows."""

BLOCK_ROWS = 131_072
"""Rows that are shuffled together, at most. Unit: rows."""

BLOCK_BYTES = 256 * 2**20
"""Memory that a block may take, in the type it is stored in; wide rows get shorter blocks. Unit: bytes."""

_SMALLEST_BLOCK_ROWS = 4096
_DIGEST_BYTES = 2**30  # beyond this, a digest is made from evenly spaced chunks and says so
_SCAN_ROWS = 65_536


@dataclass(frozen=True)
class Batch:
    """Some rows, and where they came from.

    Attributes
    ----------
    x
        Activations ``[n, d_in]``, float32. The batch owns this memory: changing it changes no source.
    token
        Token ids ``[n]``, int32; None when the rows are not tokens.
    document
        Document numbers ``[n]``, int64; -1 where unknown, None when no row has one.
    position
        Position of the token in its document ``[n]``, int32, counted from 0; None when unknown.
    next
        ``(block, row)`` of the first row after this batch: pass it as `start` to continue exactly here.
    """

    x: Tensor
    token: Tensor | None
    document: Tensor | None
    position: Tensor | None
    next: tuple[int, int]

    @property
    def n_rows(self) -> int:
        """Number of rows. Unit: rows."""
        return self.x.shape[0]


@runtime_checkable
class Source(Protocol):
    """What training and evaluation read rows from.

    Attributes
    ----------
    d_in
        Width of a row.
    n_rows
        Rows of one pass; None when that is only known after reading.
    info
        What the rows are, as plain JSON: kind, model, hook, layer, data, digest, dtype, filters, ...
    """

    @property
    def d_in(self) -> int:
        """Width of a row."""
        ...

    @property
    def n_rows(self) -> int | None:
        """Rows of one pass, if known."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """What the rows are."""
        ...

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Rows in batches.

        ``seed=None``: one pass in stored order; the last batch may be short. With a seed: epochs without end in an
        order computed from (seed, epoch, block); every batch is full, blocks count on over epochs. The same
        ``(seed, start)`` gives bitwise the same batches, whatever was read before.
        """
        ...


@dataclass(frozen=True)
class Columns:
    """Rows as they are stored: `x` ``[n, d]`` in any float type, beside optional columns ``[n]``."""

    x: Tensor
    token: Tensor | None = None
    document: Tensor | None = None
    position: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Columns:
        """The same function on every column that is there."""
        return Columns(
            function(self.x),
            None if self.token is None else function(self.token),
            None if self.document is None else function(self.document),
            None if self.position is None else function(self.position),
        )

    @staticmethod
    def cat(parts: list[Columns]) -> Columns:
        """Parts one after another; they must have the same columns."""
        if len(parts) == 1:
            return parts[0]

        def join(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        return Columns(torch.cat([part.x for part in parts]), join("token"), join("document"), join("position"))


@dataclass(frozen=True)
class Block:
    """Rows that are shuffled together: `columns`, read in the order `order` (None: as they lie)."""

    columns: Columns
    order: Tensor | None = None

    def __len__(self) -> int:
        return len(self.columns)

    def part(self, first: int, last: int) -> Columns:
        """Rows `first` to `last` of the block, in reading order, in new memory."""
        if self.order is None:
            return self.columns.map(lambda column: column[first:last].clone())
        index = self.order[first:last]
        return self.columns.map(lambda column: column.index_select(0, index))  # 5 times faster than column[index]


def random_order(n: int, *key: int | str) -> np.ndarray:
    """A permutation of ``range(n)`` that is a function of `key` alone: the stable argsort of Philox words.

    Parameters
    ----------
    n
        Length, at least 0.
    key
        Integers and words, hashed together, so that neighbouring seeds are unrelated.

    Returns
    -------
    numpy.ndarray
        int64 ``[n]``; the same on every machine and in every numpy release: Philox fixes its raw words.
    """
    return np.argsort(np.random.Philox(key=hashed_key(*key)).random_raw(n), kind="stable")


def hashed_key(*key: int | str, n_bytes: int = 16) -> int:
    """An integer of `n_bytes` bytes from the SHA-256 of `key`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in ("saekit.rows", *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:n_bytes], "little")


@dataclass(frozen=True)
class Plan:
    """How rows are grouped for reading: chunks of `chunk_rows`, and blocks of chunks, `block_rows` rows at most."""

    n_rows: int
    chunk_rows: int = CHUNK_ROWS
    block_rows: int = BLOCK_ROWS

    @staticmethod
    def for_rows(n_rows: int, row_bytes: int, chunk_rows: int = CHUNK_ROWS) -> Plan:
        """The plan for rows of `row_bytes` bytes: blocks within `BLOCK_ROWS` and `BLOCK_BYTES`."""
        fitting = BLOCK_BYTES // max(row_bytes, 1)
        return Plan(n_rows, chunk_rows, max(_SMALLEST_BLOCK_ROWS, min(BLOCK_ROWS, fitting)))

    @property
    def n_chunks(self) -> int:
        """Chunks of one pass; the last may be short."""
        return -(-self.n_rows // self.chunk_rows)

    @property
    def n_blocks(self) -> int:
        """Blocks of one pass; their sizes differ by at most one chunk, so that none is too small to mix."""
        return -(-self.n_chunks // max(self.block_rows // self.chunk_rows, 1))

    def ranges(self, seed: int | None, block: int) -> list[tuple[int, int]] | None:
        """Row ranges of a block, in reading order; None when there is no such block (only without a seed)."""
        epoch, index = divmod(block, self.n_blocks)
        if seed is None and epoch:
            return None
        first, last = (self.n_chunks * i // self.n_blocks for i in (index, index + 1))
        if seed is None:
            return [(first * self.chunk_rows, min(last * self.chunk_rows, self.n_rows))]
        chunks = random_order(self.n_chunks, "chunks", seed, epoch)[first:last]
        return [
            (int(chunk) * self.chunk_rows, min((int(chunk) + 1) * self.chunk_rows, self.n_rows)) for chunk in chunks
        ]


def read_batches(block_at: Callable[[int], Block | None], batch_rows: int, start: tuple[int, int]) -> Iterator[Batch]:
    """Cut blocks into batches, from `start` on; batches run across blocks.

    Parameters
    ----------
    block_at
        The block with a given number, or None after the last.
    batch_rows
        Rows of a batch; only the last batch before the end may be shorter.
    start
        ``(block, row)`` to begin at.

    Raises
    ------
    ConfigError
        `start` lies after the end of its block.
    """
    number, row = start
    parts: list[Columns] = []
    missing = batch_rows
    while (block := block_at(number)) is not None:
        if row > len(block):
            raise ConfigError(
                f"`start` must be a place that `Batch.next` gave; block {number} has {len(block)} rows, so "
                f"({number}, {row}) is not in it. Was it saved with other data or settings?"
            )
        while row < len(block):
            taken = min(missing, len(block) - row)
            parts.append(block.part(row, row + taken))
            row += taken
            missing -= taken
            if missing == 0:
                yield _batch(parts, (number, row) if row < len(block) else (number + 1, 0))
                parts, missing = [], batch_rows
        number, row = number + 1, 0
    if parts:
        yield _batch(parts, (number, 0))


def read_ahead(
    block_at: Callable[[int], Block | None],
    batch_rows: int,
    start: tuple[int, int],
    *,
    waited: Callable[[Callable[[], Block | None]], Block | None] = lambda result: result(),
) -> Iterator[Batch]:
    """`read_batches`, while a thread makes the block after the one that is read. The batches are the same.

    Parameters
    ----------
    block_at, batch_rows, start
        As there; `block_at` runs on the thread.
    waited
        Gets a function that waits for a block, and returns what that returns.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="saekit-rows") as pool:
        coming: dict[int, Future[Block | None]] = {}

        def next_block(number: int) -> Block | None:
            future = coming.pop(number, None) or pool.submit(block_at, number)
            block = waited(future.result)
            if block is not None:
                coming[number + 1] = pool.submit(block_at, number + 1)
            return block

        try:
            yield from read_batches(next_block, batch_rows, start)
        finally:
            for future in coming.values():
                future.cancel()


def _batch(parts: list[Columns], following: tuple[int, int]) -> Batch:
    rows = Columns.cat(parts)
    return Batch(
        rows.x.to(torch.float32),
        None if rows.token is None else rows.token.to(torch.int32),
        None if rows.document is None else rows.document.to(torch.int64),
        None if rows.position is None else rows.position.to(torch.int32),
        following,
    )


def check_reading(batch_rows: int, seed: int | None, start: tuple[int, int]) -> tuple[int, int]:
    """Refuse settings of ``batches`` that cannot work; returns `start` as a tuple.

    Raises
    ------
    ConfigError
        `batch_rows` is not a positive integer, `seed` not an integer or None, `start` not two integers from 0 on.
    """
    if isinstance(batch_rows, bool) or not isinstance(batch_rows, int | np.integer) or batch_rows < 1:
        raise ConfigError(f"`batch_rows` must be a positive integer; got {batch_rows!r}. The usual value is 4096.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer)):
        raise ConfigError(f"`seed` must be an integer, or None for the stored order; got {seed!r}.")
    try:
        number, row = start
        valid = int(number) == number >= 0 and int(row) == row >= 0
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ConfigError(f"`start` must be (block, row), two integers from 0 on; got {start!r}. Use `Batch.next`.")
    return int(number), int(row)


def check_finite(x: Tensor, first_row: int | Callable[[int], int], where: str) -> None:
    """Refuse NaN and infinity, naming the row.

    Parameters
    ----------
    x
        Rows ``[n, d]``.
    first_row
        Number of row 0 of `x`, or a function from the place in `x` to the row number.
    where
        What the rows are called in the message.

    Raises
    ------
    DataError
        A value is NaN or infinite.
    """
    # A finite sum proves that every entry is finite; only a suspicious one pays for the exact look.
    if bool(torch.isfinite(x.sum(dtype=torch.float64))):
        return
    bad = (~torch.isfinite(x)).any(dim=1).nonzero().flatten()
    if len(bad):
        place = int(bad[0])
        row = first_row(place) if callable(first_row) else first_row + place
        column = int((~torch.isfinite(x[place])).nonzero()[0])
        more = f"; {len(bad)} rows of this part are affected" if len(bad) > 1 else ""
        raise DataError(
            f"rows must be finite; row {row} of {where} has {float(x[place, column])} in column {column}{more}. "
            "Remove such rows, or find out where they come from (half precision overflows at 65504)."
        )


@dataclass(frozen=True, init=False, eq=False)
class ArrayRows:
    """Rows that are already there: a tensor, a numpy array or a memory map.

    Parameters
    ----------
    x
        Rows ``[n, d_in]``, any real number type; batches hold them as float32. Never copied as a whole nor changed.
    token, document, position
        Optional columns ``[n]`` of integers.
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

    x: Any = field(repr=False)
    token: Tensor | None = field(repr=False)
    document: Tensor | None = field(repr=False)
    position: Tensor | None = field(repr=False)
    info: dict[str, Any]
    plan: Plan = field(repr=False)
    _read: Callable[[int, int], Tensor] = field(repr=False)
    _checked: bool = field(repr=False)

    def __init__(
        self,
        x: Any,
        token: Any = None,
        document: Any = None,
        position: Any = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        x, read, dtype, lazy = _as_rows(x)
        n_rows, d_in = x.shape if hasattr(x, "shape") else x.get_shape()
        if not n_rows or not d_in:
            raise DataError(
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
        object.__setattr__(self, "_read", read)
        object.__setattr__(self, "plan", Plan.for_rows(n_rows, row_bytes))
        if not lazy:
            for first in range(0, n_rows, _SCAN_ROWS):
                check_finite(read(first, min(first + _SCAN_ROWS, n_rows)).float(), first, self._name(info))
        object.__setattr__(self, "_checked", not lazy)
        object.__setattr__(
            self,
            "info",
            {
                "kind": "array",
                **info,
                "n_rows": n_rows,
                "d_in": d_in,
                "dtype": str(dtype).removeprefix("torch."),
                "digest": info.get("digest") or _digest_rows(read, n_rows, d_in, row_bytes, dtype),
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
        """Rows in batches; see `Source.batches`."""
        start = check_reading(batch_rows, seed, start)
        return read_batches(lambda number: self._block(seed, number), batch_rows, start)

    def _block(self, seed: int | None, number: int) -> Block | None:
        def read(ranges: list[tuple[int, int]]) -> Columns:
            return Columns.cat([self._columns(first, last) for first, last in ranges])

        return planned_block(self.plan, seed, number, read)

    def _columns(self, first: int, last: int) -> Columns:
        x = self._read(first, last)
        if not self._checked:
            check_finite(x.float(), first, self._name(self.info))

        def cut(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[first:last]

        return Columns(x, cut(self.token), cut(self.document), cut(self.position))

    @staticmethod
    def _name(info: Mapping[str, Any]) -> str:
        return f"`{info['path']}`" if "path" in info else "the array"

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> ArrayRows:
        """Rows from a ``.npy`` or ``.safetensors`` file, memory-mapped.

        A safetensors file holds ``x`` (or exactly one two-dimensional tensor of any name) and optionally ``token``,
        ``document`` and ``position``.

        Raises
        ------
        FormatError
            The file is truncated or holds no rows.
        DataError
            There is no such file, or it has another ending.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"`{path}` must be a file of rows; there is no such file. Check the path.")
        info = {"kind": "array", "path": path.name}
        if path.suffix == ".npy":
            return ArrayRows(_open_npy(path), info=info)
        if path.suffix == ".safetensors":
            return ArrayRows(info=info, **_open_safetensors(path))
        raise DataError(
            f"rows come from .npy or .safetensors files; got `{path.name}`. Save the array as one of these."
        )


def planned_block(
    plan: Plan, seed: int | None, number: int, read: Callable[[list[tuple[int, int]]], Columns]
) -> Block | None:
    """The block with a given number of a plan, read through ``read([(first_row, last_row), ...])``."""
    ranges = plan.ranges(seed, number)
    if ranges is None:
        return None
    if seed is None:
        return Block(read(ranges))
    # Chunks are read in the order in which they lie (a sequential pass over the file); rows are shuffled afterwards.
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and joined[-1][1] == first:
            first, _ = joined.pop()
        joined.append((first, last))
    columns = read(joined)
    return Block(columns, torch.from_numpy(random_order(len(columns), "rows", seed, number)))


def _as_rows(x: Any) -> tuple[Any, Callable[[int, int], Tensor], torch.dtype, bool]:
    """The array, a reader of row ranges, its type, and whether reading is lazy (from disk)."""
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
            raise DataError(f"rows must be real numbers; got {x.dtype}. Split them into real and imaginary columns.")
        return x, lambda first, last: x[first:last].cpu(), x.dtype, False
    if x.dtype.kind not in "fiub":
        raise DataError(
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


def _as_column(name: str, column: Any, n_rows: int) -> Tensor | None:
    """A column of integers `[n_rows]`, or None."""
    if column is None:
        return None
    column = column.detach().cpu() if isinstance(column, Tensor) else torch.from_numpy(np.array(column))
    if tuple(column.shape) != (n_rows,):
        raise ShapeError(f"`{name}` must have one entry per row, shape ({n_rows},); got {tuple(column.shape)}.")
    if column.dtype.is_floating_point or column.dtype.is_complex or column.dtype == torch.bool:
        raise DataError(f"`{name}` must hold integers; got {column.dtype}.")
    return column


def _digest_rows(read: Callable[[int, int], Tensor], n_rows: int, d_in: int, row_bytes: int, dtype: torch.dtype) -> str:
    """SHA-256 over shape, type and values; very large arrays by 1,024 evenly spaced chunks, and then it says so."""
    digest = hashlib.sha256(f"{n_rows} {d_in} {dtype} ".encode())
    whole = n_rows * row_bytes <= _DIGEST_BYTES
    step = _SCAN_ROWS if whole else CHUNK_ROWS
    starts = range(0, n_rows, step) if whole else [n_rows * i // 1024 for i in range(1024)]
    for first in starts:
        digest.update(read(first, min(first + step, n_rows)).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return ("sha256:" if whole else "sha256-sampled:") + digest.hexdigest()


def _open_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FormatError(
            f"`{path}` must be a .npy array of numbers; it cannot be read: {error}. Save it again."
        ) from None


def _open_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        stream = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise FormatError(
            f"`{path}` must be a safetensors file; it cannot be read: {error}. Restore it from its source."
        ) from None
    names = list(stream.keys())
    columns = {name: stream.get_tensor(name) for name in ("token", "document", "position") if name in names}
    matrices = [name for name in names if name not in columns and len(stream.get_slice(name).get_shape()) == 2]
    if "x" in matrices:
        matrices = ["x"]
    if len(matrices) != 1:
        raise FormatError(
            f"`{path}` must hold the rows as `x` [n, d_in]; it holds {listed(names)}. {did_you_mean('x', names)}"
            if names
            else f"`{path}` must hold the rows as `x` [n, d_in]; it is empty."
        )
    return {"x": stream.get_slice(matrices[0]), **columns}
