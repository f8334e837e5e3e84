"""Encoding by a threshold (ReLU, JumpReLU): the fast kernel returns the codes of the plain one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit import SAE, kernels
from saekit.kernels import reference
from saekit.sae import rules

pytestmark = pytest.mark.usefixtures("fast")


def problem(seed: int, n: int, d: int, n_latents: int, level: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, d, generator=stream), torch.randn(n_latents, d, generator=stream) / d**0.5
    b = 0.3 * torch.randn(n_latents, generator=stream)
    return x, W, b, level + 0.3 * torch.randn(n_latents, generator=stream)


def assert_codes(got: tuple[Tensor, Tensor, Tensor], x: Tensor, W: Tensor, b: Tensor, threshold: Tensor | None) -> None:
    """Every latent surely above its threshold is there with its value; none that is surely below."""
    offsets, indices, values = got
    exact = x.double() @ W.double().T + b.double()
    slack = 2.0**-20 * (x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=1) + b.double().abs())
    level = (torch.zeros(len(b)) if threshold is None else threshold.clamp(min=0)).double()
    rows = torch.repeat_interleave(offsets.diff())
    assert len(indices) == len(values) == int(offsets[-1])
    there = torch.zeros_like(exact, dtype=torch.bool)
    there[rows, indices] = True
    assert int(there.sum()) == len(indices), "each latent once per row"
    assert (there | (exact <= level + slack)).all()
    assert (~there | (exact >= level - slack)).all()
    assert ((values.double() - exact[rows, indices]).abs() <= slack[rows, indices]).all()
    assert (values > 0).all()


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300)),
    level=st.sampled_from([-5.0, 0.0, 1.0, 2.5, 100.0]),
    relu=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=80)
def test_codes_are_those_of_the_plain_kernel(shape: tuple[int, int, int], level: float, relu: bool, seed: int) -> None:
    x, W, b, threshold = problem(seed, *shape, level)
    wanted = None if relu else threshold
    assert_codes(kernels.threshold_encode(x, W, b, wanted), x, W, b, wanted)


@pytest.mark.parametrize("level", [1.2, 2.0])
def test_exact_at_a_larger_shape(level: float) -> None:
    x, W, b, _ = problem(0, 80, 200, 3001, 0.0)
    threshold = torch.full((3001,), level)
    got = kernels.threshold_encode(x, W, b, threshold)
    assert_codes(got, x, W, b, threshold)
    rows = torch.repeat_interleave(got[0].diff())
    there = torch.zeros(80, 3001, dtype=torch.bool)
    there[rows, got[1]] = True
    low = (x.bfloat16() @ W.bfloat16().T).float() + b > level
    assert not torch.equal(there, low), "bf16 alone finds the same: the problem is too easy"


def test_rows_that_are_dense_or_not_finite_go_to_the_plain_kernel() -> None:
    x, W, b, _ = problem(1, 60, 32, 640, 0.0)
    threshold = torch.full((640,), 2.5)
    x[7] *= 50  # fires hundreds of latents
    x[9, 3] = math.nan
    x[11, 0] = math.inf
    offsets, indices, values = kernels.threshold_encode(x, W, b, threshold)
    expected = reference.threshold_encode(x, W, b, threshold)
    assert torch.equal(offsets, expected[0])
    for row in range(60):
        span = slice(int(offsets[row]), int(offsets[row + 1]))
        order, other = indices[span].argsort(), expected[1][span].argsort()
        assert torch.equal(indices[span][order], expected[1][span][other])
        torch.testing.assert_close(values[span][order], expected[2][span][other], equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["W_enc", "b_enc", "threshold"])
def test_weights_that_are_not_finite_go_to_the_plain_kernel(where: str) -> None:
    x, W, b, threshold = problem(2, 40, 16, 700, 1.0)
    {"W_enc": W[11], "b_enc": b[3:4], "threshold": threshold[5:6]}[where][0] = math.inf
    got, expected = kernels.threshold_encode(x, W, b, threshold), reference.threshold_encode(x, W, b, threshold)
    assert all(torch.equal(a, c) for a, c in zip(got[:2], expected[:2]))


def test_a_row_does_not_depend_on_rows_beside_it() -> None:
    x, W, b, _ = problem(3, 90, 48, 3000, 0.0)
    threshold = torch.full((3000,), 2.0)
    offsets, indices, values = kernels.threshold_encode(x, W, b, threshold)
    blocks = kernels.threshold_encode(x, W, b, threshold, block_rows=7)
    assert all(torch.equal(a, c) for a, c in zip((offsets, indices, values), blocks))
    alone = kernels.threshold_encode(x[40:41], W, b, threshold)
    span = slice(int(offsets[40]), int(offsets[41]))
    assert torch.equal(alone[1], indices[span])
    assert torch.equal(alone[2], values[span])
    assert [len(t) for t in kernels.threshold_encode(x[:0], W, b, threshold)] == [1, 0, 0]


@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
def test_an_sae_encodes_the_same_with_both_kernels(rule: str) -> None:
    x, W, b, _ = problem(4, 70, 64, 1024, 0.0)
    threshold = torch.full((1024,), 2.0)
    chosen = rules.ReLURule() if rule == "relu" else rules.JumpReLURule(threshold)
    sae = SAE(W_enc=W, b_enc=b - 2.0 if rule == "relu" else b, W_dec=W, b_dec=torch.zeros(64), rule=chosen)
    fast = sae.encode(x)
    with kernels.using("plain"):
        plain = sae.encode(x)
    assert fast.nnz > 0
    torch.testing.assert_close(fast.to_dense(), plain.to_dense(), rtol=1e-5, atol=1e-5)
