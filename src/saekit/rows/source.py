"""Rows: what every consumer reads.

One row is one activation vector, with the token, document and position it came from.

A source is anything with ``d_in``, ``n_rows``, ``info`` and ``batches``. The order of rows is *computed*, never
remembered: rows lie in chunks of neighbours; each epoch permutes the chunks, groups them into blocks, and permutes
the rows inside a block. All permutations are functions of (seed, epoch, block), so a place in the stream is two
integers, and starting there gives bitwise what reading up to there would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels import with_one_torch_thread
from ..memory import check_memory
from ..settings import brief
from ..terminal import plain

_SCAN_ROWS = 65_536
SMALL = 2**20
"""Most numbers of a batch that are gathered on one thread: about 1 ms of it."""


@dataclass(frozen=True)
class Columns:
    """Some rows, and where each came from."""

    x: Tensor
    """Activations ``[n, d_in]``, in any float type."""
    token: Tensor | None = None
    """Token ids ``[n]``; None when the rows are not tokens."""
    document: Tensor | None = None
    """Document numbers ``[n]``; -1 where unknown, None when no row has one."""
    position: Tensor | None = None
    """Position of the token in its document ``[n]``, counted from 0; None when unknown."""
    target: Tensor | None = None
    """What a transcoder must predict from the row ``[n, d_out]``; None where only rows were taken."""

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def matrices(self) -> list[Tensor]:
        """The rows, and their targets where there are any."""
        return [self.x] if self.target is None else [self.x, self.target]

    def map(self, function: Callable[[Tensor], Tensor]) -> Columns:
        """Apply the same function to every column that is there."""
        return Columns(
            function(self.x),
            None if self.token is None else function(self.token),
            None if self.document is None else function(self.document),
            None if self.position is None else function(self.position),
            None if self.target is None else function(self.target),
        )

    @staticmethod
    def cat(parts: list[Columns]) -> Columns:
        """Join parts one after another; they must have the same columns."""
        if len(parts) == 1:
            return parts[0]

        def join(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        x = torch.cat([part.x for part in parts])
        return Columns(x, join("token"), join("document"), join("position"), join("target"))


@dataclass(frozen=True)
class Batch(Columns):
    """Rows as they are read: `x` and `target` are float32, ids are int32, int64 and int32.

    The batch owns its memory: changing it changes no source.
    """

    __repr__ = brief

    next: tuple[int, int] = (0, 0)
    """``(block, row)`` of the first row after this batch: pass it as `start` to continue exactly here."""

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
        """Yield rows in batches.

        ``seed=None``: one pass in stored order; the last batch may be short. With a seed: epochs without end in an
        order computed from (seed, epoch, block); every batch is full, blocks count on over epochs. The same
        ``(seed, start)`` gives bitwise the same batches, whatever was read before.
        """
        ...


@runtime_checkable
class Stored(Source, Protocol):
    """A source whose rows lie somewhere in an order, so that any of them can be read."""

    def read(self, ranges: list[tuple[int, int]]) -> Columns:
        """Return the rows of ranges ``[(first, last), ...]``, one after the other; they may be a view."""
        ...


@dataclass(frozen=True)
class Block:
    """Rows that are shuffled together: `columns`, read in the order `order` (None: as they lie)."""

    columns: Columns
    order: Tensor | None = None

    def __len__(self) -> int:
        return len(self.columns)

    def part(self, first: int, last: int) -> Columns:
        """Return the rows `first` to `last` of the block, in reading order, in new memory."""
        if self.order is None:
            return self.columns.map(lambda column: column[first:last].clone())
        index = self.order[first:last]

        def gathered() -> Columns:
            return self.columns.map(lambda column: column.index_select(0, index))  # 5 times faster than column[index]

        numbers = len(index) * self.columns.x.shape[1]
        small = self.columns.x.device.type == "cpu" and numbers <= SMALL
        return with_one_torch_thread(gathered, numbers) if small else gathered()


def check_reading(source: Source, batch_rows: int, seed: int | None, start: tuple[int, int]) -> tuple[int, int]:
    """Refuse settings of ``batches`` that cannot work; returns `start` as a tuple.

    Raises
    ------
    ConfigError
        `batch_rows` is not a positive integer, or more rows than fit into memory; `seed` is not an integer or None;
        `start` is not two integers from 0 on.
    """
    if isinstance(batch_rows, bool) or not isinstance(batch_rows, int | np.integer) or batch_rows < 1:
        raise ConfigError(f"`batch_rows` must be a positive integer; got {batch_rows!r}. The usual value is 4096.")
    rows = batch_rows if source.n_rows is None else min(batch_rows, source.n_rows)
    check_memory("batches", {f"{rows:,} rows of width {source.d_in:,}": 4 * rows * source.d_in}, "Use fewer rows.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer)):
        raise ConfigError(f"`seed` must be an integer, or None for the stored order; got {seed!r}.")
    position = _position(start)
    if position is None:
        raise ConfigError(f"`start` must be (block, row), two integers from 0 on; got {start!r}. Use `Batch.next`.")
    return position


def _position(start: Any) -> tuple[int, int] | None:
    """Return where a reading starts as two integers, (block, row); None where it is anything else."""
    try:
        number, row = start
        valid = int(number) == number >= 0 and int(row) == row >= 0
    except (TypeError, ValueError):
        return None
    return (int(number), int(row)) if valid else None


def rows_in_words(source: Source) -> str:
    """Return a source of rows as text: how many, how wide, where from. For ``__repr__ = rows_in_words``.

    Examples
    --------
    ::

        ArrayRows(600 rows of width 192, layers.2 of builtin)
    """
    info, n_rows = source.info, source.n_rows
    facts = [f"rows of width {source.d_in}" if n_rows is None else f"{n_rows:,} rows of width {source.d_in}"]
    if info.get("model") is not None:
        facts.append(f"{info.get('hook')} of {info['model']}")
    elif isinstance(info.get("path"), str):
        facts.append(info["path"])
    return plain(f"{type(source).__name__}({', '.join(facts)})")
