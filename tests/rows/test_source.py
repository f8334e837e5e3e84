"""Laws of every source of rows, and what arrays refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saekit.errors import ConfigError, DataError, FormatError, ShapeError
from saekit.rows.arrays import ArrayRows
from saekit.rows.shuffle import ShufflePlan, read_batches
from saekit.rows.source import Source
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


def test_a_batch_owns_its_memory():
    x = torch.ones(10, 2)
    for seed in (None, 0):
        next(iter(ArrayRows(x).batches(4, seed=seed))).x.zero_()
        assert torch.equal(x, torch.ones(10, 2))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64", ">f4"])
def test_numpy_types(dtype):
    x = np.arange(12).reshape(6, 2).astype(dtype)
    (batch,) = ArrayRows(x).batches(6)
    assert batch.x.dtype == torch.float32
    assert batch.x.tolist() == x.tolist()


def test_bfloat16_tensor_and_lists():
    assert next(ArrayRows(torch.ones(3, 2, dtype=torch.bfloat16)).batches(3)).x.dtype == torch.float32
    assert ArrayRows([[1.0, 2.0]]).d_in == 2


def test_digest_depends_on_values_and_type_only():
    x = torch.arange(6.0).reshape(3, 2)
    assert ArrayRows(x).info["digest"] == ArrayRows(x.numpy()).info["digest"]
    assert ArrayRows(x).info["digest"] != ArrayRows(x.half()).info["digest"]
    assert ArrayRows(x).info["digest"] != ArrayRows(x + 1).info["digest"]


def test_npy_file(tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    rows = ArrayRows.from_file(tmp_path / "x.npy")
    assert isinstance(rows, Source)
    assert (rows.n_rows, rows.d_in) == (300, 5)
    assert np.array_equal(torch.cat([b.x for b in rows.batches(64)]).numpy(), x)
    assert sorted(take(rows, 300, 300, 0)[0].x[:, 0].tolist()) == sorted(x[:, 0].tolist())


def test_safetensors_file(tmp_path):
    x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    document = torch.arange(90) // 9
    save_file({"x": x, "document": document}, tmp_path / "x.safetensors")
    rows = ArrayRows.from_file(tmp_path / "x.safetensors")
    batches = list(rows.batches(40))
    assert torch.equal(torch.cat([b.x for b in batches]), x.float())
    assert torch.equal(torch.cat([b.document for b in batches]), document)
    assert batches[0].token is None
    save_file({"anything": x}, tmp_path / "y.safetensors")
    assert ArrayRows.from_file(tmp_path / "y.safetensors").n_rows == 90


def test_nan_is_refused_with_its_row(tmp_path):
    x = np.ones((70_000, 2), np.float32)
    x[66_001, 1] = np.nan
    with pytest.raises(DataError, match="row 66001 of the array has nan in column 1"):
        ArrayRows(x)
    x[66_001, 1] = -np.inf
    np.save(tmp_path / "x.npy", x)
    rows = ArrayRows.from_file(tmp_path / "x.npy")
    for seed in (None, 0):
        with pytest.raises(DataError, match=r"row 66001 of `x.npy` has -inf"):
            take(rows, 70_000, 4096, seed)


def test_large_finite_values_are_not_called_infinite():
    assert ArrayRows(torch.full((4, 3), 3e38)).n_rows == 4


def test_float64_beyond_float32_is_refused():
    with pytest.raises(DataError, match="row 0 of the array has inf"):
        ArrayRows(np.full((2, 2), 1e300))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ArrayRows(torch.ones(0, 4)), DataError, "at least one row"),
        (lambda: ArrayRows(torch.ones(4)), ShapeError, r"two-dimensional .* shape \(4,\)"),
        (lambda: ArrayRows("rows.npy"), ShapeError, "must be a tensor or array"),
        (lambda: ArrayRows(torch.ones(2, 2, dtype=torch.complex64)), DataError, "real numbers"),
        (lambda: ArrayRows(np.array([["a"]])), DataError, "real numbers"),
        (
            lambda: ArrayRows(torch.ones(3, 2), token=torch.ones(2).long()),
            ShapeError,
            r"`token` must have one entry per row",
        ),
        (lambda: ArrayRows(torch.ones(3, 2), document=torch.ones(3)), DataError, "`document` must hold integers"),
        (lambda: next(numbered(9).batches(0)), ConfigError, "`batch_rows` must be a positive integer"),
        (lambda: next(numbered(9).batches(3, seed=1.5)), ConfigError, "`seed` must be an integer"),
        (lambda: next(numbered(9).batches(3, start=(0, -1))), ConfigError, "`start` must be"),
        (lambda: next(numbered(9).batches(3, start=7)), ConfigError, "`start` must be"),
        (lambda: next(numbered(9).batches(3, start=(0, 10))), ConfigError, "block 0 has 9 rows"),
    ],
)
def test_bad_arrays_and_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        ArrayRows.from_file(tmp_path / "x.npy")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"come from .npy or .safetensors"):
        ArrayRows.from_file(tmp_path / "x.csv")
    np.save(tmp_path / "x.npy", np.ones((100, 4), np.float32))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-100])
    with pytest.raises(FormatError, match="cannot be read"):
        ArrayRows.from_file(tmp_path / "x.npy")
    save_file({"x": torch.ones(100, 4)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-100])
    with pytest.raises(FormatError, match="cannot be read"):
        ArrayRows.from_file(tmp_path / "x.safetensors")
    save_file({"a": torch.ones(3, 4), "b": torch.ones(3, 4)}, tmp_path / "two.safetensors")
    with pytest.raises(FormatError, match="must hold the rows as `x`"):
        ArrayRows.from_file(tmp_path / "two.safetensors")


def test_empty_blocks_are_passed_over():
    columns = numbered(4)._columns(0, 4)
    empty = columns.map(lambda column: column[:0])
    blocks = [empty, columns, empty, columns, None]
    from saekit.rows.source import Block

    batches = list(read_batches(lambda number: blocks[number] and Block(blocks[number]), 3, (0, 0)))
    assert [b.n_rows for b in batches] == [3, 3, 2]
