"""Rows from a known dictionary."""

from __future__ import annotations

import pytest
import torch

from saekit.errors import ConfigError
from saekit.rows.synthetic import SyntheticRows


def test_rows_are_what_the_formula_says():
    rows = SyntheticRows(d_in=12, n_features=40, l0=4, noise=0, mean=3.0, n_rows=5000, seed=1)
    codes = rows.codes(1500, 2600)
    assert codes.shape == (1100, 40)
    assert (codes >= 0).all()
    torch.testing.assert_close(rows.rows(1500, 2600), codes @ rows.dictionary + rows.offset)
    torch.testing.assert_close(rows.dictionary.norm(dim=1), torch.ones(40))
    assert float(rows.offset.norm()) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])
def test_frequencies(power):
    rows = SyntheticRows(d_in=8, n_features=64, l0=6, power=power, n_rows=20_000)
    assert float(rows.frequencies.sum()) == pytest.approx(6, abs=1e-9)
    assert (rows.frequencies <= 1).all()
    assert (rows.frequencies.diff() <= 0).all()
    fired = (rows.codes(0, 20_000) > 0).double().mean(0)
    # five standard errors of a mean of 20,000 draws
    assert (
        (fired - rows.frequencies).abs() <= 5 * (rows.frequencies * (1 - rows.frequencies) / 20_000).sqrt() + 1e-9
    ).all()


def test_any_part_is_the_same_whatever_came_before():
    a, b = (SyntheticRows(d_in=4, n_features=8, l0=2, seed=5) for _ in range(2))
    whole = a.rows(0, 3000)
    assert torch.equal(b.rows(1024, 3000), whole[1024:])
    assert not torch.equal(SyntheticRows(d_in=4, n_features=8, l0=2, seed=6).rows(0, 3000), whole)
    assert a.info == b.info
    assert a == b


def test_documents_and_short_last_batch():
    batches = list(SyntheticRows(d_in=4, n_features=8, l0=2, n_rows=70, rows_per_document=32).batches(50))
    assert [b.n_rows for b in batches] == [50, 20]
    assert torch.cat([b.document for b in batches]).bincount().tolist() == [32, 32, 6]


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    next(SyntheticRows(d_in=4, n_features=8, l0=2).batches(10, seed=0))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_in": 0}, "d_in` must be a positive integer"),
        ({"n_rows": 0}, "n_rows` must be a positive integer, or None"),
        ({"l0": 9}, "l0` must lie above 0 and not above n_features=8"),
        ({"noise": -1}, "noise` must be 0 or more"),
        ({"noise": "much"}, "SyntheticRows: `noise` must be a number; got 'much'"),
        ({"n_rows": 10**30}, r"n_rows` must be a positive integer, or None for no end \(below 2\*\*63\)"),
        ({"d_in": 10**12}, "SyntheticRows: the memory needed must be at most .* a dictionary of 8 directions"),
        ({"n_features": 10**12, "l0": 2}, "a dictionary of 1,000,000,000,000 directions"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticRows(**{"d_in": 4, "n_features": 8, "l0": 2, **change})
