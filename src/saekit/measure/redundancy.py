"""How alike the latents of a dictionary are, and how alike random ones would be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import kernels
from .intervals import Estimate

SAMPLED = 4096
"""Latents that are compared with all others; in wider dictionaries a sample of this many stands for all."""

BLOCK = 2048
"""Rows and columns of one block of cosines: 2,048 x 2,048 float32 are 16 MiB, whatever the width."""


def max_cosines(W: Tensor, queries: Tensor | None = None, block: int = BLOCK, *, either_sign: bool = False) -> Tensor:
    """Largest cosine of each row with any *other* row, computed in blocks.

    Parameters
    ----------
    W
        ``[n_latents, d]``; rows need not have unit length. A zero row has cosine 0 with everything.
    queries
        ``int64 [m]`` rows to answer for; None for all.
    block
        Rows and columns per block; memory is ``block ** 2`` numbers.
    either_sign
        Whether a row and its negative are the same, as for latents whose codes have signs: absolute cosines.

    Returns
    -------
    Tensor
        ``float32 [m]``; -1 where there is no other row.
    """
    W = W.detach().float()
    W = W / W.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    queries = torch.arange(len(W), device=W.device) if queries is None else queries.to(W.device)
    best = torch.full((len(queries),), -1.0, device=W.device)
    for start in range(0, len(queries), block):
        asked = queries[start : start + block]
        for first in range(0, len(W), block):
            cosines = kernels.matmul(W[asked], W[first : first + block].T)
            cosines = cosines.abs_() if either_sign else cosines
            own = (asked >= first) & (asked < first + cosines.shape[1])
            cosines[own.nonzero().squeeze(1), asked[own] - first] = -1.0
            best[start : start + block] = torch.maximum(best[start : start + block], cosines.amax(1))
    return best.clamp(-1.0, 1.0)


def redundancy(W: Tensor, *, either_sign: bool = False, sampled: int = SAMPLED, seed: int = 0) -> Estimate:
    """Mean over latents of the largest cosine with any other latent.

    Parameters
    ----------
    W
        ``[n_latents, d]`` decoder or encoder rows.
    either_sign
        As for `max_cosines`.
    sampled
        Wider dictionaries are estimated from this many rows (each still compared with all others).
    seed
        Random seed of the sample.

    Returns
    -------
    Estimate
        No interval when all rows were compared (nothing was sampled), else mean +- 1.96 standard errors of the sample.
    """
    n = len(W)
    if n < 2:
        return Estimate(math.nan, reason="undefined: there is no other latent")
    if n <= sampled:
        value = float(max_cosines(W, either_sign=either_sign).double().mean())
        return Estimate(value, reason="no interval: computed from the weights, nothing was sampled")
    queries = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:sampled]
    best = max_cosines(W, queries, either_sign=either_sign).double()
    value, spread = float(best.mean()), 1.96 * float(best.std()) / math.sqrt(sampled)
    return Estimate(value, reason=f"from {sampled:,} of {n:,} latents", ends=(value - spread, value + spread))


def random_max_cosine(n_latents: int, d: int) -> float:
    """Return the expected `redundancy` of `n_latents` independent random directions in `d` dimensions: the null.

    With ``F`` the distribution function of the cosine of two random directions, the largest of ``m = n_latents - 1``
    has mean ``1 - integral of F(t)^m over [-1, 1]``; computed by quadrature.

    Parameters
    ----------
    n_latents
        At least 2 (NaN below).
    d
        Width, at least 1.

    References
    ----------
    ``(cos + 1) / 2`` follows Beta((d-1)/2, (d-1)/2). The extreme-value approximation
    ``(s - (ln ln n + ln 4 pi) / (2 s) + 0.577 / s) / sqrt(d)`` with ``s = sqrt(2 ln n)`` lies within 0.01 of it for
    common shapes.
    """
    if n_latents < 2:
        return math.nan
    others = n_latents - 1
    if d == 1:  # cosines are -1 or 1
        return 1 - 2 * 0.5**others
    import numpy as np
    from scipy.special import betainc

    t = np.linspace(-1, 1, 20_001)
    below = betainc((d - 1) / 2, (d - 1) / 2, (t + 1) / 2) ** others
    return float(1 - np.trapezoid(below, t))
