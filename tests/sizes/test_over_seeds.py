"""Means and paired differences over seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from saekit.measure.metrics import Metrics
from saekit.measure.results import Measured
from saekit.sizes.largest import FromLargest
from saekit.sizes.over_seeds import curves_over_seeds, paired_differences
from saekit.sizes.result import SizePoint


def metrics(**values: float) -> Metrics:
    return Metrics({name: Measured(value, None, None, "fraction") for name, value in values.items()})


NESTED, PRUNED, UNSORTED = "matryoshka", "topk pruned by energy", "topk unsorted"


def test_means_have_intervals_over_seeds_within_the_bounds_of_the_metric():
    points = {(NESTED, 8): {seed: SizePoint(8, metrics(fvu=value)) for seed, value in enumerate((0.1, 0.2, 0.6))}}
    (point,) = curves_over_seeds(points, {(NESTED, 8): Measured(0.5, None, None, "fraction")})
    low, high = stats.t.interval(0.95, 2, 0.3, stats.sem([0.1, 0.2, 0.6]))
    assert low < 0
    assert (point.metrics.fvu.value, point.metrics.fvu.low, point.metrics.fvu.high) == pytest.approx((0.3, 0, high))
    assert point.seeds == [0, 1, 2]
    assert point.metrics["shared"].value == 0.5
    assert math.isnan(point.metrics.ce_sae.value)


def test_one_seed_keeps_its_own_interval():
    one = Metrics({"fvu": Measured(0.1, 0.05, 0.2, "fraction")})
    compared = FromLargest(one, {"fvu": "worse"})
    point, _ = curves_over_seeds(
        {(NESTED, 8): {0: SizePoint(8, one, compared)}, (NESTED, 16): {0: SizePoint(16, one)}}, {}
    )
    assert point.metrics.fvu == one.fvu
    assert point.from_largest == compared


def test_sizes_are_compared_with_the_largest_by_seed():
    points = {
        (NESTED, size): {
            seed: SizePoint(size, metrics(fvu=0.1 * seed + more + 0.0001 * (seed + size) % 0.0003)) for seed in range(5)
        }
        for size, more in ((4, 0.2), (8, 0.004), (16, 0.0))
    }
    found = {point.size: point for point in curves_over_seeds(points, {})}
    gaps = [points[NESTED, 8][seed].metrics.fvu.value - points[NESTED, 16][seed].metrics.fvu.value for seed in range(5)]
    low, high = stats.t.interval(0.95, 4, np.mean(gaps), stats.sem(gaps))
    gap = found[8].from_largest.differences.fvu
    assert (gap.value, gap.low, gap.high) == pytest.approx((np.mean(gaps), low, high))
    assert [found[size].from_largest.verdicts.get("fvu") for size in (4, 8, 16)] == ["worse", "equivalent", None]
    assert found[8].metrics.fvu.high - found[8].metrics.fvu.low > 0.1  # that of the seeds themselves decides nothing


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
    assert found[NESTED, PRUNED].verdict == "better"
    assert found[PRUNED, UNSORTED].verdict == "undecided"
    assert found[PRUNED, UNSORTED].seeds == 3
    low, high = (found[PRUNED, UNSORTED].difference.low, found[PRUNED, UNSORTED].difference.high)
    assert found[PRUNED, UNSORTED].detects == pytest.approx(0.01 + 1.4294 * (high - low) / 2, rel=1e-3)


def pairs_of(gaps: dict[int, tuple[float, ...]]) -> dict[tuple[str, int], dict[int, Metrics]]:
    """Nested SAEs that differ from pruned ones by these numbers, by size and then by seed."""
    found = {}
    for size, each in gaps.items():
        found[NESTED, size] = {seed: metrics(fvu=0.5 + gap) for seed, gap in enumerate(each)}
        found[PRUNED, size] = {seed: metrics(fvu=0.5) for seed in range(len(each))}
    return found


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((0.1, 0.101, 0.099), "worse"),  # more FVU is worse
        ((-0.1, -0.101, -0.099), "better"),
        ((0.001, 0.0, -0.001), "equivalent"),
        ((-0.012, -0.0121, -0.0119), "better"),
        ((-0.009, -0.0091, -0.0089), "equivalent"),  # certainly not 0, and too little to matter
        ((0.1, -0.1, 0.0), "undecided"),
        ((-0.5,), "undecided"),  # one seed decides nothing
    ],
)
def test_verdicts_follow_from_the_interval_and_the_margin(gaps, verdict):
    (found,) = paired_differences(pairs_of({8: gaps}), ["energy"])
    assert found.verdict == verdict


def test_sizes_are_one_family():
    """What a single size decides by its 95 % interval, one of ten sizes does not."""
    gaps = (0.03, 0.04, 0.035, 0.025)
    (alone,) = paired_differences(pairs_of({8: gaps}), ["energy"])
    assert alone.verdict == "worse"
    noise = dict.fromkeys(range(9, 60), (0.5, -0.5, 0.2, -0.3))
    among = paired_differences(pairs_of({8: gaps} | noise), ["energy"])
    assert {each.verdict for each in among} == {"undecided"}
    assert among[0].difference == alone.difference


def test_without_a_ranking_there_is_nothing_to_compare():
    assert paired_differences({(UNSORTED, 8): {0: metrics(fvu=0.1)}}, ["unsorted", "random"]) == []
