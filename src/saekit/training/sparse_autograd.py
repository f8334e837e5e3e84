"""Differentiable sparse codes: the top-k family works on (row, latent) pairs, never on a dense gradient.

The pairs are chosen without gradient; `encode_pairs` and `decode_pairs` then carry the gradient of exactly those pairs.
A chosen pair whose value is 0 (its pre-activation was not positive, where codes have no sign) gets no gradient. All
sums run in a fixed order, so the same input gives bitwise the same gradient.
"""

from __future__ import annotations

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


def choose_batchtopk(pre: Tensor, count: int, guess: Tensor) -> tuple[Tensor, Pairs, Tensor]:
    """Choose the `count` largest positive entries of a whole batch of pre-activations, without gradient.

    Ties at the edge are all kept on the CPU.

    Parameters
    ----------
    pre
        Dense pre-activations ``[n, n_latents]``.
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
    n, n_latents = pre.shape
    pre = pre.detach().float()
    flat = pre.reshape(-1)
    if pre.device.type == "cpu":
        # A little below the last batch's edge: few candidates to sort, and nearly always enough of them.
        at, values = _above(flat, max(float(guess) * 0.9, 0.0), count)
        if len(at) > count:
            edge = values.kthvalue(len(at) - count + 1).values
            kept = values >= edge
            at, values = at[kept], values[kept]
        smallest = values.min() if len(values) else flat.new_zeros(())
    else:  # no read-back: a fixed number of entries, those not positive have value 0
        at = flat.topk(count, sorted=False).indices.sort().values
        values = flat[at].relu()
        smallest = torch.where(values > 0, values, torch.inf).amin()
        smallest = torch.where(smallest.isinf(), 0.0, smallest)
    return values, _pairs_at(at, n, n_latents), smallest


def at_least(pre: Tensor, smallest: Tensor) -> tuple[Tensor, Pairs]:
    """Choose the positive entries of dense pre-activations ``[n, n_latents]`` from `smallest` up, without gradient."""
    flat = pre.detach().float().reshape(-1)
    at = ((flat >= smallest) & (flat > 0)).nonzero()[:, 0]
    return flat[at], _pairs_at(at, *pre.shape)


def _pairs_at(at: Tensor, n: int, n_latents: int) -> Pairs:
    """Return the pairs at ascending places of a flat ``[n, n_latents]``."""
    rows = at // max(n_latents, 1)
    edges = torch.arange(n + 1, device=at.device)
    return Pairs(torch.searchsorted(rows, edges), at - rows * n_latents, n_latents)


def _above(flat: Tensor, limit: float, count: int) -> tuple[Tensor, Tensor]:
    """Return positions and values of entries above `limit`; above 0 when fewer than `count` are."""
    at = (flat > limit).nonzero()[:, 0]
    if len(at) < count and limit > 0:
        at = (flat > 0).nonzero()[:, 0]
    return at, flat[at]
