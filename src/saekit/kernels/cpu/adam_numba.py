"""Compiled Adam updates, one latent after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from .intrinsics_numba import _compiled


@_compiled
def adam_row(
    g: Any, w: Any, m: Any, v: Any, factor: Any, memory_m: Any, memory_v: Any, rate: Any, root: Any, eps: Any
) -> None:
    """Adam for one vector of weights `w` with gradient ``factor * g``, as in torch.

    ``m += memory_m (g - m)``, ``v += memory_v (g^2 - v)``, ``w -= rate * m / (sqrt(v) * root + eps)`` with ``memory_m =
    1 - beta1``, ``memory_v = 1 - beta2``, ``rate = lr / (1 - beta1^t)`` and ``root = 1 / sqrt(1 - beta2^t)``.
    """
    for i in range(len(g)):
        slope = g[i] * factor
        mean = m[i] + (slope - m[i]) * memory_m
        square = v[i] + (slope * slope - v[i]) * memory_v
        m[i] = mean
        v[i] = square
        w[i] -= rate * mean / (np.sqrt(square) * root + eps)


@_compiled
def update_latents(
    start: int, stop: int, of_dec: Any, of_enc: Any, of_bias: Any, along: Any,
    W_enc: Any, W_dec: Any, b_enc: Any, m_enc: Any, m_dec: Any, m_bias: Any, v_enc: Any, v_dec: Any, v_bias: Any,
    unit: bool, factor: Any, memory_m: Any, memory_v: Any, rate: Any, root: Any, eps: Any,
) -> None:  # fmt: skip
    """Clipping by `factor` and Adam for a range of latents, in one pass; with `unit`, projection of the decoder rows'
    gradient before, and length 1 afterwards.

    Latents that did not fire have gradient 0 and move too, as with a dense Adam.
    """
    d = W_enc.shape[1]
    adam_row(
        of_bias[start:stop], b_enc[start:stop], m_bias[start:stop], v_bias[start:stop],
        factor, memory_m, memory_v, rate, root, eps,
    )  # fmt: skip
    for j in range(start, stop):
        adam_row(of_enc[j], W_enc[j], m_enc[j], v_enc[j], factor, memory_m, memory_v, rate, root, eps)
        if unit:
            for i in range(d):
                of_dec[j, i] -= along[j] * W_dec[j, i]
        adam_row(of_dec[j], W_dec[j], m_dec[j], v_dec[j], factor, memory_m, memory_v, rate, root, eps)
        if unit:
            length = np.float32(0.0)
            for i in range(d):
                length += W_dec[j, i] * W_dec[j, i]
            length = np.float32(1.0) / max(np.sqrt(length), np.float32(1e-12))
            for i in range(d):
                W_dec[j, i] *= length
