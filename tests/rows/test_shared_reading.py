"""Stored rows on several ranks: together they read every batch once, and each of them little else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit.ranks import Ranks
from saekit.rows.arrays import ArrayRows
from saekit.rows.joined import join_rows
from saekit.rows.shards import ShardRows, ShardWriter
from saekit.rows.shared_reading import own_batches
from saekit.rows.shuffle import ShufflePlan
from saekit.rows.source import Columns

N, D, BATCH = 1000, 4, 48


def _stored(folder, x, model):
    writer = ShardWriter.open(folder, D, "float32", {"model": model}, shard_rows=300)
    row = torch.arange(N)
    writer.append(Columns(x, row.int(), row, row.int()), {})
    writer.finish({})
    return ShardRows(folder)


@pytest.fixture(params=["shards", "array", "joined"])
def rows(request, tmp_path):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    if request.param == "array":
        source = ArrayRows(x)
    else:
        names = ["a", "b"] if request.param == "joined" else ["a"]
        parts = {name: _stored(tmp_path / name, x + i, name) for i, name in enumerate(names)}
        source = parts["a"] if len(parts) == 1 else join_rows(parts)
    assert source.plan.n_rows == N
    object.__setattr__(source, "plan", ShufflePlan(N, 16, 112))  # several blocks
    return source


@pytest.mark.parametrize("size", [2, 3, 25])
@pytest.mark.parametrize("limit", [None, 500, 30])
def test_every_batch_is_read_by_one_rank(rows, size, limit):
    alone = list(own_batches(rows, BATCH, Ranks(), limit))
    found = [each for rank in range(size) for each in own_batches(rows, BATCH, Ranks(rank, size), limit)]
    assert [number for number, _ in found] == [number for number, _ in alone] == list(range(len(alone)))
    for (_, mine), (_, other) in zip(found, alone, strict=True):
        assert torch.equal(mine.x, other.x)
        assert mine.next == other.next


def test_a_rank_reads_little_more_than_its_part(rows, monkeypatch):
    if isinstance(rows, ArrayRows):
        pytest.skip("an array is in memory")
    read = []
    read_rows = ShardRows.read
    monkeypatch.setattr(ShardRows, "read", lambda self, ranges: read.append(ranges) or read_rows(self, ranges))
    for rank in range(5):
        read.clear()
        own = sum(len(batch) for _, batch in own_batches(rows, BATCH, Ranks(rank, 5)))
        times = len(getattr(rows, "sources", "1"))
        assert sum(last - first for ranges in read for first, last in ranges) <= times * (own + 3 * 112)
        assert own <= 5 * BATCH


def test_rows_that_are_computed_are_dealt_in_turn():
    class Computed:
        d_in, n_rows, info = D, N, {}

        def batches(self, batch_rows, *, seed=None, start=(0, 0)):
            return ArrayRows(np.arange(N * D, dtype=np.float32).reshape(N, D)).batches(batch_rows)

    found = [[number for number, _ in own_batches(Computed(), BATCH, Ranks(rank, 2))] for rank in range(2)]
    assert found == [list(range(0, 21, 2)), list(range(1, 21, 2))]
