"""Compiled loops of the decoder and of the products that its gradient needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .intrinsics_numba import _compiled


@njit(inline="always")
def _decode(values: Any, indices: Any, first: Any, last: Any, W: Any, out: Any) -> None:
    """``out += sum of values[c] * W[indices[c]]`` for c from `first` to `last`, four at a time."""
    c = first
    while c + 4 <= last:
        v0 = values[c]
        v1 = values[c + 1]
        v2 = values[c + 2]
        v3 = values[c + 3]
        j0 = np.uint64(indices[c])
        j1 = np.uint64(indices[c + 1])
        j2 = np.uint64(indices[c + 2])
        j3 = np.uint64(indices[c + 3])
        for i in range(len(out)):
            out[i] += (v0 * W[j0, i] + v1 * W[j1, i]) + (v2 * W[j2, i] + v3 * W[j3, i])
        c += 4
    while c < last:
        v0 = values[c]
        j0 = np.uint64(indices[c])
        for i in range(len(out)):
            out[i] += v0 * W[j0, i]
        c += 1


@njit(inline="always")
def _products(g: Any, indices: Any, first: Any, last: Any, W: Any, products: Any) -> None:
    """``products[c] = g . W[indices[c]]`` for c from `first` to `last`, four at a time."""
    c = first
    while c < last:
        z = last - 1
        j0 = np.uint64(indices[c])
        j1 = np.uint64(indices[min(c + 1, z)])
        j2 = np.uint64(indices[min(c + 2, z)])
        j3 = np.uint64(indices[min(c + 3, z)])
        s0 = np.float32(0.0)
        s1 = np.float32(0.0)
        s2 = np.float32(0.0)
        s3 = np.float32(0.0)
        for i in range(len(g)):
            value = g[i]
            s0 += value * W[j0, i]
            s1 += value * W[j1, i]
            s2 += value * W[j2, i]
            s3 += value * W[j3, i]
        products[c] = s0
        if c + 1 < last:
            products[c + 1] = s1
        if c + 2 < last:
            products[c + 2] = s2
        if c + 3 < last:
            products[c + 3] = s3
        c += 4


@_compiled
def reconstruct(
    start: int, stop: int, chunk: int, x: Any, offsets: Any, values: Any, indices: Any, W: Any, offset: Any, scale: Any,
    gradient: Any, products: Any, squares: Any, columns: Any,
) -> None:  # fmt: skip
    """Decode rows and differentiate their squared error.

    ``error = sum_c values[c] * W[indices[c]] + offset - x`` over the row's pairs, ``offsets[r] .. offsets[r + 1]``.
    Writes ``gradient = scale * error``, the error's sum of squares, and for each pair ``gradient . W[latent]``, the
    gradient of its code. ``start .. stop`` counts chunks of `chunk` rows; ``columns [chunks, d]`` gets the sum of the
    gradient over each.
    """
    n, d = x.shape
    for at in range(start * chunk, min(n, stop * chunk)):
        r = np.uint64(at)
        part = np.uint64(at // chunk)
        if at % chunk == 0:
            for i in range(d):
                columns[part, i] = np.float32(0.0)
        row = gradient[r]
        for i in range(d):
            row[i] = offset[i] - x[r, i]
        _decode(values, indices, offsets[r], offsets[r + np.uint64(1)], W, row)
        total = np.float32(0.0)
        for i in range(d):
            total += row[i] * row[i]
            row[i] *= scale
            columns[part, i] += row[i]
        squares[r] = total
        _products(row, indices, offsets[r], offsets[r + np.uint64(1)], W, products)
