"""Further terms of a loss that see weights alone, and constraints after a step: what is said to steady the latents.

With V the variance of the batch (summed over dimensions, a constant for the gradient), n latents with encoder rows e_j
and decoder rows d_j of length 1::

    l2          l2 * V * mean_j (|e_j|^2 + |d_j|^2)                                      after 2603.04198
    orthogonal  orthogonal * V * mean over chunks C, mean over i in C of
                max(0, max_{j in C, j != i} cos(d_i, d_j))^2                             OrtSAE, 2509.22033
                of codes with a sign the largest |cos|, squared
    aligned     <e_j, d_j> = 1 for every latent: no term, a constraint                   after 2605.18629

Their gradients are added before the gradient is clipped, whatever step made it. All cost as much as a pass over the
weights, `orthogonal` a product of ``n * chunk * d``; nothing of the size rows times latents is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..randomness import random_order
from .config import Config, has_signs
from .initialization import unit_rows
from .learner import Learner
from .mesh import over_latents

BLOCK_ROWS = 1024
"""Rows of cosines within a chunk that are held at once."""

ANCHORED = 0.8
"""Least cosine of a soft-frozen decoder row with the row that it began as (2602.14111)."""

Tensors = dict[str, Tensor]


def has_penalties(config: Config) -> bool:
    """Return whether a configuration has terms or constraints of this module that change gradients."""
    return bool(config.l2 or config.orthogonal or config.aligned)


def penalize(learner: Learner, variance: Tensor, gradients: Tensors) -> Tensors:
    """Add the gradients of the terms to those of ``W_enc`` and ``W_dec``, in place, and return the terms by name.

    Parameters
    ----------
    learner
        Before its step.
    variance
        V, ``[]``.
    gradients
        Gradients of the rest of the loss, before projection.
    """
    config, p = learner.config, learner.parameters
    terms: Tensors = {}
    with torch.no_grad():
        if config.l2:
            factor = config.l2 * variance / config.n_latents
            terms["l2"] = factor * over_latents(learner.mesh, p["W_enc"].square().sum() + p["W_dec"].square().sum())
            gradients["W_enc"].add_(2 * factor * p["W_enc"])  # that of d_j is radial: projection removes it
        if config.orthogonal:
            order = torch.from_numpy(random_order(config.n_latents, "chunks", learner.seed, learner.step))
            order = order.to(learner.device)
            value, gradient = spread(p["W_dec"], order, config.orthogonal_chunk, has_signs(config))
            terms["orthogonal"] = config.orthogonal * variance * value
            gradients["W_dec"].add_(config.orthogonal * variance * gradient)
        if config.aligned:
            align_gradients(p, gradients)
    return terms


def spread(W: Tensor, order: Tensor, chunk: int, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Return OrtSAE's term and its gradient: how close rows of length 1 come to another row of their chunk.

    Parameters
    ----------
    W
        ``[n, d]``.
    order
        Permutation of the rows; as many neighbours in it form a chunk.
    chunk
        Maximum number of rows in a chunk. All chunks are equal but for one row.
    signed
        Whether a row and its negative are the same, so that opposite ones are close.

    Returns
    -------
    value, gradient
        ``[]`` and ``[n, d]``. Where two rows are equally close, the first counts; each row of a pair gets its part.
    """
    n = len(W)
    chunks = order.tensor_split(-(-n // chunk))
    value, gradient = W.new_zeros(()), torch.zeros_like(W)
    for part in chunks:
        if len(part) < 2:
            continue
        rows = W[part]
        for start in range(0, len(part), BLOCK_ROWS):
            own = rows[start : start + BLOCK_ROWS]
            cosines = kernels.matmul(own, rows.T)
            place = torch.arange(len(own), device=W.device)
            cosines[place, start + place] = 0 if signed else -torch.inf
            at = (cosines.abs() if signed else cosines).max(1).indices
            best = cosines.gather(1, at[:, None])[:, 0]
            best = best if signed else best.clamp(min=0)
            weight = 1 / (len(chunks) * len(part))
            value = value + weight * best.square().sum()
            slope = (2 * weight * best)[:, None]
            winner = rows[at]
            gradient.index_add_(0, part[start : start + BLOCK_ROWS], slope * (winner - best[:, None] * own))
            gradient.index_add_(0, part[at], slope * (own - best[:, None] * winner))
    return value, gradient


def align_gradients(p: Tensors, gradients: Tensors) -> None:
    """Make gradients those of ``v`` and ``d`` where ``e = v + (1 - <v, d>) d``, at ``<v, d> = 1``; in place.

    ``g_v = g_e - <g_e, d> d``, and ``- <g_e, d> e`` is added to that of d.
    """
    of_enc, of_dec = gradients["W_enc"], gradients["W_dec"]
    along = (of_enc * p["W_dec"]).sum(1, keepdim=True)
    of_dec.addcmul_(along, p["W_enc"], value=-1)
    of_enc.addcmul_(along, p["W_dec"], value=-1)


def constrain(learner: Learner) -> None:
    """Bring the weights back to what the configuration demands of them, in place, after a step."""
    p = learner.parameters
    with torch.no_grad():
        if learner.config.aligned:
            p["W_enc"].addcmul_(1 - (p["W_enc"] * p["W_dec"]).sum(1, keepdim=True), p["W_dec"])
        if learner.anchor is not None:
            anchor(p["W_dec"], learner.anchor)


def anchor(W: Tensor, start: Tensor) -> None:
    """Turn rows of length 1 back, in place, to a cosine of `ANCHORED` with the rows `start` where it is less."""
    cosine = (W * start).sum(1, keepdim=True)
    aside = W - cosine * start
    aside = unit_rows(aside)
    W.copy_(torch.where(cosine < ANCHORED, ANCHORED * start + (1 - ANCHORED**2) ** 0.5 * aside, W))
