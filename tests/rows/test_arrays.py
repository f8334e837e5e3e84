"""Rows from arrays and array files: types, digests, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fixtures.row_checks import numbered, take
from saekit.errors import ConfigError, DataError, FormatError, ShapeError
from saekit.rows.arrays import ArrayRows
from saekit.rows.source import Source


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
