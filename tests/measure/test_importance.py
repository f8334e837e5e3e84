"""Laws of importance, ranking and the power law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import ConfigError, DataError, ShapeError
from saekit.measure.importance import SCORES, ImportanceSums, importance
from saekit.rows.arrays import ArrayRows
from saekit.sae.codes import Codes
from saekit.sae.model import SAE
from saekit.sae.rules import GroupMaxRule, JumpReLURule, ReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.sizes.power_law import decoder_spectrum, power_law
from saekit.sizes.ranking import ORDERS, rank

RULES = ("relu", "topk", "jumprelu", "groupmax")
SCALINGS = ("none", "scalar", "standardize", "layer_norm")
N, D = 24, 6


def make(rule="topk", scaling="none", seed=0, n=N, skip=False) -> SAE:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=g)

    rules = {
        "relu": ReLURule(),
        "topk": TopKRule(4),
        "jumprelu": JumpReLURule(rand(n).abs()),
        "groupmax": GroupMaxRule(4),
    }
    scalings = {
        "none": Scaling(),
        "scalar": Scaling("scalar", scale=torch.tensor(0.5)),
        "standardize": Scaling("standardize", scale=rand(D).abs() + 0.5, mean=rand(D)),
        "layer_norm": Scaling("layer_norm"),
    }
    return SAE(
        W_enc=rand(n, D), b_enc=rand(n), W_dec=rand(n, D) * (0.5 + torch.rand(n, 1, generator=g)), b_dec=rand(D),
        b_pre=rand(D), rule=rules[rule], scaling=scalings[scaling], W_skip=0.1 * rand(D, D) if skip else None,
    )  # fmt: skip


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
    sae = make(rule, scaling, skip=rule == "relu")
    found = importance(sae, x).scores["loss"]
    whole = loss(x, sae.reconstruct(x))
    for latent in range(0, N, 5):
        cost = loss(x, without(sae, x, [latent])) - whole
        assert float(found[latent]) == pytest.approx(cost, rel=1e-4, abs=1e-4)


def test_the_other_scores_are_means_of_the_codes(x):
    sae = make()
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
    sae = make("topk", scaling)
    one, other = importance(sae, x).scores, importance(sae.fold_norms(), x).scores
    for name in ("weighted_energy", "loss", "frequency"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


@given(batch_rows=st.integers(1, 300), rule=st.sampled_from(RULES))
def test_any_batching_gives_the_same_scores(x, batch_rows, rule):
    sae = make(rule)
    once, again = importance(sae, x), importance(sae, x, batch_rows=batch_rows)
    assert once.n_rows == again.n_rows == 200
    for name in SCORES:
        torch.testing.assert_close(once.scores[name], again.scores[name], rtol=1e-5, atol=1e-6)


def test_merged_parts_are_the_whole(x):
    sae = make()
    one, other = ImportanceSums(sae), ImportanceSums(sae)
    one.update(x[:70])
    other.update(x[70:])
    one.merge(other)
    for name, values in importance(sae, x).scores.items():
        torch.testing.assert_close(one.compute().scores[name], values, rtol=1e-5, atol=1e-6)


def test_rows_limit_and_progress(x):
    seen = []
    found = importance(make(), x, max_rows=150, batch_rows=100, progress=lambda *call: seen.append(call))
    assert found.n_rows == 150
    assert seen == [("importance", 100, 150), ("importance", 150, 150)]


def test_importance_refuses(x):
    sae = make()
    with pytest.raises(ShapeError, match="rows must have the width of the SAE, 6; they have 5"):
        importance(sae, x[:, :5])
    with pytest.raises(ConfigError, match="`max_rows` must be at least 1; got 0"):
        importance(sae, x, max_rows=0)
    with pytest.raises(ConfigError, match="`batch_rows` must be at least 1"):
        importance(sae, x, batch_rows=0)
    with pytest.raises(ShapeError, match="it maps 6 to 3"):
        importance(sae.replace(W_dec=sae.W_dec[:, :3], b_dec=sae.b_dec[:3]), x)
    with pytest.raises(DataError, match="none was added"):
        ImportanceSums(sae).compute()
    with pytest.raises(ConfigError, match=r"must name a score; got `energie`. Did you mean `energy`"):
        importance(sae, x).order("energie")


# ---------------------------------------------------------------- ranking


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("by", ORDERS)
def test_a_ranked_sae_reconstructs_as_before(rule, by, x):
    sae = make(rule)
    torch.testing.assert_close(rank(sae, x, by=by).reconstruct(x), sae.reconstruct(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("by", SCORES)
def test_scores_fall_along_a_ranked_sae(by, x):
    scores = importance(rank(make(), x, by=by), x).scores[by]
    assert bool((scores.diff() <= 1e-6).all())


@pytest.mark.parametrize("by", [*SCORES, "forward", "backward"])
def test_scores_stay_with_the_latents_they_are_of(by, x, tmp_path):
    sae = make()
    ranked = rank(sae, x, by=by)
    assert bool((ranked.scores[by].diff() <= 0).all())
    if by in SCORES:
        found = importance(ranked, x).scores
        assert ranked.scores.keys() == found.keys()
        for name, score in found.items():
            torch.testing.assert_close(ranked.scores[name], score.float())
    ranked.take(10).save(tmp_path)
    assert torch.equal(SAE.load(tmp_path, latents=5).scores[by], ranked.scores[by][:5])
    again = rank(ranked.permute(torch.arange(N - 1, -1, -1)), by=by)  # no rows: by what it carries
    assert torch.equal(again.scores[by], ranked.scores[by])


def test_rank_by_a_score_that_the_sae_carries(x):
    stability = torch.rand(N, generator=torch.Generator().manual_seed(0))
    sae = make().with_scores(stability=stability)
    for rows in (None, x):
        ranked = rank(sae, rows, by="stability")
        assert torch.equal(ranked.scores["stability"], stability.sort(descending=True).values)
        assert torch.equal(ranked.W_enc, sae.W_enc[stability.argsort(descending=True)])
        assert ranked.provenance["latent_order"] == "stability"
    with pytest.raises(ConfigError, match=r"got `stability`.*Stability is written by `saekit compare --write`"):
        rank(make(), x, by="stability")
    with pytest.raises(DataError, match="`stability` of this SAE must not hold NaN"):
        rank(make().with_scores(stability=stability / 0 * 0), by="stability")


def test_ranking_is_written_down(x):
    ranked = rank(make(), ArrayRows(x), by="energy")
    assert ranked.provenance["latent_order"] == "energy"
    ranking = ranked.provenance["ranking"]
    assert ranking["n_rows"] == 200
    assert ranking["digest"].startswith("sha256:")
    shares = list(ranking["share"].values())
    assert shares == sorted(shares)
    assert list(ranking["share"]) == ["1", "2", "4", "8", "16"]
    assert ranked.take(8).provenance["latent_order"] == "energy"


def test_ties_and_the_dead_stay_in_stored_order(x):
    sae = make("relu")
    dead = torch.zeros(N, dtype=torch.bool)
    dead[[2, 3, 11, 20]] = True
    sae = sae.replace(
        W_enc=torch.where(dead[:, None], 0.0, sae.W_enc),
        b_enc=torch.where(dead, torch.linspace(-1, -2, N), sae.b_enc),
    )
    for by in SCORES:
        last = rank(sae, x, by=by).b_enc[-4:]
        if by != "loss":  # a latent that only hurts comes after the dead
            assert torch.equal(last, sae.b_enc[dead])
    assert rank(sae, x).provenance["ranking"]["alive"] == int((importance(sae, x).scores["frequency"] > 0).sum())


def test_random_order_is_of_its_seed_and_unsorted_is_the_same(x):
    sae = make()
    assert torch.equal(rank(sae, by="random", seed=3).W_enc, rank(sae, by="random", seed=3).W_enc)
    assert not torch.equal(rank(sae, by="random", seed=3).W_enc, rank(sae, by="random", seed=4).W_enc)
    assert rank(sae, by="unsorted") is sae


def test_scores_of_ones_own(x):
    sae = make()
    scores = torch.arange(N) % 5
    ranked = rank(sae, by=scores)
    assert torch.equal(ranked.b_enc, sae.b_enc[scores.argsort(descending=True, stable=True)])
    assert ranked.provenance["latent_order"] == "given"


def test_rank_refuses(x):
    sae = make()
    with pytest.raises(
        ConfigError, match=r"`by` must be an importance or a score .*; got `energyy`. Did you mean `energy`"
    ):
        rank(sae, x, by="energyy")
    with pytest.raises(ConfigError, match=r"one number per latent, \(24,\); got \(3,\)"):
        rank(sae, x, by=torch.ones(3))
    with pytest.raises(DataError, match="must not hold NaN"):
        rank(sae, by=torch.full((N,), math.nan))
    with pytest.raises(ConfigError, match="importance by `energy` is measured on rows; got none"):
        rank(sae)


def test_nothing_given_is_changed(x):
    sae = make()
    before = sae.W_dec.clone(), x.clone(), dict(sae.provenance)
    rank(sae, x)
    assert torch.equal(before[0], sae.W_dec)
    assert torch.equal(before[1], x)
    assert sae.provenance == before[2]


# ---------------------------------------------------------------- power law


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
    assert {rival.name: rival.log_ratio for rival in found.rivals}["lognormal"] < 0.5


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
    sae = make()
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
