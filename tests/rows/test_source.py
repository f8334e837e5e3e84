"""Laws of every source of rows, and what arrays refuse."""

from __future__ import annotations

import pytest
import torch

from fixtures.row_checks import sources, take
from saekit import SyntheticRows
from saekit.errors import ConfigError
from saekit.rows.arrays import ArrayRows
from saekit.rows.source import Block, Columns


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


def test_a_batch_that_fits_no_memory_is_refused():
    endless = SyntheticRows(d_in=4, n_features=8, l0=2, n_rows=None)
    with pytest.raises(ConfigError, match=r"batches: the memory needed .* 16 TB for 1,000,000,000,000 rows of width 4"):
        endless.batches(10**12, seed=0)
    assert next(ArrayRows(torch.ones(10, 2)).batches(10**12)).n_rows == 10  # as large as there are rows


def test_small_batches_are_gathered_where_torch_has_one_thread(monkeypatch):
    monkeypatch.setattr("saekit.rows.source.SMALL", 40)
    monkeypatch.setattr("saekit.kernels.cpu.threads.GRAIN", 40)
    block, before = Block(Columns(torch.arange(80.0).view(20, 4)), torch.arange(19, -1, -1)), torch.get_num_threads()
    seen, right = [], Columns.map
    monkeypatch.setattr(Columns, "map", lambda *given: (seen.append(torch.get_num_threads()), right(*given))[1])
    torch.set_num_threads(2)
    try:
        assert torch.equal(block.part(0, 10).x, block.columns.x[block.order[:10]])
        block.part(0, 9)
        block.part(0, 11)
        assert seen == [1, 2, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
