"""iSAE's regularizer: decoder rows that are large in the same row of data are to be orthogonal (2605.31245).

With D_S the decoder rows ``[m, d]`` of a row's m latents that are largest by magnitude (twice as many as fire), and u
one draw of N(0, I_m) for the row::

    R = mean over rows of |D_S D_S^T u|^2 / m

so that the mean over draws is ``|D_S D_S^T|_F^2 / m``: 1 for rows of length 1 that are orthogonal, and the sum of
squared cosines otherwise. Only the (row, latent) pairs of S are made. With ``y = D_S^T u`` and ``r = D_S y`` the
gradient to the decoder row of latent i in S is ``(2 / m) (r_i y + u_i D_S^T r)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..randomness import hashed_key
from .mesh import ALONE, Mesh, over_latents
from .sparse_autograd import Pairs, pair_products

WIDER = 2
"""Latents of a row that are compared, as a multiple of those that fire (2605.31245)."""


def probes(n_rows: int, width: int, seed: int, step: int, mesh: Mesh = ALONE) -> Tensor:
    """Return the draws u of this rank's `n_rows` rows of a batch, ``[n_rows, width]``, by seed and step alone."""
    stream = torch.Generator().manual_seed(hashed_key("probes of incoherence", seed, step, n_bytes=7))
    return mesh.rows_of(torch.randn(n_rows * mesh.data_size, width, generator=stream))


def measure_incoherence(W: Tensor, pairs: Pairs, u: Tensor, width: int, mesh: Mesh = ALONE) -> tuple[Tensor, Tensor]:
    """Return R of these rows, and its gradient by `W`.

    Parameters
    ----------
    W
        Decoder rows ``[n_latents, d]``; with shards of the latents those of this rank.
    pairs
        The latents S of each row.
    u
        A number for each pair, 0 for one that is not in S.
    width
        Size m of S.
    mesh
        The ranks that compute it together.

    Returns
    -------
    value, gradient
        ``[]`` and ``[n_latents, d]``.
    """
    with torch.no_grad():
        W, u = W.detach(), u.to(W.dtype)
        y = over_latents(mesh, kernels.csr_decode(pairs.offsets, pairs.indices, u, W))
        r = pair_products(y, W, pairs) * (u != 0)
        back = over_latents(mesh, kernels.csr_decode(pairs.offsets, pairs.indices, r, W))
        scale = 1 / (width * max(len(y), 1))
        gradient = pairs.sum_by_latent(r, y) + pairs.sum_by_latent(u, back)
        return over_latents(mesh, r.square().sum()) * scale, gradient * (2 * scale)


class _Incoherence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, pairs: Pairs, u: Tensor, width: int, mesh: Mesh) -> Tensor:
        value, gradient = measure_incoherence(W, pairs, u, width, mesh)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None, None, None


def incoherence(W: Tensor, pairs: Pairs, u: Tensor, width: int, mesh: Mesh = ALONE) -> Tensor:
    """Return R with its gradient; see `measure_incoherence`."""
    value: Tensor = _Incoherence.apply(W, pairs, u, width, mesh)
    return value
