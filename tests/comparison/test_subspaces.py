"""Laws of spans and of their overlap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.comparison.subspaces import overlap, span_of
from saekit.errors import ShapeError


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(d=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_equal_spans_overlap_wholly_and_smaller_ones_within_them_too(d, rank, seed):
    rank = min(rank, d)
    rows = gauss(rank, d, seed=seed)
    base = span_of(rows, rank)
    mixed = gauss(rank, rank, seed=seed + 1).double() @ rows.double()
    assert overlap(base, base) == pytest.approx(1)
    if float(torch.linalg.cond(mixed)) < 1e5:
        assert overlap(base, span_of(mixed, rank)) == pytest.approx(1)
        assert overlap(span_of(mixed, rank), span_of(rows, (rank + 1) // 2)) == pytest.approx(1)


def test_known_angles():
    a = torch.eye(4, dtype=torch.float64)[:2]
    b = torch.tensor([[math.cos(0.3), 0, math.sin(0.3), 0], [0, 0, 0, 1.0]], dtype=torch.float64)
    assert overlap(a, b) == pytest.approx(math.cos(0.3) ** 2 / 2)
    assert overlap(a, torch.eye(4, dtype=torch.float64)[2:]) == pytest.approx(0)


def test_the_span_does_not_see_lengths_and_signs():
    rows = gauss(9, 5)
    other = rows * torch.tensor([1.0, -3, 0.1, 7, 1, -1, 2, 5, 0.5])[:, None]
    assert overlap(span_of(rows, 3), span_of(other, 3)) == pytest.approx(1)
    basis = span_of(rows, 3)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="4 dimensions need at least as many rows; got 3"):
        span_of(rows[:3], 4)
