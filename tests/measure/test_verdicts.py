"""One rule for every verdict: from intervals and margins, corrected for what is claimed together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.errors import ConfigError
from saekit.measure.intervals import Estimate, Sample, Spread
from saekit.measure.results import Measured
from saekit.measure.verdicts import (
    Claim,
    Stored,
    corrected_t,
    detectable,
    family_verdicts,
    holm,
    non_inferiority,
    resolution,
    verdict,
)

ends = st.floats(-1, 1)


@settings(max_examples=200, deadline=None)
@given(ends, ends, st.floats(0, 0.5))
def test_a_verdict_says_where_the_interval_lies(a, b, margin):
    low, high = min(a, b), max(a, b)
    said = verdict(Measured((low + high) / 2, low, high), margin)
    assert (said == "better") == (low > margin)
    assert (said == "worse") == (high < -margin)
    assert (said == "equivalent") == (low >= -margin and high <= margin)
    # the other way round: better becomes worse, the rest stays
    flipped = verdict(Measured(-(low + high) / 2, -high, -low), margin)
    assert flipped == {"better": "worse", "worse": "better"}.get(said, said)


def test_no_interval_decides_nothing():
    assert verdict(Measured(0.5)) == "undecided"
    with pytest.raises(ConfigError, match="`margin` must be"):
        verdict(Measured(0.0), -0.1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_between_raw_and_bonferroni(values):
    adjusted = holm(values)
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
    assert all(p <= q <= min(1.0, p * len(values)) + 1e-12 for p, q in zip(values, adjusted))


def test_holm_leaves_out_what_is_not_known():
    assert holm([0.01, math.nan, 0.04])[::2] == [0.02, 0.04]
    assert math.isnan(holm([math.nan])[0])


def test_corrected_t():
    d = [0.02, 0.03, 0.01, 0.04, 0.02]
    t, p = corrected_t(d, 80, 20)
    assert t == pytest.approx(np.mean(d) / math.sqrt((1 / 5 + 20 / 80) * np.var(d, ddof=1)))
    assert 0 < p < 0.1
    assert corrected_t([0.0, 0.0], 8, 2) == (0.0, 1.0)
    assert corrected_t([0.1, 0.1], 8, 2) == (math.inf, 0.0)
    assert all(math.isnan(each) for each in corrected_t([0.1], 8, 2))


def means(generator: np.random.Generator, truths: list[float], n: int = 40, sd: float = 0.1) -> list[Estimate]:
    """Means of n numbers, each about its truth."""
    sample = Sample.over(np.ones(n))
    return [sample.ratio(truth + sd * generator.normal(size=n), np.ones(n)) for truth in truths]


def test_a_family_without_differences_is_rarely_told_apart():
    """Twenty differences of nothing: any false verdict in 5 of 100 families, where single intervals give 64."""
    generator = np.random.default_rng(0)
    families = [means(generator, [0.0] * 20) for _ in range(200)]
    wrong = sum(any(word in ("better", "worse") for word in family_verdicts(each, 0.0)) for each in families)
    alone = sum(any(verdict(one.measured(""), 0.0) != "undecided" for one in each) for each in families)
    assert wrong <= 22  # 99.9 % of the counts of 5 %
    assert alone > 100


def test_a_family_of_one_has_its_ordinary_verdict_and_nothing_is_decided_twice():
    generator = np.random.default_rng(1)
    for one in means(generator, [0.0, 0.02, 0.05, 0.2, -0.1]):
        assert family_verdicts([one]) == [verdict(one.measured("", least=-1.0, most=1.0))]
    assert family_verdicts([None, *means(generator, [0.5])]) == ["", "better"]
    assert family_verdicts([]) == []


def test_a_family_decides_no_more_than_each_alone_and_the_clear_ones_make_room():
    generator = np.random.default_rng(2)
    family = means(generator, [0.5, 0.4, 0.055, 0.0])
    together = family_verdicts(family, 0.01)
    apart = [verdict(one.measured("", least=-1.0, most=1.0), 0.01) for one in family]
    assert all(word in (single, "undecided") for word, single in zip(together, apart))
    assert together[:2] == ["better", "better"]


def test_what_is_resolved_and_what_is_found_with_power():
    """A difference of the margin and half the width is found half the time, the detectable one 4 times in 5."""
    generator = np.random.default_rng(3)
    half = resolution(means(generator, [0.0], 100)[0].measured(""))
    for truth, expected in ((0.01 + half, 0.5), (detectable(half, 0.01), 0.8)):
        found = [verdict(each.measured(""), 0.01) == "better" for each in means(generator, [truth] * 400, 100)]
        assert np.mean(found) == pytest.approx(expected, abs=0.12)


def test_what_keeps_or_improves_is_not_below_the_margin():
    assert non_inferiority(Measured(0.2, -0.005, 0.4)) == "holds"
    assert non_inferiority(Measured(0.0, -0.004, 0.004)) == "holds"
    assert non_inferiority(Measured(0.0, -0.1, 0.1)) == "undecided"
    assert non_inferiority(Measured(-0.1, -0.2, -0.02)) == "refuted"
    assert non_inferiority(Measured(0.3)) == "undecided"


def test_what_was_stored_is_decided_as_what_it_was_computed_from():
    """A mean of five numbers, from its estimate and from its 95 % interval alone."""
    sample = Sample.over(np.ones(5))
    for shift in (0.0, 0.05, 0.2, -0.3):
        one = sample.ratio(shift + np.array([-0.04, -0.02, 0.0, 0.02, 0.04]), np.ones(5))
        stored = Stored(one.measured(""), degrees=4)
        for level in (0.9, 0.95, 0.999):
            expected, found = one.measured("", level), stored.measured("", level)
            assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert family_verdicts([stored] * 7, least=None, most=None) == family_verdicts([one] * 7, least=None, most=None)
    none = Stored(Measured(0.5))
    assert family_verdicts([none]) == ["undecided"]
    turned = Stored(Measured(0.7, 0.6, 0.9)).oriented(-1, 0.5).difference
    assert (turned.value, turned.low, turned.high) == pytest.approx((-0.2, -0.4, -0.1))


def test_a_claim_has_a_margin_and_a_rule_of_its_own():
    small = Stored(Measured(-0.02, -0.03, -0.01))
    assert family_verdicts([small]) == ["undecided"]
    assert family_verdicts([Claim(small, 0.05)]) == ["equivalent"]
    assert family_verdicts([Claim(small, 0.05, non_inferiority), Claim(small, 0.0)]) == ["holds", "worse"]


def test_nothing_is_equivalent_where_the_interval_is_wider_than_the_margin():
    flat = Estimate(0.0, np.zeros(10), Sample.over(np.ones(10)), counts=10)
    assert flat.spread == Spread(0.0, 9.0)
    assert family_verdicts([flat], 0.01) == ["undecided"]
