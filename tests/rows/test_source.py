"""Laws of every source of rows, and what arrays refuse."""

from __future__ import annotations

import pytest
import torch

from saekit.rows.arrays import ArrayRows
from saekit.rows.shuffle import ShufflePlan
from saekit.rows.synthetic import SyntheticRows


def numbered(n: int, d: int = 3, rows_per_document: int = 50) -> ArrayRows:
    """Rows whose first entry is the row number."""
    row = torch.arange(n)
    return ArrayRows(
        row[:, None].expand(n, d).float(),
        token=row % 7,
        document=row // rows_per_document,
        position=row % rows_per_document,
    )


def small_blocks(source: ArrayRows, chunk_rows: int, block_rows: int) -> ArrayRows:
    object.__setattr__(source, "plan", ShufflePlan(source.n_rows, chunk_rows, block_rows))
    return source


def take(source, rows: int, batch_rows: int, seed: int, start=(0, 0)):
    """The first `rows` rows of the shuffled stream, as batches."""
    batches = []
    for batch in source.batches(batch_rows, seed=seed, start=start):
        batches.append(batch)
        rows -= batch.n_rows
        if rows <= 0:
            return batches


sources = {
    "array": lambda: small_blocks(numbered(1000), 8, 200),
    "one block": lambda: numbered(777),
    "synthetic": lambda: SyntheticRows(d_in=4, n_features=8, l0=2, n_rows=20_000),
    "endless": lambda: SyntheticRows(d_in=4, n_features=8, l0=2, n_rows=None),
}


@pytest.mark.parametrize("name", sources)
@pytest.mark.parametrize("seed", [0, 3])
def test_start_continues_exactly(name, seed):
    batches = take(sources[name](), 2200, 130, seed)
    for cut in (0, 3, len(batches) - 2):
        again = take(sources[name](), 130, 130, seed, batches[cut].next)[0]
        for column in ("x", "token", "document", "position"):
            before, after = getattr(batches[cut + 1], column), getattr(again, column)
            assert (before is None and after is None) or torch.equal(before, after)
        assert again.next == batches[cut + 1].next


@pytest.mark.parametrize("name", ["array", "one block"])
def test_start_continues_in_stored_order(name):
    batches = list(sources[name]().batches(130))
    rest = list(sources[name]().batches(130, start=batches[2].next))
    assert torch.equal(torch.cat([b.x for b in batches[3:]]), torch.cat([b.x for b in rest]))
    assert not list(sources[name]().batches(130, start=batches[-1].next))


def test_a_batch_owns_its_memory():
    x = torch.ones(10, 2)
    for seed in (None, 0):
        next(iter(ArrayRows(x).batches(4, seed=seed))).x.zero_()
        assert torch.equal(x, torch.ones(10, 2))
