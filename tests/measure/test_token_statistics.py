"""Laws of the interpretability scores: tokens, chance, held-out detection, cohesion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from saekit.errors import ConfigError, DataError, ShapeError
from saekit.measure import token_statistics
from saekit.measure.chance import against_chance
from saekit.measure.token_statistics import Cohesion, TokenScores, labels_of, shifted, token_detection
from saekit.sae.codes import Codes

N, LATENTS, VOCAB = 400, 12, 30


def random_rows(seed=0, n=N, density=0.2):
    """Dense codes, tokens and documents; the last latent is dead."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(n, LATENTS, generator=generator) * (torch.rand(n, LATENTS, generator=generator) < density)
    z[:, -1] = 0
    token = (VOCAB * torch.rand(n, generator=generator) ** 2).long()
    return z, token.int(), torch.arange(n) // 10


def scores_of(z, token, document=None, cuts=(), n_vocab=VOCAB):
    scores = TokenScores(z.shape[1], n_vocab)
    for part in np.split(np.arange(len(z)), cuts):
        scores.update(Codes.from_dense(z[part]), token[part], None if document is None else document[part])
    return scores


def same(one, other):
    for name, value in one.named().items():
        torch.testing.assert_close(value, other.named()[name], rtol=1e-10, atol=1e-12, equal_nan=True)


def test_scores_are_their_formulas():
    z, token, document = random_rows()
    found = scores_of(z, token, document).compute()
    for latent in range(LATENTS - 1):
        a = z[:, latent].double().numpy()
        p = np.array([a[token == t].sum() for t in range(VOCAB)]) / a.sum()
        q = np.array([a[document == d].sum() for d in range(40)]) / a.sum()
        u = np.bincount(token.numpy(), minlength=VOCAB) / N
        seen = p > 0
        correction = (seen.sum() - 1) / (2 * a.sum() ** 2 / (a**2).sum())
        entropy = -(p[seen] * np.log(p[seen])).sum() + correction
        assert found.purity[latent] == pytest.approx(p.max())
        assert found.entropy[latent] == pytest.approx(min(entropy, math.log((u > 0).sum())))
        lift = (p[seen] * np.log(p[seen] / u[seen])).sum() - correction
        assert found.lift[latent] == pytest.approx(max(lift, 0), abs=1e-9)
        assert found.spread[latent] == pytest.approx(1 / (q**2).sum())
        assert found.fires[latent] == (a > 0).sum()
    assert found.fires[-1] == 0
    assert all(math.isnan(each[-1]) for each in (found.purity, found.entropy, found.lift, found.spread))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, N), max_size=4), st.integers(0, 3))
def test_any_batching_and_any_merge_give_the_same(cuts, seed):
    z, token, document = random_rows(seed)
    whole = scores_of(z, token, document)
    parts = scores_of(z, token, document, sorted(cuts))
    same(whole.compute(), parts.compute())
    half = N // 3
    merged = scores_of(z[:half], token[:half], document[:half], n_vocab=None)
    merged.merge(scores_of(z[half:], token[half:], document[half:], n_vocab=None))
    same(whole.compute(), merged.compute())
    assert [[t for t, _ in each] for each in whole.top_tokens()] == [
        [t for t, _ in each] for each in merged.top_tokens()
    ]


def test_waiting_pairs_are_added_when_there_are_many(monkeypatch):
    z, token, document = random_rows()
    whole = scores_of(z, token, document).compute()
    monkeypatch.setattr(token_statistics, "PENDING", 50)
    scores = scores_of(z, token, document, range(20, N, 20))
    assert sum(len(keys) for keys, _ in scores._tokens._waiting) <= max(50, len(scores._tokens._keys))
    same(whole, scores.compute())


def test_a_permuted_sae_gives_permuted_scores_and_scaled_codes_the_same():
    z, token, document = random_rows()
    order = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(1))
    plain, permuted = scores_of(z, token, document).compute(), scores_of(z[:, order], token, document).compute()
    for name, value in plain.named().items():
        torch.testing.assert_close(value[order], permuted.named()[name], equal_nan=True)
    same(plain, scores_of(4.0 * z, token, document).compute())


def test_the_ends_of_the_scale():
    token = torch.arange(100).int() % 10
    z = torch.zeros(100, 3)
    z[token == 3, 0] = 1.0  # one token
    z[:, 1] = 1.0  # any token, as often as it comes
    z[:50, 2] = 1.0
    found = scores_of(z, token, torch.arange(100) // 50).compute()
    assert found.purity.tolist() == pytest.approx([1, 0.1, 0.1])
    assert found.entropy[0] == 0
    assert found.entropy[1] == pytest.approx(math.log(10))
    assert found.lift.tolist() == pytest.approx([math.log(10), 0, 0])
    assert found.spread.tolist() == pytest.approx([2, 2, 1])


def test_the_correction_takes_most_of_the_bias_of_the_entropy_away():
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, 20, (40_000,), generator=generator).int()
    z = (torch.rand(40_000, 200, generator=generator) < 0.002) * torch.rand(40_000, 200, generator=generator)
    found = scores_of(z, token).compute()
    plain = -math.log(20) + found.entropy.mean()
    assert abs(plain) < 0.05  # without it: about -0.16
    assert found.effective_fires.mean() < 0.8 * found.fires.mean()


def test_unknown_documents():
    z, token, document = random_rows()
    assert scores_of(z, token).compute().spread.isnan().all()
    some = torch.where(document < 5, document, -1)
    known = scores_of(z[:50], token[:50], document[:50]).compute().spread
    torch.testing.assert_close(scores_of(z, token, some).compute().spread, known, equal_nan=True)
    mixed = scores_of(z, token, document)
    mixed.update(Codes.from_dense(z), token)
    assert mixed.compute().spread.isnan().all()


def test_top_tokens_and_labels():
    z = torch.zeros(10, 3)
    token = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3, 4]).int()
    z[:, 0] = torch.tensor([1, 1, 1, 0, 0, 0, 2, 4, 1, 0.0])
    z[8, 1] = 1.0
    scores = scores_of(z, token)
    assert scores.top_tokens(2) == [[(2, 0.4), (0, 0.3)], [(3, 1.0)], []]
    assert [t for t, _ in scores.top_tokens(9, by="lift")[0]] == [2, 1]
    tied = scores_of(torch.ones(4, 1), torch.tensor([3, 2, 1, 1]).int())
    assert [t for t, _ in tied.top_tokens()[0]] == [1, 2, 3]
    words = [" the", " the", "the", "\n", "<"]
    assert labels_of(scores, words.__getitem__) == ["`the`", "`\\n`", ""]
    assert labels_of(scores, str, by="share") == ["`2` · `0` · `1`", "`3`", ""]
    assert labels_of(scores, str, by="share", least_share=0.35) == ["`2`", "`3`", ""]


def test_chance_is_what_moving_the_codes_at_random_gives():
    z, token, _ = random_rows(n=2000, density=0.05)
    chance = against_chance(scores_of(z, token), draws=200)
    moved = [scores_of(shifted(Codes.from_dense(z), seed=seed).to_dense(), token).compute() for seed in range(30)]
    for name in ("purity", "entropy", "lift"):
        literal = torch.stack([getattr(each, name) for each in moved]).nanmean(0)
        torch.testing.assert_close(chance[name].chance[:-1], literal[:-1], rtol=0.08, atol=0.03)
    # Codes that know nothing of tokens lie anywhere within chance; a latent for one token lies above all of it.
    assert 0.2 < float(chance["purity"].percentile[:-1].mean()) < 0.8
    z[:, 0] = (token == 5).float()
    chance = against_chance(scores_of(z, token))
    for each in chance.values():
        assert each.percentile[0] == 1
        assert each.z[0] > 5
        assert each.z[-1].isnan()
        assert each.percentile[-1].isnan()


def test_a_latent_that_fires_once_is_pure_by_chance():
    z = torch.zeros(50, 1)
    z[3, 0] = 1
    chance = against_chance(scores_of(z, (torch.arange(50) % 7).int()))
    assert chance["purity"].chance[0] == 1
    assert chance["purity"].percentile[0] == 0.5
    assert chance["purity"].z[0] == 0


def test_shifted_codes_keep_activations_and_density():
    z, _, _ = random_rows()
    moved = shifted(Codes.from_dense(z), seed=3)
    torch.testing.assert_close(moved.to_dense().sort(0).values, z.sort(0).values)
    assert not torch.equal(moved.to_dense(), z)
    assert torch.equal(shifted(Codes.from_dense(z), seed=3).to_dense(), moved.to_dense())


@pytest.mark.parametrize("n", [None, 2])
def test_detection_is_the_area_under_the_roc_curve(n):
    z, token, _ = random_rows()
    z[:, 0] = (token % 3 == 0) * (z[:, 0] + 0.1)
    learned, scored = slice(0, 250), slice(250, N)
    found = token_detection(scores_of(z[learned], token[learned]), scores_of(z[scored], token[scored]), n=n)
    counts = np.bincount(token[learned].numpy(), minlength=VOCAB)
    for latent in range(LATENTS - 1):
        fired = z[learned, latent] > 0
        hits = np.bincount(token[learned][fired].numpy(), minlength=VOCAB)
        rate = np.where(hits > 0, (hits + float(fired.double().mean())) / (counts + 1), 0)
        if n is not None:
            rate[np.argsort(-rate, kind="stable")[n:]] = 0
        expected = roc_auc_score((z[scored, latent] > 0).numpy(), rate[token[scored].numpy()])
        assert found[latent] == pytest.approx(expected)
    assert found[-1].isnan()
    assert found[0] > (0.9 if n is None else 0.6)
    assert abs(float(found[1:-1].mean()) - 0.5) < 0.1


def test_detection_of_tokens_that_the_other_half_never_saw():
    z, token = torch.ones(4, 1), torch.tensor([0, 1, 2, 3]).int()
    z[3] = 0
    learned = scores_of(z[:2], token[:2], n_vocab=None)
    assert token_detection(learned, scores_of(z[2:], token[2:], n_vocab=None)).item() == 0.5
    assert token_detection(learned, scores_of(z[:2], token[:2])).isnan().all()  # fires everywhere


def test_cohesion_is_the_weighted_mean_over_pairs_and_ignores_batching():
    z, _, _ = random_rows(n=60)
    z[:, -2] = 0
    z[4, -2] = 2.0  # fires once: no pair
    e = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
    whole, parts, other = Cohesion(LATENTS, 5), Cohesion(LATENTS, 5), Cohesion(LATENTS, 5)
    whole.update(Codes.from_dense(z), e)
    parts.update(Codes.from_dense(z[:7]), e[:7])
    other.update(Codes.from_dense(z[7:]), 3 * e[7:])
    parts.merge(other)
    found, everything = whole.compute()
    unit = (e / e.norm(dim=1, keepdim=True)).double()
    cosines = unit @ unit.T
    above = torch.triu_indices(60, 60, 1)
    assert everything == pytest.approx(float(cosines[above[0], above[1]].mean()))
    for latent in range(LATENTS - 2):
        a = z[:, latent].double()
        weight = (a[:, None] * a)[above[0], above[1]]
        assert found[latent] == pytest.approx(float((weight * cosines[above[0], above[1]]).sum() / weight.sum()))
    assert found[-2:].isnan().all()
    torch.testing.assert_close(parts.compute()[0], found, equal_nan=True)
    assert parts.compute()[1] == pytest.approx(everything)


def test_what_is_refused():
    z, token, document = random_rows()
    codes, scores = Codes.from_dense(z), TokenScores(LATENTS, VOCAB)
    with pytest.raises(ShapeError, match="codes must have 3 latents; they have 12"):
        TokenScores(3).update(codes, token)
    with pytest.raises(ShapeError, match="`token` must hold one number per row"):
        scores.update(codes, token[:-1])
    with pytest.raises(ShapeError, match="`document` must hold one number per row"):
        scores.update(codes, token, document[:, None])
    with pytest.raises(DataError, match=r"tokens must lie within 0..29; got 30. Are the rows of another tokenizer"):
        scores.update(codes, torch.full((N,), 30))
    with pytest.raises(DataError, match="got -1"):
        TokenScores(LATENTS).update(codes, token - 1 - token)
    with pytest.raises(DataError, match="codes must be finite"):
        scores.update(Codes(codes.offsets, codes.indices, codes.values / 0, LATENTS), token)
    with pytest.raises(DataError, match="at least one row"):
        scores.compute()
    with pytest.raises(ShapeError, match="both must be of 12 latents"):
        scores.merge(TokenScores(3))
    with pytest.raises(ConfigError, match="`n` must be at least 1"):
        scores.top_tokens(0)
    with pytest.raises(ConfigError, match="`draws` must be at least 2"):
        against_chance(scores, draws=1)
    with pytest.raises(ShapeError, match="both must be of one SAE"):
        token_detection(scores, TokenScores(3))
    with pytest.raises(ShapeError, match="Cohesion: codes of 12 latents"):
        Cohesion(LATENTS, 5).update(codes, torch.zeros(3, 5))


def test_no_rows_change_nothing():
    z, token, document = random_rows()
    scores = scores_of(z, token, document)
    before = scores.compute()
    scores.update(Codes.from_dense(z[:0]), token[:0], document[:0])
    same(before, scores.compute())
    empty = TokenScores(2)
    assert empty.top_tokens() == [[], []]
    assert token_detection(empty, TokenScores(2)).isnan().all()
