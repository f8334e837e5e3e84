"""How far rows lie along decoder rows: against plain numpy, invariances, and the L0 of rows whose L0 is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit import evaluate
from saekit.evaluation.settings import EvaluationSettings
from saekit.measure import decoder_projection
from saekit.measure.decoder_projection import projections
from saekit.rows.arrays import ArrayRows
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.sae.scaling import Scaling


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sae_of(W: torch.Tensor, **parts) -> SAE:
    n, d = W.shape
    values = {"W_enc": W, "b_enc": torch.zeros(n), "b_dec": torch.zeros(d)} | parts
    return SAE(W_dec=W, rule=TopKRule(2), **values)


def test_it_is_the_upper_quartile_of_plain_numpy():
    W, x = randn(12, 5), 3 * randn(200, 5, seed=1) + 7
    away = (x - x.mean(0)).double().numpy()
    unit = (W / W.norm(dim=1, keepdim=True)).double().numpy()
    expected = np.quantile(away @ unit.T / np.sqrt((away**2).sum(1).mean()), 0.75)
    [found] = projections([sae_of(W)], x)
    assert found.value == pytest.approx(expected, rel=1e-5)
    low, high = found.measured("").low, found.measured("").high
    assert low < found.value < high


def test_which_way_round_a_latent_points_changes_nothing_where_codes_have_signs():
    W, x, signs = randn(12, 5), randn(200, 5, seed=1), torch.tensor([1.0, -1.0, -1.0] * 4)[:, None]
    saes = [sae_of(each).replace(rule=TopKRule(2, sign="magnitude")) for each in (W, signs * W)]
    (one, other), (plain, turned) = projections(saes, x), projections([sae_of(W), sae_of(signs * W)], x)
    assert one.value == pytest.approx(other.value)
    assert plain.value != pytest.approx(turned.value)
    first, second = (evaluate(sae, ArrayRows(x), settings=EvaluationSettings(controls=False)).metrics for sae in saes)
    for name in ("decoder_redundancy", "encoder_redundancy", "decoder_projection"):
        assert first[name].value == pytest.approx(second[name].value), name


def test_length_offset_scaling_and_order_change_nothing():
    W, x = randn(12, 5), randn(200, 5, seed=1)
    lengths = torch.linspace(0.5, 2, 12)[:, None]
    others = [
        (sae_of(W * lengths), x),
        (sae_of(W), 5 * x + 40),
        (sae_of(W, b_dec=randn(5, seed=3)), x),
        (sae_of(W[torch.arange(12).flip(0)]), x),
        (sae_of(W, scaling=Scaling("scalar", scale=torch.tensor(3.0))), x),
    ]
    [expected] = projections([sae_of(W)], x)
    for sae, rows in others:
        [found] = projections([sae], rows)
        assert found.value == pytest.approx(expected.value, rel=1e-4)


def test_wide_dictionaries_are_sampled(monkeypatch):
    W, x = randn(400, 6), randn(100, 6, seed=1)
    [whole] = projections([sae_of(W)], x)
    monkeypatch.setattr(decoder_projection, "MOST_LATENTS", 100)
    [part] = projections([sae_of(W)], x)
    assert part.value != whole.value
    assert part.value == pytest.approx(whole.value, rel=0.1)


def test_rows_that_are_all_the_same_have_none():
    [found] = projections([sae_of(randn(4, 3))], torch.ones(50, 3))
    assert np.isnan(found.value)
    assert "undefined" in str(found.reason)


def test_it_is_paired_with_its_baseline_and_missing_where_it_means_nothing():
    x = randn(400, 6, seed=1)
    result = evaluate(sae_of(randn(16, 6)), ArrayRows(x), settings=EvaluationSettings(max_rows=300))
    assert "decoder_projection" in result.metrics
    assert "decoder_projection" in result.controls["untrained"].differences
    assert "decoder_projection" not in result.controls["pca"].metrics
    other = evaluate(sae_of(randn(16, 6)), ArrayRows(x), fit=10 + x * 2, settings=EvaluationSettings())
    plain = evaluate(sae_of(randn(16, 6)), ArrayRows(x))
    assert other.metrics["decoder_projection"].value == plain.metrics["decoder_projection"].value
