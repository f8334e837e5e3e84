"""Laws of pruning: prefixes, greedy selection, refits and thresholds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fixtures.known_saes import random_sae
from saekit.errors import ConfigError, DataError, ShapeError
from saekit.estimators.select import rate_latents
from saekit.measure.accumulators import fvu
from saekit.measure.normal_equations import MOST_LATENTS, NormalEquations, greedy_order
from saekit.rows.arrays import ArrayRows
from saekit.sae.model import SAE
from saekit.sae.rules import JumpReLURule, TopKRule
from saekit.sizes.prune import prune
from saekit.sizes.ranking import ORDERS, rank
from saekit.sizes.settings import PruneSettings
from saekit.store.native import load

# Decoder rows of these SAEs differ in length on purpose; that some rankings do not see it has its own test.
pytestmark = pytest.mark.filterwarnings("ignore:the decoder rows of:saekit.errors.PlaceWarning")

N, D = 20, 6
SIZES = [1, 2, 5, 11, N]
SCALINGS = ("none", "scalar", "standardize", "layer_norm")
ELEMENTWISE = ("relu", "jumprelu")
COMPETING = ("topk", "groupmax")


def make(rule="topk", scaling="none", seed=0, skip=False) -> SAE:
    sae = random_sae(rule, scaling, seed, N, D, skip)
    return sae.replace(W_dec=0.3 * sae.W_dec, provenance={"metrics": {"fvu": 0.1}})


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(400, D, generator=torch.Generator().manual_seed(9)) * 2 + 1


def fvus(saes, x):
    return [fvu(x, sae.reconstruct(x)) for sae in saes]


# ---------------------------------------------------------------- prefixes


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize("rule", ("topk", "jumprelu"))
def test_pruned_saes_are_prefixes_of_the_ranked_one(by, rule, x):
    sae = make(rule)
    ranked = rank(sae, x, by=by)
    for size, small in zip(SIZES, prune(sae, x, sizes=SIZES, by=by), strict=True):
        assert small.n_latents == size
        torch.testing.assert_close(small.reconstruct(x), ranked.take(size).reconstruct(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ELEMENTWISE + COMPETING)
@pytest.mark.parametrize("selection", ["before", "after"])
def test_the_full_size_is_the_original(rule, selection, x):
    sae = make(rule)
    *_, same = prune(sae, x, sizes=[5, N], settings=PruneSettings(selection=selection))
    torch.testing.assert_close(same.reconstruct(x), sae.reconstruct(x), rtol=1e-5, atol=1e-4)
    assert same.rule.name == rule


@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_before_and_after_are_the_same_for_rules_without_competition(rule, x):
    one, other = (
        prune(make(rule), x, sizes=[7], settings=PruneSettings(selection=each))[0] for each in ("before", "after")
    )
    assert torch.equal(one.reconstruct(x), other.reconstruct(x))


@pytest.mark.parametrize("rule", COMPETING)
def test_after_a_competition_every_latent_fires_as_often_as_before_pruning(rule, x):
    sae = make(rule)
    ranked = rank(sae, x)
    (small,) = prune(sae, x, sizes=[8], settings=PruneSettings(selection="after"))
    assert small.rule.name == "jumprelu"
    wanted = torch.bincount(ranked.encode(x).take(8).indices, minlength=8)
    assert torch.equal(torch.bincount(small.encode(x).indices, minlength=8), wanted)


def test_what_was_done_is_written_down_and_saved(x, tmp_path):
    (small,) = prune(make(), ArrayRows(x), sizes=[5], by="weighted-energy", settings=PruneSettings(refit=True))
    assert "metrics" not in small.provenance  # they were about the whole SAE
    done = small.provenance["pruned"]
    assert (done["from"], done["by"], done["selection"], done["refit"]) == (N, "weighted_energy", "before", True)
    small.save(tmp_path)
    assert torch.equal(load(tmp_path).reconstruct(x), small.reconstruct(x))


@pytest.mark.parametrize("batch_rows", [1, 64])
def test_any_batching_prunes_alike(batch_rows, x):
    how = PruneSettings(refit=True, selection="after")
    parts = replace(how, batch_rows=batch_rows)
    whole, cut = (prune(make(), x, sizes=[3, 9], settings=each) for each in (how, parts))
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one.reconstruct(x), other.reconstruct(x), rtol=1e-4, atol=1e-4)


def test_rankings_from_other_controls_need_no_rows():
    small, _ = prune(make(), sizes=[4, 8], by="random", settings=PruneSettings(seed=1))
    assert small.n_latents == 4
    scores = torch.arange(N)
    (top,) = prune(make(), sizes=[3], by=scores)
    assert torch.equal(top.b_enc, make().b_enc[[19, 18, 17]])


# ---------------------------------------------------------------- greedy selection


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_greedy_losses_are_those_of_the_prefixes(scaling, direction, x):
    sae = make("jumprelu", scaling, skip=scaling == "none")
    equations = NormalEquations(N, D)
    equations.update(sae, sae.encode(x), x)
    order, losses = greedy_order(*equations.quadratic(sae), direction)
    ranked = sae.permute(order)
    for size in range(1, N + 1):
        mse = float((x - ranked.take(size).reconstruct(x)).double().square().sum(1).mean())
        assert losses[size] == pytest.approx(mse, rel=1e-4)


def test_each_greedy_step_is_the_best_one(x):
    sae = make("relu")
    equations = NormalEquations(N, D)
    equations.update(sae, sae.encode(x), x)
    Q, a, c = equations.quadratic(sae)

    def loss(kept):
        s = torch.zeros(N, dtype=torch.float64)
        s[list(kept)] = 1
        s = s.numpy()
        return s @ Q @ s - 2 * a @ s + c

    order, losses = greedy_order(Q, a, c, "forward")
    for size in (1, 4, 10):
        before = order[: size - 1].tolist()
        best = min(loss([*before, i]) for i in range(N) if i not in before)
        assert losses[size] == pytest.approx(best)
    order, losses = greedy_order(Q, a, c, "backward")
    for size in (19, 12, 3):
        kept = order[: size + 1].tolist()
        best = min(loss([i for i in kept if i != out]) for out in kept)
        assert losses[size] == pytest.approx(best)


@pytest.mark.parametrize("by", ["forward", "backward"])
@pytest.mark.parametrize("random_weights", [False, True])
def test_fvu_falls_with_the_size_under_greedy_selection(by, random_weights, thresholded, rows, x):
    """As far as latents that help are left; no size is better than the best one."""
    sae, data = (make("relu"), x) if random_weights else (thresholded, rows)
    ranked = rank(sae, data, by=by)
    best = ranked.provenance["ranking"]["best"]
    values = fvus([ranked.take(size) for size in range(1, sae.n_latents + 1)], data)
    assert all(later < earlier for earlier, later in pairwise(values[:best]))
    assert values[best - 1] == min(values)
    assert 0 < best < sae.n_latents


def test_greedy_beats_every_score_where_it_looks_one_ahead(thresholded, rows):
    greedy = fvus(prune(thresholded, rows, by="forward", sizes=[1, 6, 12]), rows)
    for by in ("energy", "frequency", "loss", "random"):
        others = fvus(prune(thresholded, rows, by=by, sizes=[1, 6, 12]), rows)
        assert greedy[0] <= others[0] + 1e-7
        assert greedy[2] <= others[2] + 1e-3


def test_energy_beats_unsorted_and_random(oracle, rows):
    sizes = [6, 12, 24]
    # Features that fire more often, so that some matter more than others.
    weights = torch.linspace(2, 0.2, 48)
    sae = oracle.replace(rule=TopKRule(2))
    skewed = rows[
        torch.multinomial(
            weights[sae.encode(rows).indices[::2][: len(rows)]], 2000, generator=torch.Generator().manual_seed(0)
        )
    ]
    energy, unsorted, random = (
        fvus(prune(sae, skewed, by=by, sizes=sizes), skewed) for by in ("energy", "unsorted", "random")
    )
    assert all(one < other for one, other in zip(energy, random, strict=True))
    assert all(one <= other + 0.01 for one, other in zip(energy, unsorted, strict=True))


# ---------------------------------------------------------------- refit


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rule", ("relu", "topk"))
def test_a_refit_is_the_least_squares_decoder(rule, scaling, x):
    sae = make(rule, scaling, skip=scaling == "scalar")
    plain, fitted = (prune(sae, x, sizes=[7], settings=PruneSettings(refit=each))[0] for each in (False, True))
    assert torch.equal(plain.W_enc, fitted.W_enc)
    if scaling == "none" and rule == "relu":
        z = torch.cat([plain.encode(x).to_dense(), torch.ones(len(x), 1)], 1).double()
        expected = torch.linalg.lstsq(z, x.double()).solution
        torch.testing.assert_close(fitted.W_dec.double(), expected[:-1], rtol=1e-4, atol=1e-4)
    best = fvu(x, fitted.reconstruct(x))
    assert best < fvu(x, plain.reconstruct(x))
    g = torch.Generator().manual_seed(1)
    for _ in range(5):  # no small change of the decoder or its bias does better
        W = fitted.W_dec + 1e-2 * torch.randn(fitted.W_dec.shape, generator=g)
        b = fitted.b_dec + 1e-2 * torch.randn(D, generator=g)
        assert fvu(x, fitted.replace(W_dec=W).reconstruct(x)) > best
        assert fvu(x, fitted.replace(b_dec=b).reconstruct(x)) > best


@pytest.mark.parametrize("rule", ELEMENTWISE)
@pytest.mark.parametrize("by", ["energy", "random", "forward"])
def test_fvu_falls_with_the_size_after_a_refit(rule, by, x):
    values = fvus(prune(make(rule), x, by=by, sizes=range(1, N + 1), settings=PruneSettings(refit=True)), x)
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(values))


def test_dead_latents_keep_their_decoder_rows(x):
    sae = make("jumprelu")
    threshold = sae.rule.threshold.clone()
    threshold[3] = 1e6
    sae = sae.replace(rule=JumpReLURule(threshold))
    (fitted,) = prune(sae, x, sizes=[N], by="unsorted", settings=PruneSettings(refit=True))
    torch.testing.assert_close(fitted.W_dec[3], sae.W_dec[3])
    assert not torch.allclose(fitted.W_dec[4], sae.W_dec[4])


# ---------------------------------------------------------------- thresholds


def test_recalibrated_saes_use_as_many_latents_as_the_whole(x):
    sae = make("jumprelu")
    l0 = sae.encode(x).l0()
    (plain,), (again,) = (prune(sae, x, sizes=[14], settings=PruneSettings(recalibrate=each)) for each in (False, True))
    assert plain.encode(x).l0() < l0 - 0.2
    assert again.encode(x).l0() == pytest.approx(l0, abs=0.02)
    ratio = again.rule.threshold / plain.rule.threshold
    assert float(ratio.min()) == pytest.approx(float(ratio.max()), rel=1e-5)
    assert 0 < float(ratio[0]) < 1


def test_recalibration_goes_as_far_as_it_can(x):
    sae = make("jumprelu")
    (small,) = prune(sae, x, sizes=[2], settings=PruneSettings(recalibrate=True))
    assert small.encode(x).l0() < sae.encode(x).l0()
    assert bool((small.rule.threshold == 0).all())


def test_recalibration_leaves_topk_and_the_full_size_alone(x):
    assert prune(make(), x, sizes=[6], settings=PruneSettings(recalibrate=True))[0].rule.settings() == {"k": 4}
    sae = make("jumprelu")
    (same,) = prune(sae, x, sizes=[N], by="unsorted", settings=PruneSettings(recalibrate=True))
    assert torch.equal(same.rule.threshold, sae.rule.threshold)


def test_recalibration_after_a_competition(x):
    sae = make()
    (small,) = prune(sae, x, sizes=[8], settings=PruneSettings(selection="after", recalibrate=True))
    assert small.encode(x).l0() == pytest.approx(4, abs=0.02)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [N + 1]}, r"must lie within 1\.\.20, .*; got 21. A pruned SAE cannot be larger"),
        ({"sizes": [0, 4]}, r"must lie within 1\.\.20"),
        ({"sizes": []}, "must be whole numbers of latents"),
        ({"sizes": [2.5]}, "must be whole numbers of latents"),
        ({"sizes": [4, 4]}, r"must increase; got \[4, 4\]"),
        ({"sizes": [4], "by": "enrgy"}, "Did you mean `energy`"),
    ],
)
def test_prune_refuses(options, message, x):
    with pytest.raises(ConfigError, match=message):
        prune(make(), x, **options)
    with pytest.raises(ConfigError, match="must be 'before' or 'after'; got 'during'"):
        PruneSettings(selection="during")


def test_prune_needs_rows_for_what_looks_at_rows():
    for options, word in (({"refit": True}, "refit"), ({"selection": "after"}, "selection='after'")):
        with pytest.raises(ConfigError, match=f"{word}.* is computed from rows; got none"):
            prune(make(), sizes=[4], by="random", settings=PruneSettings(**options))
    with pytest.raises(ConfigError, match="is measured on rows; got none"):
        prune(make(), sizes=[4])


def test_relu_has_no_thresholds(x):
    with pytest.raises(ConfigError, match="a ReLU SAE has none"):
        prune(make("relu"), x, sizes=[4], settings=PruneSettings(recalibrate=True))


def test_other_rows(x):
    with pytest.raises(ShapeError, match="rows must have the width of the SAE, 6; they have 4"):
        prune(make(), x[:, :4], sizes=[4])


def test_an_empty_source():
    class Empty:
        d_in, n_rows, info = D, 0, {}

        def batches(self, batch_rows, *, seed=None, start=(0, 0)):
            return iter(())

    for by, how in (
        ("energy", PruneSettings()),
        ("forward", PruneSettings()),
        ("random", PruneSettings(selection="after")),
        ("random", PruneSettings(refit=True)),
    ):
        with pytest.raises(DataError, match="at least one row"):
            prune(make(), Empty(), sizes=[4], by=by, settings=how)


def test_a_table_of_all_pairs_has_a_limit():
    with pytest.raises(ConfigError, match="at most 16,384 latents"):
        NormalEquations(MOST_LATENTS + 1, 4)


def test_a_cut_through_latents_without_importance_is_refused(x):
    sae = make("relu")
    dead = sae.replace(b_enc=torch.where(torch.arange(N) < 5, sae.b_enc, torch.tensor(-1e6)))
    assert [each.n_latents for each in prune(dead, x, sizes=[2, 5, N])] == [2, 5, N]
    message = r"prune: 7 latents cannot be chosen by `energy`: only 5 have .* Ask for at most 5, or for all 20"
    with pytest.raises(ConfigError, match=message):
        prune(dead, x, sizes=[2, 7])
    ranked = rank(dead, x)
    with pytest.raises(ConfigError, match=message):
        prune(ranked, by="unsorted", sizes=[7])
    with pytest.raises(ConfigError, match=r"6 latents cannot be chosen by `given`.* or rank by something else"):
        prune(dead, by=(torch.arange(N) < 5).double(), sizes=[6])
    scored = dead.with_scores(stability=torch.zeros(N), alignment=torch.arange(float(N)))
    with pytest.raises(ConfigError, match=r"only 0 have .* Ask for all 20, or rank by `alignment`"):
        prune(scored, by="stability", sizes=[6])
    assert prune(dead, x, by="random", sizes=[7])[0].n_latents == 7
    assert prune(dead, sizes=[7], by="unsorted")[0].n_latents == 7
    prune(dead, by=torch.arange(N) - 4.0, sizes=[15, 16, 17])  # one latent scores 0, but nothing is tied with it


def test_relevance_to_a_class_is_an_importance(x):
    sae = make("relu")
    codes = sae.encode(x)
    label = (codes.to_dense()[:, 7] > codes.to_dense()[:, 7].median()).long().numpy()
    relevance, _ = rate_latents(codes.to_scipy(), label, 2, "auc")
    (one,) = prune(sae, by=torch.from_numpy(relevance), sizes=[1])
    assert torch.equal(one.W_dec[0], sae.W_dec[7])
