"""Sums of products of codes give least squares and the errors of every choice of latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit.measure.normal_equations import NormalEquations, greedy_order


@pytest.fixture(scope="module")
def equations(oracle, rows) -> NormalEquations:
    found = NormalEquations(oracle.n_latents, oracle.d_out)
    for part in rows.double().split(700):
        sae = oracle.to(dtype=torch.float64)
        found.update(sae, sae.encode(part), part)
    return found


def test_the_quadratic_is_the_error_of_any_choice_of_latents(equations, oracle, rows):
    sae = oracle.to(dtype=torch.float64)
    Q, a, c = equations.quadratic(sae)
    x = rows.double()
    codes = sae.encode(x).to_dense()
    for seed in range(3):
        kept = np.random.default_rng(seed).random(oracle.n_latents) < 0.6
        x_hat = (codes * torch.from_numpy(kept)) @ sae.W_dec + sae.b_dec
        expected = float((x - x_hat).square().sum(1).mean())
        s = kept.astype(float)
        assert s @ Q @ s - 2 * a @ s + c == pytest.approx(expected, rel=1e-9)


def test_a_refit_is_least_squares(equations, oracle, rows):
    sae = oracle.to(dtype=torch.float64)
    W, b = equations.refit(sae)
    z = sae.encode(rows.double()).to_dense()
    design = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(design, rows.double()).solution
    fitted, expected = z @ W + b, design @ best
    error, least = ((rows.double() - each).square().sum() for each in (fitted, expected))
    assert float(error) == pytest.approx(float(least), rel=1e-6)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_greedy_selection_tells_the_error_of_every_prefix(equations, oracle, direction):
    Q, a, c = equations.quadratic(oracle.to(dtype=torch.float64))
    order, losses = greedy_order(Q, a, c, direction)
    assert sorted(order.tolist()) == list(range(oracle.n_latents))
    for size in (0, 1, 10, oracle.n_latents):
        s = np.zeros(oracle.n_latents)
        s[order[:size].numpy()] = 1
        assert losses[size] == pytest.approx(s @ Q @ s - 2 * a @ s + c, abs=1e-8)
    if direction == "forward":
        best = min(Q[j, j] - 2 * a[j] + c for j in range(oracle.n_latents))
        assert losses[1] == pytest.approx(best)
