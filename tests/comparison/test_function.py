"""Whether partners do the same: planted copies do, exchanged partners do not, and a model agrees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import torch

from saekit import TopK, compare, train
from saekit.comparison.function import FUNCTION, Partners, _matched, exchanged, substituted
from saekit.comparison.result import FUNCTION_ROWS, Comparison
from saekit.comparison.settings import ComparisonSettings, FunctionSettings
from saekit.errors import ConfigError
from saekit.matching.matching import match_latents
from saekit.measure.accumulators import fvu
from saekit.measure.weight_scores import weight_scores
from saekit.rows.arrays import ArrayRows
from saekit.rows.synthetic import SyntheticRows
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.sae.scaling import Scaling

PLAIN = ComparisonSettings(controls=False)


@pytest.fixture(scope="module")
def pair():
    """Two seeds and rows of sparse mixtures."""
    rows = SyntheticRows(n_rows=4096, d_in=24, n_features=48, l0=4)
    return train(TopK(n_latents=48, k=4), rows, tokens=60_000, seeds=[0, 1], progress=False), rows


@pytest.fixture(scope="module")
def compared(pair):
    return compare(pair[0], pair[1], settings=PLAIN, progress=False)


def test_the_same_latents_in_another_order_do_the_same(pair):
    saes, rows = pair
    found = compare([saes[0], saes[0].permute(torch.arange(47, -1, -1))], rows, settings=PLAIN).function
    assert found["fvu_partners"].value == pytest.approx(found["fvu_own"].value, rel=1e-5)
    assert found["fvu_recovered"].value == pytest.approx(1, abs=1e-5)
    for name in ("top_overlap", "coactivation", "coactivation_best", "coactivation_agrees"):
        assert found[name].value == pytest.approx(1, abs=1e-6), name
    assert found["top_overlap_random"].value < 0.3
    assert found["coactivation_random"].value < 0.3
    assert found["fvu_random"].value > 2 * found["fvu_own"].value


def test_fvu_of_a_substitution_is_that_of_the_sae_with_other_rows(pair, compared):
    (one, other), rows = pair
    x = torch.cat([batch.x for batch in rows.batches(4096)])
    matching = match_latents(one.W_dec, other.W_dec)
    assert compared.function["fvu_own"].value == pytest.approx(fvu(x, one.reconstruct(x)), rel=1e-5)
    swapped = one.replace(W_dec=other.W_dec[matching.partner])  # both have rows of length 1
    assert compared.function["fvu_partners"].value == pytest.approx(fvu(x, swapped.reconstruct(x)), rel=1e-5)


@pytest.mark.parametrize("n", [39, 40])
def test_there_is_an_interval_from_forty_documents_on(pair, n):
    x = next(pair[1].batches(400)).x
    rows = ArrayRows(x, document=torch.arange(len(x)) % n)
    found = compare(pair[0], rows, settings=PLAIN, progress=False).function
    for name in ("fvu_own", "fvu_partners", "fvu_random", "fvu_recovered"):
        assert (found[name].low is not None) == (n == 40), name


def test_lengths_of_the_decoder_rows_stay():
    one, other = (torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    zero = torch.zeros(6)

    def sae(W):
        return SAE(W_enc=W, b_enc=zero, W_dec=W, b_dec=zero[:4], rule=TopKRule(2))

    found = substituted(sae(one), sae(3 * other), np.array([0, 2]), np.array([5, 1])).W_dec
    assert torch.allclose(found.norm(dim=1), one.norm(dim=1))
    assert torch.allclose(torch.cosine_similarity(found[[0, 2]], other[[5, 1]]), torch.ones(2))
    assert torch.equal(found[[1, 3, 4, 5]], one[[1, 3, 4, 5]])


def test_exchanged_partners_are_others_of_about_the_same_frequency():
    theirs, frequency = np.arange(100) + 7, np.linspace(0, 1, 100) ** 2
    for each in (exchanged(theirs, 0), exchanged(theirs, 0, frequency)):
        assert sorted(each) == sorted(theirs)
        assert (each != theirs).all()
    gaps = [abs(frequency[each - 7] - frequency) for each in (exchanged(theirs, 0), exchanged(theirs, 0, frequency))]
    assert gaps[1].max() < 0.5 * gaps[0].max()
    matching = match_latents(torch.eye(3), torch.eye(3))
    assert (Partners.of(matching, 1).random != Partners.of(matching, 1).theirs).all()


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_the_matching_by_firing_together_is_the_best_one(shape):
    from scipy.optimize import linear_sum_assignment

    table = np.random.default_rng(0).random(shape)
    table[table < 0.6] = 0
    mate = _matched(scipy.sparse.csr_matrix(table))
    rows, columns = linear_sum_assignment(table, maximize=True)
    matched = np.flatnonzero(mate >= 0)
    assert len(set(mate[matched])) == len(matched)
    assert table[matched, mate[matched]].sum() == pytest.approx(table[rows, columns].sum(), abs=1e-6)


def test_numbers_go_through_the_file_and_have_a_meaning(compared, tmp_path):
    compared.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == compared
    assert set(compared.function) <= set(FUNCTION)
    assert {name for names in FUNCTION_ROWS.values() for name in names if name} <= set(FUNCTION)
    words = [line[0] for line in compared.function_table()]
    assert "same top rows" in words
    assert "ablation moves the model alike" not in words  # there was no model


def test_pw_mcc_is_the_mean_cosine_of_the_best_matching(pair, compared):
    from scipy.optimize import linear_sum_assignment

    one, other = pair[0]
    cosine = torch.nn.functional.normalize(one.W_dec) @ torch.nn.functional.normalize(other.W_dec).T
    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    assert compared.pw_mcc.value == pytest.approx(float(cosine[rows, columns].mean()), abs=1e-6)
    assert compared.pw_mcc_alive.value >= compared.pw_mcc.value - 1e-9
    assert compared.max_absolute_cosine.value >= compared.pw_mcc.value
    old = compared.to_json() | {"schema": 4}
    old["pw_mcc"] = old.pop("max_absolute_cosine")
    for name in ("pw_mcc_null", "pw_mcc_alive", "predictors", "function"):
        del old[name]
    for each in old["pairs"]:
        del each["function"]
        for side in ("decoder", "encoder"):
            each[side]["pw_mcc"] = each[side].pop("max_absolute_cosine")
    read = Comparison.from_json(old)
    assert read.pw_mcc == compared.mean_cosine
    assert read.max_absolute_cosine == compared.max_absolute_cosine


def test_what_one_sae_says_about_stability(pair, compared):
    from scipy.stats import spearmanr

    (one, other), _ = pair
    expected = [
        spearmanr(weight_scores(sae)["alignment_self"], each.stability).statistic
        for sae, each in zip((one, other), compared.saes, strict=True)
    ]
    assert compared.predictors["alignment_self"].value == pytest.approx(np.mean(expected))
    assert compared.saes[0].alignment_self == pytest.approx(weight_scores(one)["alignment_self"].tolist(), abs=1e-6)
    assert set(compared.predictors) == {"alignment_self", "encoder_norm", "frequency"}


# ------------------------------------------------------------------------------------------------- in a language model


def _sae(scale: float | None, seed: int = 0) -> SAE:
    W = torch.nn.functional.normalize(torch.randn(32, 16, generator=torch.Generator().manual_seed(seed)))
    scaling = Scaling() if scale is None else Scaling("scalar", scale=torch.tensor(scale))
    return SAE(
        W_enc=W, b_enc=torch.zeros(32), W_dec=W, b_dec=torch.zeros(16), rule=TopKRule(4), scaling=scaling,
        provenance={"hook": "layers.1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def spoken(models, rows_of_model):
    one = _sae(2.0)
    settings = FunctionSettings(tokens=120, latents=8, tops=4, context=16)
    return compare(
        [one, one.permute(torch.randperm(32, generator=torch.Generator().manual_seed(1)))],
        rows_of_model, model=models["llama"], data=list(_TEXTS), settings=PLAIN, function=settings,
    )  # fmt: skip


_TEXTS = ["the cat sat on a mat and then it saw one big dog run past two old trees", "my house saw the dog today"] * 6


@pytest.fixture(scope="module")
def rows_of_model(models):
    from saekit import capture

    return capture(models["llama"], list(_TEXTS), layer=1)


def test_the_same_latents_move_the_model_alike(spoken):
    found = spoken.function
    assert found["ce_partners"].value == pytest.approx(found["ce_own"].value, abs=1e-5)
    assert found["ce_random"].value != pytest.approx(found["ce_own"].value, abs=1e-4)
    assert found["fingerprint"].value == pytest.approx(1, abs=1e-5)
    assert found["fingerprint_random"].value < 0.9
    assert found["fingerprint_ceiling"].value <= 1


def test_a_fingerprint_is_the_change_by_ablation(models, rows_of_model):
    """Against a plain loop: each token by itself, the whole context, rows in their own units."""
    from saekit.comparison.fingerprints import _Fingerprints
    from saekit.measure.fidelity import SplicedModel
    from saekit.measure.settings import TextSettings
    from saekit.models.intervene import splice

    sae, lm = _sae(2.0), models["llama"]
    settings = FunctionSettings(tokens=100, latents=4, tops=3, context=12)
    spliced = SplicedModel.of(lm, list(_TEXTS), [sae], rows_of_model, TextSettings(tokens=100), "compare")
    prints = _Fingerprints([sae], spliced, settings)
    latent = int(prints.seen[0].fires().argmax())
    prints._make(0, np.array([latent]))
    contexts, halves = prints.contexts, torch.zeros(2, 40)
    for number, token in enumerate(prints.seen[0].top(latent, 3)):
        at = int(np.searchsorted(contexts.offsets, token, side="right")) - 1
        ids = torch.tensor(contexts.ids[contexts.offsets[at] : contexts.offsets[at + 1]])[None].long()
        place = int(token - contexts.offsets[at])
        logits = []
        for ablate in (False, True):

            def changed(rows, ablate=ablate, place=place):
                codes = sae.encode(rows).to_dense()[place, latent]
                rows = rows.clone()
                rows[place] -= ablate * codes * sae.W_dec[latent] / 2.0
                return rows

            with torch.no_grad(), splice(lm, "layers.1", changed):
                logits.append(lm.model(input_ids=ids).logits[0, place].log_softmax(0))
        halves[number % 2] += logits[1] - logits[0]
    halves /= torch.tensor([[2.0], [1.0]])
    assert float(halves.abs().max()) > 1e-3
    assert torch.allclose(prints.made[0, latent], halves, atol=2e-5)


def test_what_is_refused(pair, models):
    saes = pair[0]
    with pytest.raises(ConfigError, match="`model` must come with `rows`"):
        compare(saes, model=models["llama"], data=["a"])
    for name in ("tokens", "latents", "tops", "context", "pairs"):
        with pytest.raises(ConfigError, match=f"`{name}`"):
            FunctionSettings(**{name: 0})
    with pytest.raises(ConfigError, match="Did you mean `latents`"):
        FunctionSettings(latent=3)
    bert = ArrayRows(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ConfigError, match="must predict next tokens"):
        compare([_sae(None), _sae(None, 1)], bert, model=models["bert"], data=["the cat"])
    assert not math.isnan(compare(saes, settings=PLAIN).pw_mcc.value)
