"""Laws of the description length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from saekit.errors import ConfigError, DataError, ShapeError
from saekit.measure.mdl import DescriptionLength
from saekit.sae.codes import Codes


def codes_of(n=300, n_latents=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, n_latents, generator=g) * (torch.rand(n, n_latents, generator=g) < 0.3)


def length(*parts, precision=3):
    found = DescriptionLength(parts[0].shape[1], precision)
    for z in parts:
        found.update(Codes.from_dense(z))
    return found


def test_it_is_the_formula():
    z = codes_of()
    expected = []
    for column in z.double().T.numpy():
        p = (column > 0).mean()
        _, counts = np.unique(np.floor(8 * np.log2(column[column > 0])), return_counts=True)
        expected.append(entropy([p, 1 - p], base=2) + p * entropy(counts, base=2))
    np.testing.assert_allclose(length(z).by_latent().numpy(), expected)
    assert length(z).compute() == pytest.approx(sum(expected))


def test_constant_codes_cost_nothing_and_a_fair_coin_one_bit():
    assert length(torch.full((50, 4), 0.37)).compute() == 0
    assert length(torch.zeros(50, 4)).compute() == 0
    coin = torch.zeros(50, 1)
    coin[::2] = 2.5
    assert length(coin).compute() == pytest.approx(1)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=3))
def test_any_batching_and_merge_give_the_same(cuts):
    z = codes_of()
    whole = length(z).by_latent()
    parts = np.split(z, sorted(cuts))
    torch.testing.assert_close(length(*parts).by_latent(), whole)
    merged = length(z[:0])
    for part in parts:
        merged.merge(length(part))
    torch.testing.assert_close(merged.by_latent(), whole)


def test_permuted_latents_have_permuted_lengths_and_units_do_not_matter():
    z = codes_of()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(length(z[:, order]).by_latent(), length(z).by_latent()[order])
    torch.testing.assert_close(length(4 * z).by_latent(), length(z).by_latent())


def test_a_finer_code_costs_more_and_independent_latents_add_up():
    z = codes_of(n=3000)
    costs = [length(z, precision=bits).compute() for bits in (0, 2, 4)]
    assert costs[0] < costs[1] < costs[2]
    both = length(torch.cat([z, z], 1)).compute()
    assert both == pytest.approx(2 * length(z).compute())


def test_codes_of_either_sign_cost_as_much_and_telling_signs_apart_costs_more():
    z = codes_of()
    assert length(-z).compute() == length(z).compute()
    mixed = z * torch.where(torch.arange(len(z)) % 2 == 0, 1.0, -1.0)[:, None]
    fires = float((z != 0).double().mean(0).sum())
    assert length(z).compute() < length(mixed).compute() <= length(z).compute() + 1.01 * fires


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"`precision` must be within 0..12"):
        DescriptionLength(3, 13)
    with pytest.raises(ShapeError, match="codes must have 3 latents"):
        DescriptionLength(3).update(Codes.from_dense(codes_of()))
    for wrong in (0.0, math.inf, math.nan):
        codes = Codes(torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([wrong]), 3)
        with pytest.raises(DataError, match="codes must be finite and not zero"):
            DescriptionLength(3).update(codes)
    with pytest.raises(DataError, match="at least one row"):
        DescriptionLength(3).compute()
