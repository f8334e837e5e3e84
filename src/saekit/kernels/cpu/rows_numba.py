"""Compiled loops over rows that are no products: centring, lengths, sums over chunks.

Loops take ranges ``start .. stop``, each of which one thread works on. Sums over rows are taken a chunk of a fixed
number of rows at a time, so that they do not depend on how many threads there are.
"""

from __future__ import annotations

import numpy as np

from .intrinsics_numba import Float, Int, compiled


@compiled
def center_rows(start: Int, stop: Int, x: np.ndarray, scale: Float, center: np.ndarray, out: np.ndarray) -> None:
    """Write ``out = x * scale - center``."""
    for r in range(start, stop):
        for i in range(x.shape[1]):
            out[r, i] = x[r, i] * scale - center[i]


@compiled
def row_norms(start: Int, stop: Int, x: np.ndarray, norms: np.ndarray) -> None:
    """Write the length of each row."""
    for r in range(start, stop):
        total = np.float32(0.0)
        for i in range(x.shape[1]):
            total += x[r, i] * x[r, i]
        norms[r] = np.sqrt(total)


@compiled
def column_sums(start: Int, stop: Int, chunk: Int, x: np.ndarray, columns: np.ndarray) -> None:
    """Write the sum of the rows of each chunk of `chunk` rows."""
    n, d = x.shape
    for part in range(start, stop):
        for i in range(d):
            columns[part, i] = np.float32(0.0)
        for r in range(part * chunk, min(n, (part + 1) * chunk)):
            for i in range(d):
                columns[part, i] += x[r, i]


@compiled
def squares_around(
    start: Int, stop: Int, chunk: Int, x: np.ndarray, mean: np.ndarray, squares: np.ndarray
) -> None:  # fmt: skip
    """Write the sum of ``|row - mean|^2`` of each chunk of `chunk` rows."""
    n, d = x.shape
    for part in range(start, stop):
        total = np.float32(0.0)
        for r in range(part * chunk, min(n, (part + 1) * chunk)):
            for i in range(d):
                away = x[r, i] - mean[i]
                total += away * away
        squares[part] = total


@compiled
def product_deviation(x: np.ndarray, W: np.ndarray) -> Float:
    """Return the standard deviation of the entries of ``x @ W.T``."""
    total: Float = 0.0
    squares: Float = 0.0
    for r in range(len(x)):
        for j in range(len(W)):
            value = np.float32(0.0)
            for i in range(x.shape[1]):
                value += x[r, i] * W[j, i]
            total += value
            squares += value * value
    count = len(x) * len(W)
    return np.sqrt(max(squares / count - (total / count) * (total / count), 0.0))
