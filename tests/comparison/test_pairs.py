"""Pairs of SAEs: matched the same in any order, sign and scale of latents, and from either side."""

from __future__ import annotations

import pytest
import torch

from fixtures.known_saes import random_sae
from saekit.comparison.pairs import MatchProgress, found_in, match_all
from saekit.matching.shared import SharedRule
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule

RULE = SharedRule(0.7, True)
N, D = 32, 10
ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(0))


def matched(*saes: SAE):
    return match_all([(str(at), sae) for at, sae in enumerate(saes)], MatchProgress(None, 2))


def near(sae: SAE, size: float = 0.4) -> SAE:
    g = torch.Generator().manual_seed(9)
    W_enc, W_dec = (W + size * torch.randn(W.shape, generator=g) for W in (sae.W_enc, sae.W_dec))
    return sae.replace(W_enc=W_enc, W_dec=W_dec)


def values(pair) -> dict[str, float]:
    return {name: each.value for name, each in pair.fractions(RULE).items()}


def test_an_sae_shares_everything_with_itself_in_any_order() -> None:
    sae = random_sae(n=N, d=D)
    [pair] = matched(sae, sae.permute(ORDER))
    assert values(pair) == {"shared": 1, "aligned": 1, "equal": 1}
    assert torch.equal(ORDER[pair.decoder.matching.partner], torch.arange(N))
    assert pair.decoder.side().mean_cosine.value == pytest.approx(1, abs=1e-6)


def test_order_and_scale_of_latents_change_nothing() -> None:
    a = random_sae(n=N, d=D)
    b = near(a)
    [one], [other] = matched(a, b), matched(a.permute(ORDER), b.replace(W_dec=3 * b.W_dec, W_enc=0.2 * b.W_enc))
    assert values(one) == values(other)
    assert 0 < values(one)["shared"] < 1
    assert one.decoder.matching.mean_cosine == pytest.approx(other.decoder.matching.mean_cosine, abs=1e-5)


def test_a_latent_of_the_opposite_sign_is_another_one_but_for_absolute_cosines() -> None:
    a = random_sae(n=N, d=64)
    [pair] = matched(a, a.replace(W_dec=-a.W_dec, W_enc=-a.W_enc))
    side = pair.decoder.side()
    assert values(pair)["shared"] == 0
    assert side.max_absolute_cosine.value == pytest.approx(1, abs=1e-5)
    assert side.max_cosine.value < 0.7


def test_signed_latents_turned_round_are_the_same() -> None:
    sae = random_sae(n=N, d=D).replace(rule=TopKRule(3, sign="magnitude"))
    signs = torch.where(torch.arange(N) % 3 > 0, -1.0, 1.0)
    turned = sae.replace(W_enc=signs[:, None] * sae.W_enc, b_enc=signs * sae.b_enc, W_dec=signs[:, None] * sae.W_dec)
    [one], [other] = matched(sae, near(sae)), matched(turned, near(sae))
    assert values(one) == values(other)
    for mine, theirs in ((one.decoder, other.decoder), (one.encoder, other.encoder)):
        a, b = (each.side() for each in (mine, theirs))
        assert (a.partner, a.cosine) == (b.partner, b.cosine)
        for name in ("mean_cosine", "max_cosine", "max_absolute_cosine"):
            ends = [(each.value, each.low, each.high) for each in (getattr(a, name), getattr(b, name))]
            assert ends[0] == pytest.approx(ends[1], abs=1e-6), name


def test_both_sides_see_the_same_pair() -> None:
    a = random_sae(n=N, d=D)
    b = near(a)
    [one], [other] = matched(a, b), matched(b, a)
    assert values(one) == values(other)
    assert one.decoder.side().max_cosine.value == pytest.approx(other.decoder.side().max_cosine.value, abs=1e-6)
    named = [("a", a), ("b", b)]
    has, back = found_in(named, [one], RULE), found_in(named[::-1], [other], RULE)
    assert [each.sum() for each in has] == [each.sum() for each in back[::-1]]
