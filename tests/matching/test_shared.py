"""When two latents are the same."""

from __future__ import annotations

import math

import pytest
import torch

from saekit.matching.matching import match_latents
from saekit.matching.shared import SharedRule, agree, shared_latents
from saekit.sae.model import SAE
from saekit.sae.rules import ReLURule, TopKRule


def sae_of(W_dec: torch.Tensor, W_enc: torch.Tensor) -> SAE:
    return SAE(W_enc=W_enc, b_enc=torch.zeros(len(W_enc)), W_dec=W_dec, b_dec=torch.zeros(W_dec.shape[1]),
               rule=ReLURule())  # fmt: skip


def test_both_sides_must_give_the_same_partner():
    axes = torch.eye(6)
    one = sae_of(axes, axes)
    assert shared_latents(one, one).all()
    swapped = sae_of(axes, axes[[1, 0, 2, 3, 4, 5]])
    assert shared_latents(one, swapped).tolist() == [False, False, True, True, True, True]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert shared_latents(one, one.permute(order)).all()


def test_latents_of_signed_codes_are_shared_whichever_way_round_they_point():
    W = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    one = sae_of(W, W).replace(rule=TopKRule(3, sign="magnitude"))
    signs = torch.tensor([1.0, -1.0] * 10)[:, None]
    turned = one.replace(W_enc=signs * W, W_dec=signs * W)
    assert shared_latents(one, turned).all()
    assert shared_latents(one, one.replace(W_dec=signs * W)).tolist() == [True, False] * 10  # reads and writes apart
    positive = [each.replace(rule=TopKRule(3)) for each in (one, turned)]
    assert not shared_latents(*positive).all()
    assert not shared_latents(one, positive[1]).all()


@pytest.mark.parametrize(("strict", "at_the_threshold"), [(True, False), (False, True)])
def test_the_threshold_may_or_may_not_be_reached(strict, at_the_threshold):
    rule = SharedRule(0.5, strict)
    cosines = torch.tensor([0.6, 0.5, 0.4, math.nan])
    assert rule.exceeds(cosines).tolist() == [True, at_the_threshold, False, False]


def test_latents_without_a_partner_are_never_shared():
    wide, narrow = torch.eye(6), torch.eye(6)[:4]
    decoder, encoder = match_latents(wide, narrow), match_latents(wide, narrow)
    assert agree(decoder, encoder).tolist() == [True] * 4 + [False] * 2
    assert SharedRule(-1.0, strict=False).shared(decoder, encoder).tolist() == [True] * 4 + [False] * 2


def test_aligned_latents_need_not_have_the_same_partner():
    axes = torch.eye(4)
    decoder, encoder = match_latents(axes, axes), match_latents(axes, axes[[1, 0, 2, 3]])
    rule = SharedRule()
    assert rule.aligned(decoder, encoder).all()
    assert rule.shared(decoder, encoder).tolist() == [False, False, True, True]
