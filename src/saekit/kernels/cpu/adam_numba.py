"""Compiled Adam updates, one latent after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .intrinsics_numba import Float, Int, compiled


class Factors(NamedTuple):
    """Numbers of an update, float32: see `saekit.kernels.step_interface.Adam.factors`."""

    clip: Float
    """What the gradient is multiplied by before."""
    memory_m: Float
    memory_v: Float
    rate: Float
    root: Float
    eps: Float


class LatentWeights(NamedTuple):
    """Encoder and decoder rows and biases of all latents, or Adam's moments of them."""

    enc: np.ndarray
    dec: np.ndarray
    bias: np.ndarray


class LatentGradient(NamedTuple):
    """Their gradient; that of the decoder rows is projected in place."""

    enc: np.ndarray
    dec: np.ndarray
    bias: np.ndarray
    along: np.ndarray
    """Product of the decoder row and its gradient."""
    written: np.ndarray
    """Latents whose rows are there; those of the others are 0 and are not read."""


@compiled
def adam_row(g: np.ndarray, w: np.ndarray, m: np.ndarray, v: np.ndarray, factors: Factors) -> None:
    """Adam for one vector of weights `w` with gradient ``clip * g``, as in torch.

    ``m += memory_m (g - m)``, ``v += memory_v (g^2 - v)``, ``w -= rate * m / (sqrt(v) * root + eps)`` with ``memory_m =
    1 - beta1``, ``memory_v = 1 - beta2``, ``rate = lr / (1 - beta1^t)`` and ``root = 1 / sqrt(1 - beta2^t)``.
    """
    for i in range(len(g)):
        slope = g[i] * factors.clip
        mean = m[i] + (slope - m[i]) * factors.memory_m
        square = v[i] + (slope * slope - v[i]) * factors.memory_v
        m[i] = mean
        v[i] = square
        w[i] -= factors.rate * mean / (np.sqrt(square) * factors.root + factors.eps)


@compiled
def update_latents(
    start: Int, stop: Int, g: LatentGradient, weights: LatentWeights, first: LatentWeights, second: LatentWeights,
    unit: bool, factors: Factors,
) -> None:  # fmt: skip
    """Clipping and Adam for a range of latents, in one pass; with `unit`, projection of the decoder rows' gradient
    before, and length 1 afterwards.

    Latents that did not fire have gradient 0 and move too, as with a dense Adam. One pass, because all of this is
    bound by memory: weights, gradients and moments of a latent are read once.
    """
    W_dec = weights.dec
    d = W_dec.shape[1]
    some = slice(start, stop)
    adam_row(g.bias[some], weights.bias[some], first.bias[some], second.bias[some], factors)
    nothing = np.zeros(d, np.float32)
    for j in range(start, stop):
        there = g.written[j]
        adam_row(g.enc[j] if there else nothing, weights.enc[j], first.enc[j], second.enc[j], factors)
        if unit and there:
            for i in range(d):
                g.dec[j, i] -= g.along[j] * W_dec[j, i]
        adam_row(g.dec[j] if there else nothing, W_dec[j], first.dec[j], second.dec[j], factors)
        if unit:
            length = np.float32(0.0)
            for i in range(d):
                length += W_dec[j, i] * W_dec[j, i]
            length = np.float32(1.0) / max(np.sqrt(length), np.float32(1e-12))  # as in plain torch: a zero row stays 0
            for i in range(d):
                W_dec[j, i] *= length
