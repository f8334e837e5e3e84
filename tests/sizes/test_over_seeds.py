"""Means and paired differences over seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from saekit.measure.metrics import Metrics
from saekit.measure.results import Measured
from saekit.sizes.over_seeds import curves_over_seeds, paired_differences


def metrics(**values: float) -> Metrics:
    return Metrics({name: Measured(value, None, None, "fraction") for name, value in values.items()})


NESTED, PRUNED, UNSORTED = "matryoshka", "topk pruned by energy", "topk unsorted"


def test_means_have_intervals_over_seeds_within_the_bounds_of_the_metric():
    values = {(NESTED, 8): {seed: metrics(fvu=value) for seed, value in enumerate((0.1, 0.2, 0.6))}}
    (point,) = curves_over_seeds(values, {(NESTED, 8): Measured(0.5, None, None, "fraction")})
    low, high = stats.t.interval(0.95, 2, 0.3, stats.sem([0.1, 0.2, 0.6]))
    assert low < 0
    assert (point.metrics.fvu.value, point.metrics.fvu.low, point.metrics.fvu.high) == pytest.approx((0.3, 0, high))
    assert point.seeds == [0, 1, 2]
    assert point.metrics["shared"].value == 0.5
    assert math.isnan(point.metrics.ce_sae.value)


def test_one_seed_keeps_its_own_interval():
    one = Metrics({"fvu": Measured(0.1, 0.05, 0.2, "fraction")})
    (point,) = curves_over_seeds({(NESTED, 8): {0: one}}, {})
    assert point.metrics.fvu == one.fvu


def test_differences_are_over_the_seeds_that_both_have():
    values = {
        (NESTED, 8): {seed: metrics(fvu=0.1 + 0.01 * seed) for seed in range(4)},
        (PRUNED, 8): {seed: metrics(fvu=0.3 + 0.02 * seed) for seed in range(1, 4)},
        (UNSORTED, 8): {seed: metrics(fvu=0.3) for seed in range(1, 4)},
    }
    found = {(each.name, each.minus): each for each in paired_differences(values, ["energy", "unsorted"])}
    assert found.keys() == {(NESTED, PRUNED), (PRUNED, UNSORTED)}
    gaps = [-0.2 - 0.01 * seed for seed in range(1, 4)]
    assert found[NESTED, PRUNED].difference.value == pytest.approx(np.mean(gaps))
    assert found[NESTED, PRUNED].verdict == NESTED
    assert found[PRUNED, UNSORTED].verdict == "undecided"


def test_without_a_ranking_there_is_nothing_to_compare():
    assert paired_differences({(UNSORTED, 8): {0: metrics(fvu=0.1)}}, ["unsorted", "random"]) == []
