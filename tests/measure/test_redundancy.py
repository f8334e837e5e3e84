"""Redundancy of dictionaries and its null."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.measure.redundancy import max_cosines, random_max_cosine, redundancy


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 17))
def test_blockwise_equals_brute_force(n, d, block):
    W = normal(n, n, d)
    unit = W / W.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-1)
    torch.testing.assert_close(max_cosines(W, block=block), cosines.amax(1).clamp(-1, 1))


def test_rows_turned_round_are_the_same_of_either_sign():
    W, signs = normal(0, 300, 16), torch.tensor([1.0, -1.0, -1.0] * 100)[:, None]
    found = max_cosines(W, either_sign=True)
    torch.testing.assert_close(max_cosines(signs * W, either_sign=True), found)
    assert float(found.mean()) == pytest.approx(random_max_cosine(2 * 299 + 1, 16), abs=0.01)  # each is two directions


def test_a_duplicate_has_cosine_one_and_a_basis_zero():
    W = torch.eye(6)
    assert redundancy(W).value == 0.0
    W[1] = 5 * W[0]
    assert max_cosines(W).tolist() == pytest.approx([1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(("n", "d", "measured"), [(1024, 128, 0.281), (3072, 384, 0.180)])
def test_random_dictionaries_land_on_the_null(n, d, measured):
    """`measured` are values that others have printed for these shapes."""
    null = random_max_cosine(n, d)
    assert null == pytest.approx(measured, abs=0.002)
    for seed in (0, 1):
        assert redundancy(normal(seed, n, d)).value == pytest.approx(null, abs=0.003)


def test_null_agrees_with_the_extreme_value_approximation():
    s = math.sqrt(2 * math.log(24576))
    approximation = (s - (math.log(math.log(24576)) + math.log(4 * math.pi)) / (2 * s) + 0.577 / s) / math.sqrt(768)
    assert random_max_cosine(24576, 768) == pytest.approx(approximation, abs=0.002)


def test_null_at_the_edges():
    assert math.isnan(random_max_cosine(1, 8))
    assert random_max_cosine(2, 1) == 0.0
    assert random_max_cosine(2, 8) == pytest.approx(0.0, abs=1e-6)


def test_a_sample_brackets_the_whole_and_says_so():
    W = normal(0, 900, 16)
    whole = redundancy(W).measured("cosine")
    sample = redundancy(W, sampled=300).measured("cosine")
    assert whole.low is None
    assert "computed from the weights" in whole.reason
    assert sample.low <= whole.value <= sample.high
    assert "300 of 900 latents" in sample.reason


def test_one_latent_alone_is_undefined():
    assert math.isnan(redundancy(torch.ones(1, 4)).value)
