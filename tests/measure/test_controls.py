"""What SAEs are compared with: untrained ones of their shape and rule, and principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit.measure.accumulators import fvu
from saekit.measure.controls import pca_reconstructor, reconstructor_of, untrained_like
from saekit.measure.pca import Covariance
from saekit.sae.rules import GroupMaxRule, ReLURule, TopKRule
from saekit.sae.scaling import Scaling


def test_an_sae_as_a_reconstructor_answers_as_it_does(oracle, rows):
    made = reconstructor_of("mine", oracle, {"a": 1})
    x_hat, codes = made.forward(rows[:50].double())
    torch.testing.assert_close(x_hat, oracle.reconstruct(rows[:50]).double())
    assert x_hat.dtype == torch.float64
    assert torch.equal(codes.indices, oracle.encode(rows[:50]).indices)
    assert (made.name, made.sae, made.about, made.l0) == ("mine", oracle, {"a": 1}, None)


def test_an_untrained_twin_keeps_shape_and_rule_and_nothing_learned(oracle, rows):
    twin = untrained_like(oracle, rows.mean(0), rows[:500], 2.0, seed=0)
    assert twin.rule.settings() == oracle.rule.settings()
    assert twin.W_enc.shape == oracle.W_enc.shape
    torch.testing.assert_close(twin.W_enc.norm(dim=1), torch.ones(oracle.n_latents))
    torch.testing.assert_close(twin.W_enc * twin.W_dec[0].norm(), twin.W_dec)
    torch.testing.assert_close(twin.b_pre, rows.mean(0))
    assert (twin.W_enc @ oracle.W_dec.T).abs().max() < 0.95
    assert twin.provenance == {}
    again, other = (untrained_like(oracle, rows.mean(0), rows[:500], 2.0, seed=seed) for seed in (0, 1))
    assert torch.equal(again.W_dec, twin.W_dec)
    assert not torch.equal(other.W_dec, twin.W_dec)


SCALINGS = {
    "none": Scaling(),
    "scalar": Scaling("scalar", torch.tensor(0.3)),
    "standardize": Scaling("standardize", torch.linspace(0.5, 2, 24), torch.linspace(-1, 1, 24)),
    "layer_norm": Scaling("layer_norm"),
    "row_norm": Scaling("row_norm"),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_decoder_of_an_untrained_sae_has_the_best_factor_and_bias(oracle, rows, kind):
    """No factor and bias do better, and those of least squares over all rows and dimensions do as well."""
    sample = rows[:200]
    twin = untrained_like(oracle.replace(scaling=SCALINGS[kind]), rows.mean(0), sample, 2.0, seed=0)
    reached = float((sample - twin.reconstruct(sample)).square().sum())

    def written(sae):
        return sae.reconstruct(sample).double().numpy()

    none = twin.replace(b_dec=torch.zeros_like(twin.b_dec))
    base = written(none.replace(W_dec=torch.zeros_like(twin.W_dec)))
    columns = [written(none) - base]
    for d in range(24):
        axis = torch.zeros_like(twin.b_dec)
        axis[d] = 1
        columns.append(written(none.replace(W_dec=torch.zeros_like(twin.W_dec), b_dec=axis)) - base)
    design = np.stack([column.ravel() for column in columns], 1)
    _, error, _, _ = np.linalg.lstsq(design, (sample.double().numpy() - base).ravel(), rcond=None)
    assert reached == pytest.approx(float(error[0]), rel=1e-4)
    assert fvu(sample, twin.reconstruct(sample)) < 1


@pytest.mark.parametrize("l0", [1.0, 5.2])
def test_an_untrained_topk_sae_uses_as_many_latents_as_the_sae_and_not_as_its_k_allows(oracle, rows, l0):
    twin = untrained_like(oracle.replace(rule=TopKRule(12)), rows.mean(0), rows[:500], l0, seed=0)
    assert twin.encode(rows[:500]).l0() == round(l0)


@pytest.mark.parametrize("l0", [1.0, 3.5, 10.0])
def test_a_threshold_is_found_for_the_l0_asked_for(oracle, rows, l0):
    free = oracle.replace(rule=ReLURule())
    twin = untrained_like(free, rows.mean(0), rows[:500], l0, seed=0)
    assert twin.encode(rows[:500]).l0() == pytest.approx(l0, rel=0.02)


def test_group_rules_keep_their_groups(oracle, rows):
    twin = untrained_like(oracle.replace(rule=GroupMaxRule(4)), rows.mean(0), rows[:100], 4.0, seed=0)
    assert isinstance(twin.rule, GroupMaxRule)
    assert twin.rule.settings() == GroupMaxRule(4).settings()


def test_principal_components_reconstruct_better_the_more_there_are(rows):
    covariance = Covariance(rows.shape[1])
    covariance.update(rows)
    pca = covariance.compute()
    errors = []
    for k in (1, 5, rows.shape[1]):
        made = pca_reconstructor(pca.take(k), {"fitted_on": "these"})
        x_hat, codes = made.forward(rows)
        assert codes is None
        assert (made.l0, made.about["k"]) == (k, k)
        errors.append(float((rows - x_hat).square().sum()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(0, abs=1e-2)
