"""What chance gives: means over permutations, with their spread."""

from __future__ import annotations

import torch

from fixtures.known_saes import random_sae
from saekit.comparison.nulls import PERMUTATIONS, nulls_of
from saekit.matching.shared import SharedRule


def test_equal_is_the_mean_of_twenty_permutations_with_its_spread():
    a, b = (random_sae(n=48, d=16, seed=seed) for seed in (0, 1))
    noise = torch.Generator().manual_seed(5)
    a, b = (s.replace(W_enc=s.W_dec + 0.3 * torch.randn(s.W_dec.shape, generator=noise)) for s in (a, b))
    seeds = [nulls_of(a, b, SharedRule(), seed, lambda *_: None)["permuted"].equal for seed in range(4)]
    for equal in seeds:
        assert f"mean of {PERMUTATIONS} permutations" in equal.reason
        assert 0 <= equal.low < equal.value < equal.high <= 1
    # single permutations of 48 latents differ by several of them; means of twenty hardly do
    assert max(each.value for each in seeds) - min(each.value for each in seeds) < 0.1
