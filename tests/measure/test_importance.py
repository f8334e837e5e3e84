"""Laws of importance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures.known_saes import random_sae
from saekit.errors import ConfigError, DataError, ShapeError
from saekit.measure.importance import SCORES, ImportanceSums, importance
from saekit.sae.codes import Codes
from saekit.sae.model import SAE

RULES = ("relu", "topk", "jumprelu", "groupmax")
SCALINGS = ("none", "scalar", "standardize", "layer_norm")
N, D = 24, 6


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(200, D, generator=torch.Generator().manual_seed(9)) * 2 + 1


def without(sae: SAE, x: torch.Tensor, latents: list[int]) -> torch.Tensor:
    """Reconstruction with the codes of some latents set to zero."""
    z = sae.encode(x).to_dense()
    z[:, latents] = 0
    return sae.decode(Codes.from_dense(z), x)


def loss(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    return float((x.double() - x_hat.double()).square().sum(1).mean())


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_loss_is_what_removing_the_latent_costs(rule, scaling, x):
    sae = random_sae(rule, scaling, skip=rule == "relu")
    found = importance(sae, x).scores["loss"]
    whole = loss(x, sae.reconstruct(x))
    for latent in range(0, N, 5):
        cost = loss(x, without(sae, x, [latent])) - whole
        assert float(found[latent]) == pytest.approx(cost, rel=1e-4, abs=1e-4)


def test_the_other_scores_are_means_of_the_codes(x):
    sae = random_sae()
    z = sae.encode(x).to_dense().double()
    scores = importance(sae, x).scores
    assert set(scores) == set(SCORES)
    expected = {
        "energy": z.square().mean(0),
        "weighted_energy": z.square().mean(0) * sae.W_dec.double().square().sum(1),
        "frequency": (z != 0).double().mean(0),
        "mean": z.mean(0),
    }
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_weighted_energy_and_loss_do_not_depend_on_the_norms_of_the_decoder(scaling, x):
    sae = random_sae("topk", scaling)
    one, other = importance(sae, x).scores, importance(sae.fold_norms(), x).scores
    for name in ("weighted_energy", "loss", "frequency"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


@given(batch_rows=st.integers(1, 300), rule=st.sampled_from(RULES))
def test_any_batching_gives_the_same_scores(x, batch_rows, rule):
    sae = random_sae(rule)
    once, again = importance(sae, x), importance(sae, x, batch_rows=batch_rows)
    assert once.n_rows == again.n_rows == 200
    for name in SCORES:
        torch.testing.assert_close(once.scores[name], again.scores[name], rtol=1e-5, atol=1e-6)


def test_merged_parts_are_the_whole(x):
    sae = random_sae()
    one, other = ImportanceSums(sae), ImportanceSums(sae)
    one.update(x[:70])
    other.update(x[70:])
    one.merge(other)
    for name, values in importance(sae, x).scores.items():
        torch.testing.assert_close(one.compute().scores[name], values, rtol=1e-5, atol=1e-6)


def test_rows_limit_and_progress(x):
    seen = []
    found = importance(random_sae(), x, max_rows=150, batch_rows=100, progress=lambda *call: seen.append(call))
    assert found.n_rows == 150
    assert seen == [("importance", 100, 150), ("importance", 150, 150)]


def test_importance_refuses(x):
    sae = random_sae()
    with pytest.raises(ShapeError, match="rows must have the width of the SAE, 6; they have 5"):
        importance(sae, x[:, :5])
    with pytest.raises(ConfigError, match="`max_rows` must be a whole number from 1; got 0"):
        importance(sae, x, max_rows=0)
    with pytest.raises(ConfigError, match="`batch_rows` must be a whole number from 1"):
        importance(sae, x, batch_rows=0)
    with pytest.raises(ConfigError, match="must come with those that it predicts"):
        importance(sae.replace(W_dec=sae.W_dec[:, :3], b_dec=sae.b_dec[:3]), x)
    with pytest.raises(DataError, match="none was added"):
        ImportanceSums(sae).compute()
    with pytest.raises(ConfigError, match=r"must name a score; got `energie`. Did you mean `energy`"):
        importance(sae, x).order("energie")
