"""Products by oneDNN: those of plain torch up to rounding, and only where they were asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from saekit import kernels
from saekit.kernels.cpu import onednn_linear


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that were taken over, with the switch as if this were the right processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no product of oneDNN")
    shapes: list[tuple[int, ...]] = []
    own = onednn_linear._linear

    def counted(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        shapes.append((*x.shape, len(W)))
        return own(x, W, b)

    monkeypatch.setattr(onednn_linear, "pays", lambda: True)
    monkeypatch.setattr(onednn_linear, "SMALLEST", 1)
    monkeypatch.setattr(onednn_linear, "_linear", counted)
    return shapes


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


sizes = st.integers(1, 40)


@given(rows=st.lists(sizes, min_size=1, max_size=3), d=sizes, m=sizes, bias=st.booleans(), seed=st.integers(0, 2**20))
def test_layers_are_those_of_torch(rows: list[int], d: int, m: int, bias: bool, seed: int) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no product of oneDNN")
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(*rows, d, generator=g), torch.randn(m, d, generator=g)
    b = torch.randn(m, generator=g) if bias else None
    with torch.no_grad():
        close(onednn_linear._linear(x, W, b), F.linear(x, W, b))
        close(onednn_linear._linear(x, W.T.contiguous().T, b), F.linear(x, W, b))


def test_only_layers_inside_the_block_are_taken_over(taken: list[tuple[int, ...]]) -> None:
    layer, x = nn.Linear(8, 5), torch.randn(3, 4, 8)
    with torch.no_grad():
        before = layer(x)
        with kernels.fast_linears():
            inside = layer(x)
        after = layer(x)
    assert taken == [(3, 4, 8, 5)]
    close(inside, before)
    assert torch.equal(before, after)


def test_layers_of_gpt2_are_taken_over_too(taken: list[tuple[int, ...]]) -> None:
    from transformers.pytorch_utils import Conv1D

    layer, x = Conv1D(6, 8), torch.randn(2, 7, 8)
    nn.init.normal_(layer.bias)
    with torch.no_grad():
        expected = layer(x)
        with kernels.fast_linears():
            close(layer(x), expected)
    assert taken == [(14, 8, 6)]


def test_what_oneDNN_must_not_touch_stays_with_torch(taken: list[tuple[int, ...]]) -> None:
    class Quantized(Tensor):
        pass

    W, b, x = torch.randn(5, 8), torch.randn(5), torch.randn(3, 8)
    with torch.no_grad(), kernels.fast_linears():
        F.linear(x.double(), W.double())
        F.linear(x.bfloat16(), W.bfloat16())
        F.linear(x, W.as_subclass(Quantized))
        torch.addmm(torch.randn(3, 5), x, W.T)  # not a bias but a matrix
        torch.addmm(b, x, W.T, beta=0)
        F.linear(x[:0], W)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.linear(x, W).dtype == torch.bfloat16
    assert taken == []


def test_gradients_and_plain_kernels_switch_it_off(taken: list[tuple[int, ...]]) -> None:
    layer, x = nn.Linear(8, 5), torch.randn(3, 8)
    with kernels.fast_linears():
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    with kernels.using("plain"), torch.no_grad(), kernels.fast_linears():
        layer(x)
        kernels.matmul(x, layer.weight.T)
    a = torch.randn(4, 3, requires_grad=True)
    kernels.matmul(a, torch.randn(3, 2)).sum().backward()
    assert a.grad is not None
    assert taken == []


@given(n=sizes, d=sizes, m=sizes, flipped=st.tuples(st.booleans(), st.booleans()))
def test_matmul_is_that_of_torch_in_any_layout(n: int, d: int, m: int, flipped: tuple[bool, bool]) -> None:
    a = torch.randn(d, n).T if flipped[0] else torch.randn(n, d)
    b = torch.randn(m, d).T if flipped[1] else torch.randn(d, m)
    close(kernels.matmul(a, b), a @ b)
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        close(onednn_linear._linear(a, b.mT, None), a @ b)


def test_large_products_are_taken_over_small_ones_are_not(
    taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn_linear, "SMALLEST", 1000)
    kernels.matmul(torch.randn(9, 10), torch.randn(10, 10))
    kernels.matmul(torch.randn(10, 10), torch.randn(10, 10))
    assert taken == [(10, 10, 10)]


def test_forward_passes_of_a_model_are_taken_over(taken: list[tuple[int, ...]]) -> None:
    from saekit.rows.capture import capture

    rows = capture("builtin", ["The quick brown fox jumps over the lazy dog."] * 3, layer=1)
    assert taken
    with kernels.using("plain"):
        plain = capture("builtin", ["The quick brown fox jumps over the lazy dog."] * 3, layer=1)
    for mine, other in zip(rows.batches(64), plain.batches(64), strict=True):
        torch.testing.assert_close(mine.x, other.x, rtol=1e-4, atol=1e-4)
