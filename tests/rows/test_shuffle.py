"""The stateless shuffle: every epoch is a permutation, and a place is two integers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.row_checks import numbered, small_blocks, sources, take
from saekit.rows.shuffle import read_batches


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 400),
    chunk=st.integers(1, 50),
    block=st.integers(1, 600),
    batch=st.integers(1, 500),
    seed=st.integers(0, 9),
)
def test_every_epoch_is_a_permutation_of_all_rows(n, chunk, block, batch, seed):
    source = small_blocks(numbered(n), chunk, block)
    stream = torch.cat([b.x[:, 0] for b in take(source, 2 * n, batch, seed)])
    first, second = stream[:n], stream[n : 2 * n]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(n))
    if n > 50:
        assert not torch.equal(first, second), "epochs must differ"
    stored = list(source.batches(batch))
    assert torch.cat([b.x[:, 0] for b in stored]).tolist() == list(range(n))
    assert all(b.n_rows == batch for b in stored[:-1])


def test_shuffled_batches_are_full_and_columns_stay_together():
    for batch in take(sources["array"](), 2500, 333, 1):
        row = batch.x[:, 0].long()
        assert batch.n_rows == 333
        assert torch.equal(batch.token, (row % 7).int())
        assert batch.token.dtype == torch.int32
        assert torch.equal(batch.document, row // 50)
        assert batch.document.dtype == torch.int64
        assert torch.equal(batch.position, (row % 50).int())
        assert batch.position.dtype == torch.int32


def test_seed_and_batch_size_mean_what_they_say():
    def stream(batch, seed):
        return torch.cat([b.x[:, 0] for b in take(numbered(500), 500, batch, seed)])[:500]

    assert torch.equal(stream(50, 0), stream(100, 0)), "cutting into batches must not change the order"
    assert not torch.equal(stream(50, 0), stream(50, 1))


def test_neighbours_come_from_different_documents():
    source = numbered(200_000, d=1, rows_per_document=50)
    batch = next(iter(source.batches(4096, seed=0)))
    same = (batch.document[1:] == batch.document[:-1]).float().mean()
    assert same < 0.01
    assert len(batch.document.unique()) > 500
    assert len((batch.document // 100).unique()) == 40, "a batch must draw on all parts of the data"


def test_empty_blocks_are_passed_over():
    columns = numbered(4)._columns(0, 4)
    empty = columns.map(lambda column: column[:0])
    blocks = [empty, columns, empty, columns, None]
    from saekit.rows.source import Block

    batches = list(read_batches(lambda number: blocks[number] and Block(blocks[number]), 3, (0, 0)))
    assert [b.n_rows for b in batches] == [3, 3, 2]
