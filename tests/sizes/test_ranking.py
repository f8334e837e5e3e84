"""Laws of ranking."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from fixtures.known_saes import random_sae
from saekit.errors import ConfigError, DataError, PlaceWarning
from saekit.measure.importance import SCORES, importance
from saekit.rows.arrays import ArrayRows
from saekit.sae.model import SAE
from saekit.sizes.ranking import ORDERS, rank

RULES = ("relu", "topk", "jumprelu", "groupmax")
# Decoder rows of these SAEs differ in length on purpose; that some rankings do not see it has its own test.
pytestmark = pytest.mark.filterwarnings("ignore:the decoder rows of:saekit.errors.PlaceWarning")

N, D = 24, 6


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(200, D, generator=torch.Generator().manual_seed(9)) * 2 + 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("by", ORDERS)
def test_a_ranked_sae_reconstructs_as_before(rule, by, x):
    sae = random_sae(rule)
    torch.testing.assert_close(rank(sae, x, by=by).reconstruct(x), sae.reconstruct(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("by", SCORES)
def test_scores_fall_along_a_ranked_sae(by, x):
    scores = importance(rank(random_sae(), x, by=by), x).scores[by]
    assert bool((scores.diff() <= 1e-6).all())


@pytest.mark.parametrize("by", [*SCORES, "forward", "backward"])
def test_scores_stay_with_the_latents_they_are_of(by, x, tmp_path):
    sae = random_sae()
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
    sae = random_sae().with_scores(stability=stability)
    for rows in (None, x):
        ranked = rank(sae, rows, by="stability")
        assert torch.equal(ranked.scores["stability"], stability.sort(descending=True).values)
        assert torch.equal(ranked.W_enc, sae.W_enc[stability.argsort(descending=True)])
        assert ranked.provenance["latent_order"] == "stability"
    with pytest.raises(ConfigError, match=r"got `stability`.*Stability is written by `saekit compare --write`"):
        rank(random_sae(), x, by="stability")
    with pytest.raises(DataError, match="`stability` of this SAE must not hold NaN"):
        rank(random_sae().with_scores(stability=stability / 0 * 0), by="stability")


def test_ranking_is_written_down(x):
    ranked = rank(random_sae(), ArrayRows(x), by="energy")
    assert ranked.provenance["latent_order"] == "energy"
    ranking = ranked.provenance["ranking"]
    assert ranking["n_rows"] == 200
    assert ranking["digest"].startswith("sha256:")
    shares = list(ranking["share"].values())
    assert shares == sorted(shares)
    assert list(ranking["share"]) == ["1", "2", "4", "8", "16"]
    assert ranked.take(8).provenance["latent_order"] == "energy"


def test_ties_and_the_dead_stay_in_stored_order(x):
    sae = random_sae("relu")
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
    sae = random_sae()
    assert torch.equal(rank(sae, by="random", seed=3).W_enc, rank(sae, by="random", seed=3).W_enc)
    assert not torch.equal(rank(sae, by="random", seed=3).W_enc, rank(sae, by="random", seed=4).W_enc)
    assert rank(sae, by="unsorted") is sae


def test_scores_of_ones_own(x):
    sae = random_sae()
    scores = torch.arange(N) % 5
    ranked = rank(sae, by=scores)
    assert torch.equal(ranked.b_enc, sae.b_enc[scores.argsort(descending=True, stable=True)])
    assert ranked.provenance["latent_order"] == "given"


def test_rank_refuses(x):
    sae = random_sae()
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
    sae = random_sae()
    before = sae.W_dec.clone(), x.clone(), dict(sae.provenance)
    rank(sae, x)
    assert torch.equal(before[0], sae.W_dec)
    assert torch.equal(before[1], x)
    assert sae.provenance == before[2]


@pytest.mark.filterwarnings("default:the decoder rows of:saekit.errors.PlaceWarning")
def test_a_ranking_that_does_not_see_decoder_norms_says_so(x):
    sae = random_sae()
    with pytest.warns(PlaceWarning, match="rank by weighted_energy, or fold_norms"):
        rank(sae, x, by="energy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank(sae.fold_norms(), x, by="energy")
        rank(sae, x, by="weighted_energy")
