"""Pairs of rows and latents: the values and gradients of dense products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit import kernels
from saekit.training.sparse_autograd import (
    Pairs,
    PreActivations,
    choose_batchtopk,
    decode_pairs,
    encode_pairs,
    largest_entries,
    pair_products,
)

# ---------------------------------------------------------------- pairs


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 1000))
def test_pairs_equal_dense_products(rows, n, d, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, n, generator=g) < 0.4
    where = mask.nonzero()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    pairs = Pairs(offsets, where[:, 1], n)
    assert torch.equal(pairs.rows, where[:, 0])
    W, x, b = torch.randn(n, d, generator=g), torch.randn(rows, d, generator=g), torch.randn(n, generator=g)
    pre = (x @ W.T + b)[mask]
    torch.testing.assert_close(pair_products(x, W, pairs) + b[pairs.indices], pre)

    leaves = [t.clone().requires_grad_() for t in (W, b, W)]
    dense = [t.clone().requires_grad_() for t in (W, b, W)]
    ours = decode_pairs(encode_pairs(leaves[0], leaves[1], x, pre.relu(), pairs), leaves[2], pairs)
    theirs = ((x @ dense[0].T + dense[1]).relu() * mask) @ dense[2]
    torch.testing.assert_close(ours, theirs)
    for a, c in zip(torch.autograd.grad(ours.sin().sum(), leaves), torch.autograd.grad(theirs.sin().sum(), dense)):
        torch.testing.assert_close(a, c)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 10), st.integers(1, 40), st.floats(0, 3), st.integers(0, 1000), st.integers(1, 8)
)
def test_choose_batchtopk_equals_sorting_whatever_the_blocks(rows, n, count, guess, seed, block):
    pre = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    pre = (pre + 0.5).round() if seed % 2 else pre  # many ties
    count = min(count, rows * n)
    values, pairs, smallest = choose_batchtopk(pre.split(block), count, torch.tensor(guess))
    ordered = pre.flatten().sort(descending=True).values
    want = ordered[(ordered > 0) & (ordered >= ordered[count - 1])]
    assert torch.equal(values.sort(descending=True).values, want)
    assert torch.equal(pre[pairs.rows, pairs.indices], values)
    assert float(smallest) == (float(want[-1]) if len(want) else 0.0)
    found = largest_entries(pre.split(block), count)  # what a GPU takes, of ties as many as fit
    assert torch.equal(found.values.sort(descending=True).values, ordered[:count])
    assert torch.equal(pre.flatten()[found.at], found.values)
    assert len(found.at.unique()) == count


@pytest.mark.parametrize(("block", "products"), [(64, 1), (3, 9)])
def test_prefixes_are_those_of_all_and_a_batch_of_one_block_is_multiplied_once(monkeypatch, block, products):
    made, addmm = [], torch.addmm
    monkeypatch.setattr(kernels, "block_rows_for", lambda *_: block)
    monkeypatch.setattr(torch, "addmm", lambda *values: made.append(1) or addmm(*values))
    stream = torch.Generator().manual_seed(0)
    x, W, bias = (torch.randn(*shape, generator=stream) for shape in ((9, 4), (6, 4), (6,)))
    pre = PreActivations(x, W.requires_grad_(), bias, torch.arange(6.0))
    whole = addmm(bias, x, W.detach().T) * torch.arange(6.0)
    for size in (2, 4, 6):
        found = torch.cat(list(pre.prefix(size)))
        torch.testing.assert_close(found, whole[:, :size])
        assert not found.requires_grad
    assert len(made) == products
