"""Laws of the power law and of the decoder's spectrum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fixtures.known_saes import random_sae
from saekit.errors import ConfigError, DataError
from saekit.sae.model import SAE
from saekit.sae.rules import ReLURule
from saekit.sizes.power_law import decoder_spectrum, power_law


def pareto(n: int, alpha: float, seed: int = 0) -> np.ndarray:
    """Values whose density exponent is 1 + 1 / alpha, so that sorted they fall as rank^-alpha."""
    return np.random.Generator(np.random.PCG64(seed)).random(n) ** -alpha


@pytest.mark.parametrize("alpha", [0.4, 1.0, 1.7])
def test_a_power_law_is_found_with_its_exponent(alpha):
    found = power_law(pareto(2000, alpha))
    assert found.alpha.value == pytest.approx(alpha, rel=0.1)
    assert found.alpha_likelihood.low < alpha < found.alpha_likelihood.high
    assert found.alpha.low < found.alpha.value < found.alpha.high
    assert found.r2 > 0.95
    assert found.distance < 0.05
    exponential = next(rival for rival in found.rivals if rival.name == "exponential")
    assert exponential.verdict == "power law"
    assert "power law" in found.verdict


def test_the_exact_line():
    found = power_law(5 * np.arange(1, 400.0) ** -1.3)
    assert found.alpha.value == pytest.approx(1.3)
    assert 10**found.log10_c == pytest.approx(5)
    assert found.r2 == pytest.approx(1)


def test_an_exponential_is_told_apart():
    values = np.random.Generator(np.random.PCG64(0)).exponential(size=3000) + 1
    found = power_law(values)
    assert {rival.name: rival.verdict for rival in found.rivals}["exponential"] == "exponential"
    assert found.verdict.startswith("not a power law")


def test_a_lognormal_is_told_apart():
    values = np.random.Generator(np.random.PCG64(0)).lognormal(sigma=1.0, size=5000)
    found = power_law(values)
    assert {rival.name: rival.verdict for rival in found.rivals}["lognormal"] == "lognormal"
    assert found.verdict.startswith("not a power law: lognormal")


def test_verdicts_on_known_laws_are_right_or_undecided(load_benchmark):
    """A thousand values each of power laws, log-normals and exponentials: hardly a wrong word, mostly right ones."""
    simulation = load_benchmark("verdict_simulation")
    for law in simulation.LAWS:
        found = simulation.law_verdicts(law, 1000, trials=12, seed=1)
        assert found["wrong"] <= 2 / 12, law
        assert found["right"] >= 9 / 12, law


def test_few_latents_decide_no_power_law():
    assert "alive latents" in power_law(pareto(60, 2.0)).verdict
    assert power_law(pareto(60, 2.0)).verdict.startswith("undecided")


def test_order_scale_and_the_dead_do_not_matter():
    values = pareto(300, 1.0)
    found = power_law(values)
    other = power_law(torch.cat([torch.zeros(7), torch.from_numpy(7 * values).flip(0)]))
    assert other.alpha.value == pytest.approx(found.alpha.value, rel=1e-9)
    assert other.alpha_likelihood.value == pytest.approx(found.alpha_likelihood.value, rel=1e-9)
    assert other.ranks == found.ranks == (1, 300)
    assert (found.dead, other.dead) == (0, 7)


@pytest.mark.parametrize("values", [np.ones(50), np.arange(9.0), np.zeros(100)])
def test_too_little_to_fit(values):
    with pytest.raises(DataError, match="at least 10 positive values that differ"):
        power_law(values)


def test_power_law_refuses():
    with pytest.raises(DataError, match="must not hold NaN"):
        power_law([math.nan] * 20)
    with pytest.raises(ConfigError, match="`draws` must be at least 2"):
        power_law(pareto(20, 1), draws=1)


def test_spectrum_of_the_decoder():
    sae = random_sae()
    found = decoder_spectrum(sae)
    assert bool((found.diff() <= 0).all())
    W = sae.W_dec.double()
    assert float(found.sum()) == pytest.approx(float((W - W.mean(0)).square().sum(1).mean()))


def test_fewer_latents_than_dimensions_leave_no_eigenvalues_of_rounding():
    W = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    sae = SAE(W_enc=W, b_enc=torch.zeros(5), W_dec=W, b_dec=torch.zeros(30), rule=ReLURule())
    spectrum = decoder_spectrum(sae)
    assert (spectrum > 0).sum() == 4
    assert float(spectrum.sum()) == pytest.approx(float((W - W.mean(0)).square().sum(1).mean()), rel=1e-5)
