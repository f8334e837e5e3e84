"""Intervals that leave out documents: they hold the truth with few documents of unequal length, or are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from saekit.measure.accumulators import Reconstruction, Sparsity
from saekit.measure.intervals import (
    LEAST_DOCUMENTS,
    N_GROUPS,
    Estimate,
    Sample,
    Spread,
    degrees_of_freedom,
    document_sample,
    effective_number,
    interval,
    mean_estimate,
    measured_mean,
    no_intervals,
    row_groups,
    student,
)
from saekit.measure.results import Measured
from saekit.sae.codes import Codes


@pytest.fixture(scope="module")
def coverage(load_benchmark):
    return load_benchmark("interval_coverage")


def test_intervals_hold_the_truth_as_often_as_they_say(coverage):
    """Ten and twenty groups of lognormal and Pareto sizes: no fewer hits than 93 % would give, once in 1,000 times."""
    hits = tried = 0
    for quantity in coverage.QUANTITIES:
        mine = trials = 0
        for sizes in ("lognormal", "pareto"):
            for n_groups in (10, 20):
                found = coverage.simulate(quantity, sizes, n_groups, trials=40, seed=1)
                mine, trials = mine + found.hits, trials + found.tried
        assert trials >= 120
        assert binom.cdf(mine, trials, 0.93) > 1e-4, quantity
        hits, tried = hits + mine, tried + trials
    assert binom.cdf(hits, tried, 0.93) > 1e-3


@pytest.mark.parametrize(
    ("mixture", "n"),
    [("stories", 20), ("one in five an article", 20), ("one in ten an article", LEAST_DOCUMENTS)],
)
def test_intervals_hold_the_truth_on_rows_of_stories_and_articles(real_coverage, mixture, n):
    """Also where few documents, which are long, have other values: no fewer hits than 93 % would give."""
    coverage, population = real_coverage
    cells = coverage.simulate(population, mixture, n, trials=60, seed=1)
    for cell in cells:
        assert cell.tried >= 50
        assert binom.cdf(cell.hits, cell.tried, 0.93) > 1e-3, cell.metric
    hits, tried = (sum(getattr(cell, name) for cell in cells) for name in ("hits", "tried"))
    # the metrics of one draw go together, so as if there were 60 independent ones
    assert binom.cdf(round(60 * hits / tried), 60, 0.93) > 1e-3


@pytest.fixture(scope="module")
def real_coverage(load_benchmark, shared_data):
    coverage = load_benchmark("real_coverage")
    return coverage, coverage.read_population(40, 30, kept=0.05)


def test_an_interval_of_a_fraction_holds_the_end_of_its_range_that_it_could_reach():
    """On the logit scale alone 1 of 500 latents, give or take 1, would exclude that there is none."""
    low, high = interval(0.002, Spread(0.002, 19.0), least=0.0, most=1.0)
    assert (low, high > 0.006) == (0.0, True)
    low, high = interval(0.98, Spread(0.02, 19.0), least=0.0, most=1.0)
    assert (low < 0.94, high) == (True, 1.0)
    low, high = interval(0.5, Spread(0.02, 19.0), least=0.0, most=1.0)
    assert 0.4 < low < high < 0.6


def test_few_documents_have_no_interval_for_they_may_lack_a_kind_of_text():
    """Runs of rows, groups and values are not documents; and one document is not told that three would do."""
    for n in (3, LEAST_DOCUMENTS - 1, LEAST_DOCUMENTS):
        found = document_sample(np.ones(n)).ratio(np.arange(n), np.ones(n)).measured("")
        assert (found.low is None) == (n < LEAST_DOCUMENTS)
        if found.low is None:
            assert f"at least {LEAST_DOCUMENTS} documents; there are {n}" in found.reason
            assert f"missing from {0.9**n:.0%}" in found.reason
    runs = document_sample(np.ones(5), is_known=False).ratio(np.arange(5), np.ones(5)).measured("")
    assert runs.low is not None
    assert "runs of 64 consecutive rows" in runs.reason
    assert f"at least {LEAST_DOCUMENTS} documents; there is 1," in document_sample([1.0]).reason
    assert document_sample(np.ones(5), intervals=False).reason == "no interval asked for"


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (document_sample(np.ones(25)), "no intervals: 25 documents, 40 are needed"),
        (document_sample(np.ones(1)), "no intervals: 1 document, 40 are needed"),
        (document_sample(np.ones(50), intervals=False), "no intervals asked for"),
        (Sample.over([1, 1], reason="x"), "no intervals: 2 documents, 3 are needed"),
        (Sample.over([100, 1, 1]), "no intervals: it needs at least 3 documents of similar size"),
        (document_sample(np.ones(40)), ""),
    ],
)
def test_the_reason_for_no_intervals_is_said_in_one_clause(sample, said):
    rows = np.arange(len(sample.sizes), dtype=float)
    value = sample.ratio(rows, np.ones(len(rows))).measured("")
    latents = Measured(0.5, 0.4, 0.6, "fraction", "over latents")
    for values in ([value], [latents, value, None], [value.to_json(), Measured(math.nan, reason="undefined: 0 / 0")]):
        assert no_intervals(values) == said
    assert no_intervals([]) == no_intervals([latents]) == ""
    assert no_intervals([Measured(0.5)]) == "no intervals"


def test_a_few_heavy_groups_are_not_many():
    assert effective_number(np.array([1000, 10, 10, 10])) < 1.1
    assert degrees_of_freedom(np.array([100.0, 100.0, 1.0, 1.0])) < 2
    assert degrees_of_freedom(np.ones(30)) == pytest.approx(29)
    heavy = Sample.over(np.array([500.0, *[5.0] * 30])).ratio(np.arange(31.0), np.ones(31)).measured("")
    assert heavy.low is None
    assert "tell as much as" in heavy.reason


def test_resampling_rows_would_be_too_narrow():
    """Documents that agree within themselves: the interval is that of documents, not of rows."""
    per_document = np.random.default_rng(1).normal(size=20)
    n = np.full(20, 100.0)
    by_document = Sample.over(n).ratio(per_document * n, n).measured("")
    by_row = measured_mean(np.repeat(per_document, 100))
    assert by_document.high - by_document.low > 4 * (by_row.high - by_row.low)


def test_of_equal_groups_it_is_the_interval_of_students_t():
    from scipy.stats import sem, t

    values = np.random.default_rng(0).normal(size=12)
    found = measured_mean(values)
    skew = Estimate(0.0, *_parts(values)).spread.skew
    half = t.ppf(0.975, 11) * sem(values)
    near, far = (found.value - found.low, found.high - found.value)[:: 1 if skew > 0 else -1]
    assert near == pytest.approx(half)
    assert far >= half


def _parts(values: np.ndarray) -> tuple[np.ndarray, Sample]:
    estimate = Sample.over(np.ones(len(values))).ratio(values, np.ones(len(values)))
    assert estimate.left_out is not None
    assert estimate.sample is not None
    return estimate.left_out - estimate.value, estimate.sample


def test_the_bias_of_a_ratio_to_a_variance_is_part_of_the_error():
    """Few documents that differ from each other: their variance comes out too small, fvu too large."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(20).repeat_interleave(20)
    x = 3**0.5 * torch.randn(20, 64, generator=generator)[group] + torch.randn(400, 64, generator=generator)
    accumulator = Reconstruction(64)
    accumulator.update(x, x + 0.5**0.5 * torch.randn(400, 64, generator=generator), group)
    estimate = accumulator.compute(Sample.over(accumulator.moments.rows_per_group))["fvu"]
    left_out = estimate.left_out
    assert estimate.spread.error > 1.2 * np.sqrt(19 / 20 * np.square(left_out - left_out.mean()).sum())
    measured = estimate.measured("fraction", least=0)
    assert measured.low < 0.125 < measured.high


unit = st.floats(0.001, 0.999)


@settings(max_examples=200, deadline=None)
@given(unit, st.floats(0, 2), st.floats(1, 500), st.floats(-0.3, 0.3))
def test_fractions_stay_fractions_and_hold_their_value(value, error, degrees, skew):
    low, high = interval(value, Spread(error, degrees, skew), least=0.0, most=1.0)
    assert 0 <= low <= value <= high <= 1
    turned = interval(1 - value, Spread(error, degrees, -skew), least=0.0, most=1.0)
    assert turned == pytest.approx((1 - high, 1 - low), abs=1e-9)
    low, high = interval(value, Spread(error, degrees, skew), least=0.0)
    assert 0 <= low <= value <= high
    wide = interval(value, Spread(error, degrees, skew), 0.99, least=0.0, most=1.0)
    narrow = interval(value, Spread(error, degrees, skew), 0.9, least=0.0, most=1.0)
    assert wide[0] <= narrow[0]
    assert narrow[1] <= wide[1]


def test_where_nothing_varies_the_number_of_observations_is_what_is_left():
    assert interval(1.0, Spread(0.0, 9), least=0.0, most=1.0, counts=10) == pytest.approx((0.025 ** (1 / 10), 1.0))
    assert interval(16.0, Spread(0.0, 9), least=0.0) == (16.0, 16.0)


def test_one_document_has_no_interval_and_the_reason_says_so():
    sample = Sample.over(np.array([0.0, 7.0, 0.0]))
    measured = sample.ratio(np.array([0.0, 3.0, 0.0]), np.array([0.0, 7.0, 0.0])).measured("fraction")
    assert measured.value == pytest.approx(3 / 7)
    assert measured.low is None
    assert measured.high is None
    assert "at least 3 documents" in measured.reason


def test_groups_without_rows_are_no_parts():
    sample = Sample.over(np.array([3.0, 0.0, 3.0, 0.0, 3.0]))
    assert sample.sizes.tolist() == [3, 3, 3]
    assert sample.weights[:, [0, 2, 4]].tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_a_difference_is_paired():
    n = np.ones(40)
    values = np.random.default_rng(0).normal(size=40)
    sample = Sample.over(n)
    difference = sample.ratio(values + 1, n).minus(sample.ratio(values, n)).measured("")
    assert difference.low == pytest.approx(1)
    assert difference.high == pytest.approx(1)
    apart = Sample.over(n).ratio(values + 1, n).minus(sample.ratio(values, n)).measured("")
    assert apart.high == pytest.approx(1)


def test_a_mean_over_samples_joins_parts_of_one_name():
    values = np.random.default_rng(3).normal(size=(2, 12))
    ones = np.ones(12)

    def mean_of(names: list[tuple[str, ...]]) -> float:
        parts = [Sample(ones, 1 - np.eye(12), None, each).ratio(v, ones) for each, v in zip(names, values)]
        return mean_estimate(parts).spread.error

    same, other = tuple(map(str, range(12))), tuple(map(str, range(12, 24)))
    both = measured_mean(values.mean(0))
    assert mean_of([same, same]) == pytest.approx(Sample.over(ones).ratio(values.mean(0), ones).spread.error)
    assert both.low is not None
    errors = [Sample.over(ones).ratio(v, ones).spread.error for v in values]
    assert mean_of([same, other]) == pytest.approx(np.hypot(*errors) / 2, rel=0.05)


def test_the_p_value_and_the_interval_agree():
    values = np.random.default_rng(4).normal(0.5, 1, size=25)
    estimate = Sample.over(np.ones(25)).ratio(values, np.ones(25))
    spread = estimate.spread
    reach = spread.error * spread.arms(0.95)[spread.skew < 0 or 0]
    assert estimate.p_value(estimate.value - reach) <= 0.05 + 1e-9


def test_dense_and_dead_fractions_have_intervals_between_0_and_1():
    generator = torch.Generator().manual_seed(0)
    fired = torch.rand(2000, 40, generator=generator) < torch.linspace(0, 0.25, 40)
    accumulator = Sparsity(40)
    group = torch.arange(2000) // 50
    accumulator.update(Codes.from_dense(fired.float()), group)
    found = accumulator.compute()
    for name in ("dense_fraction", "dead_fraction"):
        measured = found[name].measured("fraction", least=0.0, most=1.0)
        assert 0 <= measured.low <= measured.value <= measured.high <= 1
    assert found["dense_fraction"].spread.error > 0
    assert found["dense_fraction"].minus(found["dense_fraction"]).measured("").high == 0


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


def test_intervals_can_be_left_out():
    assert Sample.over(np.ones(5), intervals=False).reason == "no interval asked for"


def test_a_choice_widens_an_interval_near_the_end_of_its_range_by_its_own_error():
    """On the logit scale an error of .01 at .999 would be ten units, and the interval hold everything down to 0."""
    left_out = 0.999 + np.linspace(-1, 1, 40) * 2e-5
    plain = Estimate(0.999, left_out, Sample.over(np.ones(40)))
    alone, found = (each.measured("", least=0, most=1) for each in (plain, replace(plain, choice=1e-4)))
    reach = student(39.0) * 0.01
    assert found.low == pytest.approx(0.999 - np.hypot(0.999 - alone.low, reach))
    assert found.high == 1.0


def test_a_choice_is_an_independent_error_where_there_is_no_range():
    left_out = np.linspace(-1, 1, 40) * 0.01
    plain = Estimate(0.0, left_out, Sample.over(np.ones(40)))
    found = replace(plain, choice=0.02**2)
    half = student(39.0) * np.hypot(plain.spread.error, 0.02)
    assert (found.measured("").low, found.measured("").high) == pytest.approx((-half, half))
    assert found.p_value(half) == pytest.approx(0.05)
