"""Laws of angles between subspaces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.comparison.subspaces import principal_angles, span_of
from saekit.errors import ShapeError


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(d=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_equal_spans_have_no_angle_between_them(d, rank, seed):
    rank = min(rank, d)
    rows = gauss(rank, d, seed=seed)
    mixed = gauss(rank, rank, seed=seed + 1).double() @ rows.double()
    assert principal_angles(rows, rows).abs().max() < 1e-7
    if float(torch.linalg.cond(mixed)) < 1e5:
        assert principal_angles(rows.double(), mixed).abs().max() < 1e-6
        assert principal_angles(mixed, rows.double()[: (rank + 1) // 2]).abs().max() < 1e-6


def test_known_angles():
    a = torch.eye(4)[:2]
    b = torch.tensor([[math.cos(0.3), 0, math.sin(0.3), 0], [0, 0, 0, 1.0]])
    assert principal_angles(a, b).tolist() == pytest.approx([0.3, math.pi / 2], abs=1e-6)
    assert principal_angles(torch.eye(4)[:2], torch.eye(4)[2:]).tolist() == pytest.approx([math.pi / 2] * 2)
    tiny = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    assert principal_angles(tiny, torch.tensor([[1.0, 0.0]])).tolist() == pytest.approx([1e-9], rel=1e-3)


def test_the_span_does_not_see_lengths_and_signs():
    rows = gauss(9, 5)
    other = rows * torch.tensor([1.0, -3, 0.1, 7, 1, -1, 2, 5, 0.5])[:, None]
    assert principal_angles(span_of(rows, 3), span_of(other, 3)).abs().max() < 1e-6
    basis = span_of(rows, 3)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="4 dimensions need at least as many rows; got 3"):
        span_of(rows[:3], 4)
    with pytest.raises(ShapeError, match="two matrices of one width are needed"):
        principal_angles(rows, rows[:, :3])
