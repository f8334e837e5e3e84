"""Laws of rsa and linear CKA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from saekit.errors import ShapeError
from saekit.measure.similarity import linear_cka, rsa
from saekit.sae.codes import Codes


def rows(n=80, d=12, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_equal_rows_score_one():
    x = rows()
    assert rsa(x, x).value == pytest.approx(1)
    assert linear_cka(x, x).value == pytest.approx(1)


def test_rsa_is_the_spearman_correlation_of_the_two_tables():
    x, y = rows(), rows(d=5, seed=1)
    above = np.triu_indices(len(x), 1)
    expected = spearmanr(1 - np.corrcoef(x.numpy())[above], 1 - np.corrcoef(y.numpy())[above]).statistic
    assert rsa(x, y).value == pytest.approx(expected, abs=1e-6)


def test_rsa_ignores_scale_and_shift_of_each_row_and_cka_rotation_and_scale():
    x, y = rows(), rows(d=7, seed=1)
    assert rsa(3 * x + torch.arange(80.0)[:, None], y).value == pytest.approx(rsa(x, y).value, abs=1e-4)
    rotation = torch.linalg.qr(rows(7, 7, seed=2)).Q
    assert linear_cka(x, 5 * y @ rotation + 3).value == pytest.approx(linear_cka(x, y).value, abs=1e-5)


def test_unrelated_rows_of_any_width_score_near_zero():
    x, wide = rows(n=300, d=100), rows(n=300, d=400, seed=1)
    assert abs(linear_cka(x, wide).value) < 0.02
    assert abs(rsa(x, wide).value) < 0.05
    # The plain formula would be far from 0 here.
    a, b = (t - t.mean(0) for t in (x, wide))
    plain = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert plain > 0.3


def test_cka_approaches_the_plain_formula_with_many_rows():
    x = rows(n=2000, d=4)
    y = x @ rows(4, 6, seed=1) + 0.5 * rows(n=2000, d=6, seed=2)
    a, b = (t - t.mean(0) for t in (x, y))
    plain = float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))
    assert linear_cka(x, y).value == pytest.approx(plain, abs=2e-3)


def test_codes_stay_sparse_and_score_as_their_dense_table():
    z = rows(d=30, seed=3).relu() * (rows(d=30, seed=4) > 0.5)
    assert linear_cka(rows(), Codes.from_dense(z)).value == pytest.approx(linear_cka(rows(), z).value, rel=1e-9)


def test_intervals_come_from_a_jackknife_over_documents():
    x = rows(n=200)
    y = x + 0.5 * rows(n=200, seed=1)
    documents = np.arange(200) // 4
    for measure in (rsa, linear_cka):
        found = measure(x, y, documents)
        measured = found.measured("")
        assert measured.low < found.value < measured.high
        assert "jackknife over 20 parts" in found.reason
        assert measure(x, y, documents // 10).ends is None
        assert "at least 20 documents" in measure(x, y, documents // 10).reason
        assert "asked for" in measure(x, y).reason


def test_the_interval_covers_the_value_of_many_rows():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=generator)

    def sample(n):
        x = torch.randn(n, 8, generator=generator)
        return x, x @ mix + torch.randn(n, 8, generator=generator)

    truth = linear_cka(*sample(3000)).value
    found = [linear_cka(*sample(120), np.arange(120)).measured("", most=1.0) for _ in range(40)]
    assert sum(each.low <= truth <= each.high for each in found) >= 35


def test_rows_that_do_not_vary_are_undefined():
    flat = torch.ones(30, 4)
    assert math.isnan(rsa(flat, rows(30)).value)
    found = linear_cka(flat, rows(30))
    assert math.isnan(found.value)
    assert "does not vary" in found.reason
    assert math.isnan(linear_cka(rows(3), rows(3)).value)


@pytest.mark.parametrize("measure", [rsa, linear_cka])
def test_other_rows(measure):
    with pytest.raises(ShapeError, match="must be of the same rows; they have 4 and 5 rows"):
        measure(rows(4), rows(5))
