"""Intervals from resampled documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit.measure.accumulators import Reconstruction
from saekit.measure.bootstrap import N_GROUPS, DocumentBootstrap, Estimate, basic_interval, bootstrap_mean, row_groups


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


@pytest.mark.parametrize(("documents", "between"), [(40, 1.0), (20, 3.0)])
def test_interval_of_fvu_covers_the_truth(documents, between):
    """Rows of variance 1 about a document's own mean of variance `between`; noise of variance 0.5.

    A resample has fewer different documents than there are, hence less variance: the percentile interval would
    cover the truth in less than half of the second case.
    """
    covered, trials = 0, 40
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        group = torch.arange(documents).repeat_interleave(20)
        x = between**0.5 * torch.randn(documents, 16, generator=generator)[group]
        x += torch.randn(len(group), 16, generator=generator)
        x_hat = x + 0.5**0.5 * torch.randn(len(group), 16, generator=generator)
        accumulator = Reconstruction(16)
        accumulator.update(x, x_hat, group)
        bootstrap = DocumentBootstrap.over(accumulator.moments.rows_per_group, draws=200, seed=trial)
        measured = accumulator.compute(bootstrap)["fvu"].measured("fraction")
        assert measured.low is not None
        assert measured.high is not None
        covered += measured.low <= 0.5 / (1 + between) <= measured.high
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


def test_basic_interval_mirrors_the_quantiles_at_the_value():
    assert basic_interval(50.0, np.arange(101.0), level=0.9) == pytest.approx((5.0, 95.0))
    assert basic_interval(40.0, np.arange(101.0), level=0.9) == pytest.approx((-15.0, 75.0))


def test_interval_is_cut_at_the_range_of_the_quantity():
    measured = Estimate(0.1, np.linspace(0.0, 1.0, 101)).measured("fraction", least=0, most=0.15)
    assert (measured.low, measured.high) == (0, 0.15)


def test_no_draws_means_no_interval():
    assert DocumentBootstrap.over(np.ones(5), draws=0).reason == "no interval asked for"
