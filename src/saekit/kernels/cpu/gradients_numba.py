"""Compiled loops for the gradients of decoder and encoder, latent by latent."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .intrinsics_numba import _compiled, _prefetch


@_compiled
def count_by_latent(indices: Any, wanted: Any, offsets: Any) -> None:
    """How many wanted pairs each latent has, as segment starts ``offsets [n_latents + 1]`` (zero before the call)."""
    for c in range(len(indices)):
        offsets[indices[c] + 1] += np.int64(wanted[c])
    for j in range(len(offsets) - 1):
        offsets[j + 1] += offsets[j]


@_compiled
def sort_by_latent(
    row_offsets: Any,
    values: Any,
    indices: Any,
    products: Any,
    wanted: Any,
    place: Any,
    rows: Any,
    code: Any,
    slope: Any,
) -> None:
    """Put row, value and gradient of each wanted pair at ``place[latent]``, which moves on; rows ascend."""
    for r in range(len(row_offsets) - 1):
        for c in range(row_offsets[r], row_offsets[r + 1]):
            if wanted[c]:
                at = place[indices[c]]
                place[indices[c]] = at + 1
                rows[at] = r
                code[at] = values[c]
                slope[at] = products[c]


@njit(inline="always")
def _sum_rows(at: Any, last: Any, sources: Any, weight: Any, rows: Any, left: Any, right: Any, out: Any) -> Any:
    """``out += sum of weight[c] * rows[sources[c]]`` in columns ``left .. right``, four at a time.

    Returns the sum of the weights.
    """
    a = np.uint64(left)
    z = np.uint64(right)
    total = np.float32(0.0)
    while at + 4 <= last:
        for c in range(at + 4, min(at + 8, len(sources))):  # maybe of the next latent
            for i in range(left, right, 16):
                _prefetch(rows, sources[c], i)  # type: ignore[call-arg]
        r0 = np.uint64(sources[at])
        r1 = np.uint64(sources[at + 1])
        r2 = np.uint64(sources[at + 2])
        r3 = np.uint64(sources[at + 3])
        v0 = weight[at]
        v1 = weight[at + 1]
        v2 = weight[at + 2]
        v3 = weight[at + 3]
        total += (v0 + v1) + (v2 + v3)
        for i in range(a, z):
            out[i] += (v0 * rows[r0, i] + v1 * rows[r1, i]) + (v2 * rows[r2, i] + v3 * rows[r3, i])
        at += 4
    while at < last:
        r0 = np.uint64(sources[at])
        v0 = weight[at]
        total += v0
        for i in range(a, z):
            out[i] += v0 * rows[r0, i]
        at += 1
    return total


@_compiled
def gradient_of_decoder(
    start: int, stop: int, left: int, right: int, offsets: Any, sources: Any, code: Any, gradient: Any, W_dec: Any,
    slot: Any, more_dec: Any, stretch: Any, of_dec: Any, along: Any, squares: Any,
) -> None:  # fmt: skip
    """Columns ``left .. right`` of the gradient of decoder rows, and what is needed of its length.

    ``of_dec[j] = sum over pairs of code * gradient[source] + stretch[j] * W_dec[j] + more_dec[slot[j]]``, before
    projection. Adds up over panels of columns: ``along[j] = of_dec[j] . W_dec[j]`` and ``squares[j] = |of_dec[j]|^2``.

    Decoder and encoder are done one after the other because the rows that latents have in common then stay in a cache;
    columns a panel at a time where they would not even so.
    """
    a = np.uint64(left)
    z = np.uint64(right)
    for j in range(np.uint64(start), np.uint64(stop)):
        for i in range(left, right, 16):
            _prefetch(W_dec, j, i)  # type: ignore[call-arg]
        out = of_dec[j]
        for i in range(a, z):
            out[i] = np.float32(0.0)
        _sum_rows(offsets[j], offsets[j + np.uint64(1)], sources, code, gradient, left, right, out)
        if slot[j] >= 0:
            s = np.uint64(slot[j])
            for i in range(a, z):
                out[i] += more_dec[s, i]
        more = stretch[j]
        parallel = np.float32(0.0)
        square = np.float32(0.0)
        for i in range(a, z):
            value = out[i] + more * W_dec[j, i]
            parallel += value * W_dec[j, i]
            square += value * value
            out[i] = value
        along[j] += parallel
        squares[j] += square


@_compiled
def gradient_of_encoder(
    start: int, stop: int, chunk: int, left: int, right: int, offsets: Any, rows: Any, slope: Any, x: Any, offset: Any,
    W_enc: Any, slot: Any, more_enc: Any, more_bias: Any, of_enc: Any, of_bias: Any, of_offset: Any,
    squares: Any,
) -> None:  # fmt: skip
    """The same of encoder rows, ``start .. stop`` counting chunks of `chunk` latents.

    ``of_bias[j] = sum over pairs of slope + more_bias[slot[j]]``, ``of_enc[j] = sum over pairs of slope * x[row] -
    of_bias[j] * offset + more_enc[slot[j]]``, and ``of_offset[chunk]`` the sum over the chunk of ``of_bias[j] *
    W_enc[j]``. ``squares[j] += |of_enc[j]|^2``.
    """
    n = W_enc.shape[0]
    a = np.uint64(left)
    z = np.uint64(right)
    for part in range(start, stop):
        for i in range(a, z):
            of_offset[part, i] = np.float32(0.0)
        for j in range(np.uint64(part * chunk), np.uint64(min(n, (part + 1) * chunk))):
            for i in range(left, right, 16):
                _prefetch(W_enc, j, i)  # type: ignore[call-arg]
            out = of_enc[j]
            for i in range(a, z):
                out[i] = np.float32(0.0)
            bias = _sum_rows(offsets[j], offsets[j + np.uint64(1)], rows, slope, x, left, right, out)
            if slot[j] >= 0:
                s = np.uint64(slot[j])
                bias += more_bias[s]
                for i in range(a, z):
                    out[i] += more_enc[s, i]
            of_bias[j] = bias
            square = np.float32(0.0)
            for i in range(a, z):
                value = out[i] - bias * offset[i]
                of_offset[part, i] += bias * W_enc[j, i]
                square += value * value
                out[i] = value
            squares[j] += square
