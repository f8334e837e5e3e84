"""The stateless shuffle: blocks and their order are computed from seed and epoch, so a position is two integers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..randomness import random_order
from .source import Batch, Block, Columns

CHUNK_ROWS = 64
"""Rows that are read together: the grain of the shuffle on disk. Unit: rows."""

BLOCK_ROWS = 131_072
"""Maximum number of rows that are shuffled together. Unit: rows."""

BLOCK_BYTES = 256 * 2**20
"""Memory that a block may take, in the type it is stored in; wide rows get shorter blocks. Unit: bytes."""

_SMALLEST_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class ShufflePlan:
    """How rows are grouped for reading: chunks of `chunk_rows`, and blocks of chunks, `block_rows` rows at most."""

    n_rows: int
    chunk_rows: int = CHUNK_ROWS
    block_rows: int = BLOCK_ROWS

    @staticmethod
    def for_rows(n_rows: int, row_bytes: int, chunk_rows: int = CHUNK_ROWS) -> ShufflePlan:
        """Return the plan for rows of `row_bytes` bytes: blocks within `BLOCK_ROWS` and `BLOCK_BYTES`."""
        fitting = BLOCK_BYTES // max(row_bytes, 1)
        return ShufflePlan(n_rows, chunk_rows, max(_SMALLEST_BLOCK_ROWS, min(BLOCK_ROWS, fitting)))

    @property
    def n_chunks(self) -> int:
        """Chunks of one pass; the last may be short."""
        return -(-self.n_rows // self.chunk_rows)

    @property
    def n_blocks(self) -> int:
        """Blocks of one pass; their sizes differ by at most one chunk, so that none is too small to mix."""
        return -(-self.n_chunks // max(self.block_rows // self.chunk_rows, 1))

    def place(self, row: int) -> tuple[int, int]:
        """Return where a row stands in stored order: its block, and its number in there."""
        block = bisect_right(range(self.n_blocks), row // self.chunk_rows, key=self._first_chunk) - 1
        return block, row - self._first_chunk(block) * self.chunk_rows

    def _first_chunk(self, block: int) -> int:
        return self.n_chunks * block // self.n_blocks

    def ranges(self, seed: int | None, block: int) -> list[tuple[int, int]] | None:
        """Return the row ranges of a block, in reading order; None (only without a seed): no such block."""
        epoch, index = divmod(block, self.n_blocks)
        if seed is None and epoch:
            return None
        first, last = self._first_chunk(index), self._first_chunk(index + 1)
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
    cancels: bool = True,
    waited: Callable[[Callable[[], Block | None]], Block | None] = lambda result: result(),
) -> Iterator[Batch]:
    """`read_batches`, while a thread makes the block after the one that is read. The batches are the same.

    Parameters
    ----------
    block_at, batch_rows, start
        As there; `block_at` runs on the thread.
    cancels
        Whether the block after the last that is read may be left out where its making has not begun: not where several
        processes make it together.
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
            if cancels:
                for future in coming.values():
                    future.cancel()


def _batch(parts: list[Columns], following: tuple[int, int]) -> Batch:
    rows = Columns.cat(parts)
    return Batch(
        rows.x.to(torch.float32),
        None if rows.token is None else rows.token.to(torch.int32),
        None if rows.document is None else rows.document.to(torch.int64),
        None if rows.position is None else rows.position.to(torch.int32),
        None if rows.target is None else rows.target.to(torch.float32),
        following,
    )


def planned_block(
    plan: ShufflePlan, seed: int | None, number: int, read: Callable[[list[tuple[int, int]]], Columns]
) -> Block | None:
    """Return the block with a given number of a plan, read through ``read([(first_row, last_row), ...])``."""
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
