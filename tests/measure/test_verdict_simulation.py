"""Verdicts on simulated differences whose truth is known: short runs of ``make verdicts``."""

from __future__ import annotations

import pytest
from scipy.stats import binom


@pytest.fixture(scope="module")
def simulation(load_benchmark):
    return load_benchmark("verdict_simulation")


@pytest.mark.parametrize("family", ["20 documents, lognormal lengths", "3 seeds"])
def test_false_verdicts_are_as_rare_as_announced(simulation, family):
    """After Holm's correction: no more families with a false one than 5 % would give, once in 1,000 times."""
    for what in simulation.KINDS:
        for claims in (1, 8):
            fraction = simulation.false_verdicts(what, family, claims=claims, trials=120, seed=1)
            assert binom.sf(round(fraction * 120) - 1, 120, 0.05) > 1e-3, (what, claims)


def test_single_intervals_at_the_edge_would_not_be_that_rare(simulation, monkeypatch):
    """The correction is what does it: without it, eight true differences of nothing give many more."""
    monkeypatch.setattr(
        simulation,
        "family_verdicts",
        lambda claims, **_: [each.rule(each.difference.measured(""), each.margin) for each in claims],
    )
    what = "no difference, no margin: better or worse"
    assert simulation.false_verdicts(what, "3 seeds", claims=8, trials=120) > 0.15


def test_what_intervals_are_said_to_detect_is_found(simulation):
    assert 0.6 < simulation.found("50 documents, equal lengths", trials=120, seed=1) < 0.92
