"""Differentiable sparse codes: the top-k family works on (row, latent) pairs, never on a dense gradient.

The pairs are chosen without gradient; `encode_pairs` and `decode_pairs` then carry the gradient of exactly those pairs.
A chosen pair whose value is 0 (its pre-activation was not positive, where codes have no sign) gets no gradient. All
sums run in a fixed order, so the same input gives bitwise the same gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which latents are active in which rows: compressed sparse rows."""

    offsets: Tensor
    """``[n_rows + 1]`` int64."""
    indices: Tensor
    """Latent of each pair, ``[n_pairs]`` int64."""
    n_latents: int

    @staticmethod
    def even(indices: Tensor, n_latents: int) -> Pairs:
        """Return the pairs of ``[n_rows, k]`` latents."""
        n, k = indices.shape
        return Pairs(torch.arange(n + 1, device=indices.device) * k, indices.reshape(-1), n_latents)

    @cached_property
    def rows(self) -> Tensor:
        """Row of each pair, ``[n_pairs]`` int64."""
        counts = self.offsets.diff()
        row = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(row, counts, output_size=len(self.indices))

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """Order that sorts the pairs by latent (rows ascending within one), and offsets ``[n_latents + 1]`` of the
        segments.
        """
        small = torch.int16 if self.n_latents < 2**15 else torch.int32  # narrow keys sort faster
        order = self.indices.to(small).argsort(stable=True)
        counts = torch.zeros(self.n_latents, dtype=torch.int64, device=order.device)
        counts = counts.scatter_add_(0, self.indices, torch.ones_like(self.indices))
        return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def sum_by_latent(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return ``out[j] = sum over pairs (r, j) of weight * x[r]``, ``[n_latents, d]``, in a fixed order."""
        order, offsets = self.by_latent
        return kernels.csr_decode(offsets, self.rows[order], weights[order], x)

    def fired(self, values: Tensor) -> Tensor:
        """Return the number of pairs with a value that is not 0 for each latent, ``[n_latents]`` float (whole
        numbers).
        """
        return torch.zeros(self.n_latents, device=values.device).scatter_add_(0, self.indices, (values != 0).float())


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_enc: Tensor, bias: Tensor, x: Tensor, values: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.pairs = pairs
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        grad = grad * (values != 0)  # ReLU: a chosen pair with value 0 stays as it is
        order, offsets = ctx.pairs.by_latent
        grad_W = ctx.pairs.sum_by_latent(grad, x) if ctx.needs_input_grad[0] else None
        grad_b = torch.segment_reduce(grad[order], "sum", offsets=offsets) if ctx.needs_input_grad[1] else None
        return grad_W, grad_b, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pairs = pairs
        return kernels.csr_decode(pairs.offsets, pairs.indices, values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        pairs, grad = ctx.pairs, grad.contiguous()
        grad_values = pair_products(grad, W_dec, pairs) if ctx.needs_input_grad[0] else None
        grad_W = pairs.sum_by_latent(values, grad) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W, None


def pair_products(x: Tensor, W: Tensor, pairs: Pairs) -> Tensor:
    """Return ``x[r] . W[j]`` for each pair (r, j), ``[n_pairs]``."""
    # The gradient of a weighted sum with respect to its weights is this product; torch has it without a gathered copy.
    with torch.enable_grad():
        ones = torch.ones(len(pairs.indices), device=x.device, dtype=x.dtype).requires_grad_()
        out = F.embedding_bag(
            pairs.indices, W.detach(), pairs.offsets, mode="sum", per_sample_weights=ones, include_last_offset=True
        )
        return torch.autograd.grad(out, ones, x)[0]


def encode_pairs(W_enc: Tensor, bias: Tensor, x: Tensor, values: Tensor, pairs: Pairs) -> Tensor:
    """Return the codes of chosen pairs, with their gradient.

    Parameters
    ----------
    W_enc, bias
        Encoder ``[n_latents, d]`` and ``[n_latents]``; they receive gradient.
    x
        Centred rows ``[n, d]``; they receive none.
    values
        ``relu(x[r] . W_enc[j] + bias[j])`` for each pair, of codes with a sign without ReLU, already computed,
        ``[n_pairs]``.
    pairs
        The pairs.
    """
    return _Encode.apply(W_enc, bias, x, values.detach(), pairs)


def decode_pairs(values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
    """Return ``sum over the pairs of a row of value * W_dec[latent]``, ``[n_rows, d]``, with gradient for both."""
    return _Decode.apply(values, W_dec, pairs)


def choose_topk(x: Tensor, W_enc: Tensor, bias: Tensor, k: int, sign: str = "positive") -> tuple[Tensor, Tensor]:
    """Return values (after ReLU) and latents of the `k` largest pre-activations per row, ``[n, k]`` each.

    The largest comes first. With ``sign="magnitude"`` the largest by magnitude, with their sign. No gradient.
    """
    encode = kernels.magnitude_encode if sign == "magnitude" else kernels.topk_encode
    with torch.no_grad():
        W_enc, bias = W_enc.detach(), bias.detach()
        values, indices = encode(x, W_enc, bias, k)
        if torch.is_autocast_enabled(x.device.type):  # low precision chooses, full precision computes what was chosen
            pre = pair_products(x, W_enc, Pairs.even(indices, len(bias))).view_as(indices) + bias[indices]
            values = torch.where(values != 0, pre, 0.0)
            values = values if sign == "magnitude" else values.relu()
        return values.float(), indices


@dataclass(frozen=True, eq=False)
class PreActivations:
    """Pre-activations of a batch, a block of rows at a time: they are made anew whenever they are gone through, so that
    no array of all rows by all latents is there. A batch that is one block is made once, for its prefixes too. No
    gradient.
    """

    x: Tensor
    """Centred rows ``[n, d]``."""
    W_enc: Tensor
    bias: Tensor
    weights: Tensor | None = None
    """Factors of latents ``[n_latents]`` in the choice."""
    known: Tensor | None = None
    """All of them, where they are made already."""

    def __iter__(self) -> Iterator[Tensor]:
        parts = self._parts
        yield from [self._only] if len(parts) == 1 else map(self._made, parts)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.x.split(kernels.block_rows_for(max(len(self.bias), 1), self.x.device))

    @cached_property
    def _only(self) -> Tensor:
        return self._made(self.x) if self.known is None else self.known

    def _made(self, rows: Tensor) -> Tensor:
        pre = torch.addmm(self.bias.detach(), rows.detach(), self.W_enc.detach().T).float()
        return pre if self.weights is None else pre * self.weights

    def prefix(self, size: int) -> PreActivations:
        """Return those of the first `size` latents."""
        weights = None if self.weights is None else self.weights[:size]
        known = self._only[:, :size] if len(self._parts) == 1 else None
        return PreActivations(self.x, self.W_enc[:size], self.bias[:size], weights, known)


def choose_batchtopk(blocks: Iterable[Tensor], count: int, guess: Tensor) -> tuple[Tensor, Pairs, Tensor]:
    """Choose the `count` largest positive entries of a whole batch of pre-activations, without gradient.

    Ties at the edge are all kept on the CPU.

    Parameters
    ----------
    blocks
        Dense pre-activations ``[rows, n_latents]`` float32, one block of rows after another; gone through twice where
        `guess` was too high.
    count
        Entries to keep, at least 1.
    guess
        Scalar near the smallest value that will be kept (the last batch's, say); it affects speed, never the result.

    Returns
    -------
    values : Tensor ``[n_pairs]``
    pairs : Pairs
    smallest : Tensor
        Scalar: the smallest value kept; 0 when nothing is positive.
    """
    if guess.device.type == "cpu":
        # A little below the last batch's edge: few candidates to sort, and nearly always enough of them.
        limit = max(float(guess) * 0.9, 0.0)
        found = _above(blocks, limit, count)
        if len(found.values) < count and limit > 0:
            found = _above(blocks, 0.0, count)
        at, values = found.at, found.values
        smallest = values.min() if len(values) else values.new_zeros(())
    else:
        found = largest_entries(blocks, count)
        at, order = found.at.sort()
        values = found.values[order].relu()
        smallest = torch.where(values > 0, values, torch.inf).amin()
        smallest = torch.where(smallest.isinf(), 0.0, smallest)
    return values, _pairs_at(at, *found.shape), smallest


@dataclass(frozen=True, eq=False)
class Entries:
    """Some entries of pre-activations."""

    at: Tensor
    """Positions in all of them, counted row by row."""
    values: Tensor
    shape: tuple[int, int]
    """Rows and latents in all."""


def largest_entries(blocks: Iterable[Tensor], count: int) -> Entries:
    """Return the `count` largest entries of all blocks in any order; nothing is read back from the device."""
    at, values = torch.empty(0, dtype=torch.int64), torch.empty(0)
    n, n_latents = 0, 0
    for pre in blocks:
        flat, n_latents = pre.reshape(-1), pre.shape[1]
        top = flat.topk(min(count, len(flat)), sorted=False)
        at = torch.cat([at.to(flat.device), top.indices + n * n_latents])
        values = torch.cat([values.to(flat.device), top.values])
        if len(values) > count:
            kept = values.topk(count, sorted=False).indices
            at, values = at[kept], values[kept]
        n += len(pre)
    return Entries(at, values, (n, n_latents))


def at_least(values: Tensor, pairs: Pairs, smallest: Tensor) -> tuple[Tensor, Pairs]:
    """Return the pairs whose values are positive and not below `smallest`."""
    kept = (values >= smallest) & (values > 0)
    counted = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return values[kept], Pairs(counted[pairs.offsets], pairs.indices[kept], pairs.n_latents)


def _above(blocks: Iterable[Tensor], limit: float, count: int) -> Entries:
    """Return the entries above `limit`, in order; where there are more, the `count` largest and all that equal the
    least of them.
    """
    at, values = torch.empty(0, dtype=torch.int64), torch.empty(0)
    n, n_latents = 0, 0
    for pre in blocks:
        flat, n_latents = pre.reshape(-1), pre.shape[1]
        found = (flat > limit).nonzero()[:, 0]
        at, values = torch.cat([at, found + n * n_latents]), torch.cat([values, flat[found]])
        n += len(pre)
        if len(values) > count:
            edge = values.kthvalue(len(values) - count + 1).values
            kept = values >= edge
            at, values = at[kept], values[kept]
            limit = float(torch.nextafter(edge, torch.zeros(())))  # what equals the edge is above it
    return Entries(at, values, (n, n_latents))


def _pairs_at(at: Tensor, n: int, n_latents: int) -> Pairs:
    """Return the pairs at ascending places of a flat ``[n, n_latents]``."""
    rows = at // max(n_latents, 1)
    edges = torch.arange(n + 1, device=at.device)
    return Pairs(torch.searchsorted(rows, edges), at - rows * n_latents, n_latents)
