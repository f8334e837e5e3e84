"""Compiled loops of the decoder and of the products that its gradient needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .intrinsics_numba import Float, Int, compiled, inlined


class Codes(NamedTuple):
    """Codes of (row, latent) pairs, row by row."""

    offsets: np.ndarray
    """``[n_rows + 1]``."""
    latents: np.ndarray
    values: np.ndarray


class Decoder(NamedTuple):
    """What codes are decoded with."""

    W: np.ndarray
    offset: np.ndarray
    scale: Float
    """Factor of the error in the gradient, float32."""


class Differentiated(NamedTuple):
    """A reconstruction and its gradient."""

    gradient: np.ndarray
    """``[n, d]``."""
    slopes: np.ndarray
    """``gradient . W[latent]`` of each pair: the gradient of its code."""
    squares: np.ndarray
    """Sum of squares of each row's error."""
    columns: np.ndarray
    """Sum of the gradient over each chunk of rows, ``[chunks, d]``."""


@inlined
def _decode(values: np.ndarray, latents: np.ndarray, first: Int, last: Int, W: np.ndarray, out: np.ndarray) -> None:
    """``out += sum of values[c] * W[latents[c]]`` for c from `first` to `last`.

    Four at a time: `out` is read and written once for four rows of `W`, whose waits for memory overlap.
    """
    c = first
    while c + 4 <= last:
        v0 = values[c]
        v1 = values[c + 1]
        v2 = values[c + 2]
        v3 = values[c + 3]
        # Without a sign, an index needs no check for counting from the end.
        j0 = np.uint64(latents[c])
        j1 = np.uint64(latents[c + 1])
        j2 = np.uint64(latents[c + 2])
        j3 = np.uint64(latents[c + 3])
        for i in range(len(out)):
            out[i] += (v0 * W[j0, i] + v1 * W[j1, i]) + (v2 * W[j2, i] + v3 * W[j3, i])
        c += 4
    while c < last:
        v0 = values[c]
        j0 = np.uint64(latents[c])
        for i in range(len(out)):
            out[i] += v0 * W[j0, i]
        c += 1


@inlined
def _products(g: np.ndarray, latents: np.ndarray, first: Int, last: Int, W: np.ndarray, products: np.ndarray) -> None:
    """``products[c] = g . W[latents[c]]`` for c from `first` to `last`, four at a time as in `_decode`."""
    c = first
    while c < last:
        z = last - 1  # behind the end, the last one again
        j0 = np.uint64(latents[c])
        j1 = np.uint64(latents[min(c + 1, z)])
        j2 = np.uint64(latents[min(c + 2, z)])
        j3 = np.uint64(latents[min(c + 3, z)])
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


@compiled
def reconstruct(
    start: Int, stop: Int, chunk: Int, x: np.ndarray, codes: Codes, decoder: Decoder, out: Differentiated
) -> None:  # fmt: skip
    """Decode rows and differentiate their squared error.

    ``error = sum_c values[c] * W[latents[c]] + offset - x`` over the row's pairs, ``gradient = scale * error``.
    ``start .. stop`` counts chunks of `chunk` rows. Slopes are taken at once, while the row's latents are in a cache.
    """
    n, d = x.shape
    offsets, latents, values = codes.offsets, codes.latents, codes.values  # once: see `selection_numba`
    W, offset, scale = decoder.W, decoder.offset, decoder.scale
    gradient, slopes, squares, columns = out.gradient, out.slopes, out.squares, out.columns
    for at in range(start * chunk, min(n, stop * chunk)):
        r = np.uint64(at)
        part = np.uint64(at // chunk)
        if at % chunk == 0:
            for i in range(d):
                columns[part, i] = np.float32(0.0)
        row = gradient[r]
        for i in range(d):
            row[i] = offset[i] - x[r, i]
        first, last = offsets[r], offsets[r + np.uint64(1)]
        _decode(values, latents, first, last, W, row)
        total = np.float32(0.0)
        for i in range(d):
            total += row[i] * row[i]
            row[i] *= scale
            columns[part, i] += row[i]
        squares[r] = total
        _products(row, latents, first, last, W, slopes)
