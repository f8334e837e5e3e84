"""Means over SAEs and over pairs of SAEs."""

from __future__ import annotations

import math

import pytest
import torch

from saekit.comparison.intervals import OverPairs, over_latents, over_saes, standard_error
from saekit.measure.intervals import jackknife_error
from saekit.measure.results import Measured


def test_means_over_pairs_leave_out_saes():
    each = [Measured(value, None, None, "fraction") for value in (0.5, 0.52, 0.57)]
    mean = OverPairs([(0, 1), (0, 2), (1, 2)], 3).mean(each)
    # Leaving out one SAE leaves one pair; 4.3027 is the 97.5 % point of t with 2 degrees of freedom.
    error = 4.302653 * math.sqrt(2 / 3 * (0.03**2 + 0.01**2 + 0.04**2))
    assert (mean.low, mean.value, mean.high) == pytest.approx((0.53 - error, 0.53, 0.53 + error))


def test_pairs_that_are_all_alike_keep_the_interval_of_their_latents():
    each = [Measured(0.0, 0.0, high, "fraction") for high in (0.03, 0.04, 0.02)]
    mean = OverPairs([(0, 1), (0, 2), (1, 2)], 3).mean(each)
    assert (mean.value, mean.low, mean.high) == (0, 0, 0.04)


def test_means_over_saes():
    mean = over_saes([1.0, 2.0, 3.0])
    assert (mean.low, mean.value, mean.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2, 2 + 4.302653 / 3**0.5))
    assert over_saes([1.0, 2.0]).low is None
    assert over_saes([0.6, 0.8], fallback=0.1).reason.startswith("interval over latents")
    assert math.isnan(over_saes([math.nan]).value)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    left_out = [float((x.sum() - each) / 29) for each in x]
    assert jackknife_error(left_out) == pytest.approx(standard_error(x))


def test_intervals_over_latents_are_cut_at_their_range():
    near = over_latents(0.99, 0.1)
    assert (near.value, near.high) == (0.99, 1.0)
    assert over_latents(0.01, 0.1, least=0.0).low == 0.0
    assert over_latents(0.5, standard_error(torch.ones(1))).low is None


def test_pairs_with_one_sae_in_common_have_no_interval():
    each = [Measured(value, None, None, "fraction") for value in (0.5, 0.6)]
    mean = OverPairs([(0, 1), (0, 2)], 3).mean(each)
    assert (mean.value, mean.low) == (pytest.approx(0.55), None)
    assert "one SAE in common" in mean.reason
