"""Intervals from resampled documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit.measure import N_GROUPS, DocumentBootstrap, Reconstruction, bootstrap_mean, percentile_interval, row_groups


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """40 documents of correlated rows; the truth is known; 95 % intervals cover it 88 to 100 % of the time."""
    generator = np.random.default_rng(0)
    covered, trials = 0, 150
    for trial in range(trials):
        per_document = generator.normal(5.0, 1.0, size=40)
        n = generator.integers(5, 30, size=40).astype(float)
        sums = per_document * n + generator.normal(0, np.sqrt(n))
        bootstrap = DocumentBootstrap.over(n, draws=400, seed=trial)
        measured = bootstrap.ratio(sums, n).measured("")
        assert measured.low is not None
        assert measured.high is not None
        covered += measured.low <= 5.0 <= measured.high
    assert 0.88 <= covered / trials <= 1.0


def test_interval_of_fvu_covers_the_truth():
    """Rows of variance 1 per dimension about a document's own mean of variance 1; noise of variance 0.5: fvu 0.25."""
    covered, trials = 0, 40
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        group = torch.arange(50).repeat_interleave(8)
        x = torch.randn(50, 4, generator=generator)[group] + torch.randn(400, 4, generator=generator)
        x_hat = x + 0.5**0.5 * torch.randn(400, 4, generator=generator)
        accumulator = Reconstruction(4)
        accumulator.update(x, x_hat, group)
        measured = accumulator.compute()["fvu"].measured("fraction")
        assert measured.low is not None
        assert measured.high is not None
        covered += measured.low <= 0.25 <= measured.high
    assert covered / trials >= 0.85


def test_resampling_rows_would_be_too_narrow():
    """Documents that agree within themselves: the interval is that of documents, not of rows."""
    per_document = np.random.default_rng(1).normal(size=20)
    n = np.full(20, 100.0)
    by_document = DocumentBootstrap.over(n).ratio(per_document * n, n).measured("")
    by_row = bootstrap_mean(np.repeat(per_document, 100))
    assert by_document.high - by_document.low > 4 * (by_row.high - by_row.low)


def test_same_seed_same_interval_and_the_global_generators_stay():
    state = np.random.get_state()[1].copy()
    n = np.ones(30)
    values = np.arange(30.0)
    first = DocumentBootstrap.over(n, seed=4).ratio(values, n).measured("")
    assert first == DocumentBootstrap.over(n, seed=4).ratio(values, n).measured("")
    assert first != DocumentBootstrap.over(n, seed=5).ratio(values, n).measured("")
    assert (np.random.get_state()[1] == state).all()


def test_one_document_has_no_interval_and_the_reason_says_so():
    bootstrap = DocumentBootstrap.over(np.array([0.0, 7.0, 0.0]))
    measured = bootstrap.ratio(np.array([0.0, 3.0, 0.0]), np.array([0.0, 7.0, 0.0])).measured("fraction")
    assert measured.value == pytest.approx(3 / 7)
    assert measured.low is None
    assert measured.high is None
    assert "at least 2 documents" in measured.reason


def test_groups_without_rows_are_never_drawn():
    bootstrap = DocumentBootstrap.over(np.array([3.0, 0.0, 2.0, 0.0]), draws=50)
    assert (bootstrap.weights[:, [1, 3]] == 0).all()
    assert (bootstrap.weights.sum(1) == 2).all()


def test_a_difference_is_paired():
    n = np.ones(40)
    values = np.random.default_rng(0).normal(size=40)
    bootstrap = DocumentBootstrap.over(n)
    difference = bootstrap.ratio(values + 1, n).minus(bootstrap.ratio(values, n)).measured("")
    assert difference.low == pytest.approx(1)
    assert difference.high == pytest.approx(1)


def test_rows_go_to_the_group_of_their_document_else_of_their_place():
    document = torch.tensor([0, 0, 5, N_GROUPS + 5, -1])
    groups, by_document = row_groups(document, first_row=128, n_rows=5, block_rows=64)
    assert groups.tolist() == [0, 0, 5, 5, 2]
    assert not by_document
    groups, by_document = row_groups(document[:4], 0, 4)
    assert by_document


def test_groups_by_place_do_not_depend_on_batching():
    whole, by_document = row_groups(None, 0, 1000, 64)
    parts = [row_groups(None, start, min(77, 1000 - start), 64)[0] for start in range(0, 1000, 77)]
    assert torch.equal(whole, torch.cat(parts))
    assert not by_document


def test_percentile_interval_takes_the_middle():
    assert percentile_interval(np.arange(101.0), level=0.9) == pytest.approx((5.0, 95.0))


def test_no_draws_means_no_interval():
    assert DocumentBootstrap.over(np.ones(5), draws=0).reason == "no interval asked for"
