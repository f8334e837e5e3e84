"""Laws of consensus SAEs."""

from __future__ import annotations

import pytest
import torch

from saekit import TopK, compare, evaluate, train
from saekit.comparison.consensus import consensus
from saekit.comparison.settings import ComparisonSettings, ConsensusSettings
from saekit.errors import ConfigError, DataError, ShapeError
from saekit.evaluation.settings import EvaluationSettings
from saekit.sae.model import SAE
from saekit.sae.rules import GroupMaxRule, JumpReLURule, ReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.training.settings import TrainSettings


def order_of(n: int, seed: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def noisy(sae: SAE, size: float, seed: int) -> SAE:
    g = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (W + size * torch.randn(W.shape, generator=g) for W in (sae.W_enc, sae.W_dec))
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    return sae.replace(W_enc=W_enc, W_dec=W_dec, provenance={"seed": seed}).permute(order_of(sae.n_latents, seed))


@pytest.mark.parametrize("rule", ["topk", "jumprelu", "relu"])
def test_consensus_of_identical_copies_is_the_sae(rule, oracle, rows):
    rules = {"topk": TopKRule(2), "jumprelu": JumpReLURule(torch.linspace(0.3, 0.9, 48)), "relu": ReLURule()}
    sae = oracle.replace(rule=rules[rule], b_enc=torch.linspace(-0.1, 0.1, 48))
    copies = [sae, sae.permute(order_of(48, 1)), sae.permute(order_of(48, 2))]
    for found in (consensus(copies, settings=ConsensusSettings(fill=False)), consensus(copies, rows)):
        assert found.n_latents == 48
        torch.testing.assert_close(found.reconstruct(rows), sae.reconstruct(rows), rtol=1e-4, atol=1e-5)
        assert compare([found, sae], settings=ComparisonSettings(controls=False)).shared.value == 1
        assert found.scores["stability"].tolist() == [1.0] * 48
    energy = found.scores["energy"]
    assert bool((energy.diff() <= 0).all())
    assert found.provenance["consensus"]["pooled"] == 48


def test_the_order_of_the_seeds_does_not_matter(oracle, rows):
    family = [noisy(oracle, 0.05, seed) for seed in range(3)]
    one, other = consensus(family, rows), consensus([family[2], family[0], family[1]], rows)
    torch.testing.assert_close(one.W_dec, other.W_dec)
    torch.testing.assert_close(one.reconstruct(rows[:100]), other.reconstruct(rows[:100]))


def test_means_of_noisy_copies_are_nearer_to_the_truth(oracle, rows):
    family = [noisy(oracle, 0.06, seed) for seed in range(4)]
    found = consensus(family, rows)
    fvus = [
        entry.metrics.fvu.value
        for entry in evaluate(
            [found, *family], rows, settings=EvaluationSettings(controls=False, intervals=False)
        ).entries
    ]
    assert fvus[0] < min(fvus[1:])
    assert found.W_dec.norm(dim=1).tolist() == pytest.approx([1.0] * 48, abs=1e-5)
    assert compare([found, oracle], settings=ComparisonSettings(controls=False)).mean_cosine.value > max(
        compare([sae, oracle], settings=ComparisonSettings(controls=False)).mean_cosine.value for sae in family
    )


@pytest.fixture(scope="module")
def partly(oracle) -> list[SAE]:
    """Three SAEs that share 30 of their latents; the rest are their own."""
    saes = []
    for seed in range(3):
        own = torch.randn(18, 24, generator=torch.Generator().manual_seed(seed))
        W = torch.cat([oracle.W_dec[:30], own / own.norm(dim=1, keepdim=True)])
        saes.append(oracle.replace(W_enc=W, W_dec=W, provenance={"seed": seed}))
    return saes


def test_what_is_pooled_and_what_fills(partly, rows):
    pooled = consensus(partly, rows, settings=ConsensusSettings(fill=False))
    assert pooled.n_latents == pooled.provenance["consensus"]["pooled"] == 30
    small = consensus(partly, rows, settings=ConsensusSettings(size=10))
    assert torch.equal(small.W_dec, pooled.W_dec[:10])
    filled = consensus(partly, rows, settings=ConsensusSettings(size=48))
    assert filled.provenance["consensus"] == pooled.provenance["consensus"] | {"filled": 18}
    assert torch.equal(filled.W_dec[:30], pooled.W_dec)
    cosines = filled.W_dec @ filled.W_dec.T - 2 * torch.eye(48)
    assert float(cosines[30:].max()) <= 0.7 + 1e-6
    assert filled.scores["stability"].tolist() == [1.0] * 30 + [0.0] * 18
    assert bool((filled.scores["energy"][30:].diff() <= 0).all())
    scored = [sae.with_scores(energy=range(48)) for sae in partly]
    assert consensus(scored, settings=ConsensusSettings(size=48)).n_latents == 48
    assert pooled.provenance["consensus"]["of"][2]["seed"] == 2
    assert (
        consensus(
            partly,
            rows,
            comparison=compare(partly, settings=ComparisonSettings(controls=False)),
            settings=ConsensusSettings(min_seeds=3, fill=False),
        ).n_latents
        == 30
    )


def test_a_refit_lowers_the_error(synthetic, rows, tmp_path):
    saes = train(
        TopK(48, k=2, lr=1e-2), synthetic, seeds=[0, 1, 2], tokens=40_000, settings=TrainSettings(batch_rows=128)
    )
    plain = consensus(saes, synthetic, settings=ConsensusSettings(threshold=0.6))
    fitted = consensus(saes, synthetic, settings=ConsensusSettings(threshold=0.6, refit=12_800, batch_rows=128))
    fvu = [
        e.metrics.fvu.value
        for e in evaluate(
            [plain, fitted, *saes], rows, settings=EvaluationSettings(controls=False, intervals=False)
        ).entries
    ]
    assert fvu[1] < fvu[0]
    assert fvu[1] < max(fvu[2:])
    assert fitted.provenance["consensus"]["refit_rows"] == 12_800
    assert "seed" not in fitted.provenance
    assert fitted.scores.keys() == {"stability", "energy"}
    fitted.save(tmp_path / "c")
    assert torch.equal(SAE.load(tmp_path / "c").scores["stability"], fitted.scores["stability"])
    assert (
        "consensus"
        in evaluate(fitted, rows, settings=EvaluationSettings(controls=False, intervals=False)).entries[0].name
    )


def test_what_is_refused(partly, oracle, rows):
    other = oracle.replace(rule=TopKRule(3))
    for saes, options, message in (
        (partly[:1], {}, "at least two SAEs"),
        (partly, {"min_seeds": 4}, "`min_seeds` must be 2 to the number of SAEs, 3; got 4"),
        (partly, {"size": 0}, "`size` must be a whole number from 1; got 0"),
        (partly, {"size": 31, "fill": False}, "at most the 30 concepts that 2 SAEs have; got 31"),
        (partly, {"size": 500}, "`size` must be at most 8., the different directions"),
        ([oracle, other], {}, "all SAEs must have one rule"),
        ([sae.replace(rule=GroupMaxRule(2)) for sae in partly], {}, "one without groups"),
        ([sae.replace(W_skip=torch.zeros(24, 24)) for sae in partly], {}, "must have no skip path"),
        (partly, {"refit": 4096}, "its provenance has none"),
        (
            partly,
            {"comparison": compare(partly[::-1], settings=ComparisonSettings(controls=False))},
            "must be of these SAEs, in this order",
        ),
    ):
        comparison = options.pop("comparison", None)
        with pytest.raises(ConfigError, match=message):
            consensus(saes, rows, comparison=comparison, settings=ConsensusSettings(**options))
    with pytest.raises(ConfigError, match="must scale rows alike"):
        consensus([oracle, oracle.replace(scaling=Scaling("scalar", scale=torch.tensor(2.0)))], rows)
    with pytest.raises(ConfigError, match="`fill` takes latents by energy; got no rows"):
        consensus(partly)
    with pytest.raises(ConfigError, match="`refit` trains on rows; got none"):
        consensus(partly, settings=ConsensusSettings(refit=4096))
    g = torch.Generator().manual_seed(0)
    unlike = [oracle.replace(W_enc=W, W_dec=W) for W in torch.randn(2, 48, 24, generator=g)]
    with pytest.raises(ConfigError, match="there must be a concept that 2 of the SAEs have; there is none"):
        consensus(unlike, rows, settings=ConsensusSettings(threshold=0.99))
    with pytest.raises(ShapeError, match="width"):
        consensus(partly, rows[:, :3])
    config = {"arch": "topk", "latents": 48, "k": 2}
    known = [sae.replace(provenance={"config": config}) for sae in partly]
    with pytest.raises(DataError, match="`refit` must be at least one batch of 4096 rows; got 10"):
        consensus(known, rows, settings=ConsensusSettings(refit=10))
