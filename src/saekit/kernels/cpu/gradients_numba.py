"""Compiled loops for the gradients of decoder and encoder, latent by latent.

Pairs are sorted by latent first, so that a latent's gradient is summed by one thread, in one order, and written once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .intrinsics_numba import Float, Int, compiled, drain, inlined, prefetch, stream


class PairTerms(NamedTuple):
    """Pairs, row by row, and what they contribute."""

    offsets: np.ndarray
    """``[n_rows + 1]``."""
    latents: np.ndarray
    codes: np.ndarray
    slopes: np.ndarray
    wanted: np.ndarray
    """Which of them count."""


class SortedTerms(NamedTuple):
    """The wanted ones, latent by latent."""

    rows: np.ndarray
    codes: np.ndarray
    slopes: np.ndarray


class Panel(NamedTuple):
    """Columns that are worked on at a time."""

    left: Int
    right: Int


class Sums(NamedTuple):
    """For latent j, the sum of ``weights[c] * rows[sources[c]]`` for c from ``offsets[j]`` to ``offsets[j + 1]``."""

    offsets: np.ndarray
    sources: np.ndarray
    weights: np.ndarray
    rows: np.ndarray


class More(NamedTuple):
    """A further gradient, of some latents."""

    slot: np.ndarray
    """Index of each latent in `rows`, ``[n_latents]`` int32; -1 for none."""
    rows: np.ndarray
    bias: np.ndarray


class Rows(NamedTuple):
    """Where the gradient of each latent goes."""

    rows: np.ndarray
    """``[n_latents, d]``."""
    written: np.ndarray
    """Which of them are written, ``[n_latents]`` bool: the others are 0."""
    past_caches: bool
    """Whether they are written past the caches, which are too small for them."""


class OfDecoder(NamedTuple):
    """Gradient of the decoder; the last two add up over panels of columns."""

    to: Rows
    along: np.ndarray
    """``rows[j] . W_dec[j]``."""
    squares: np.ndarray
    """``|rows[j]|^2``, float64."""


class OfEncoder(NamedTuple):
    """Gradient of the encoder; `squares` adds up over panels of columns."""

    to: Rows
    bias: np.ndarray
    offset: np.ndarray
    """Sum over each chunk of latents of ``bias[j] * W_enc[j]``."""
    squares: np.ndarray


@compiled
def count_by_latent(latents: np.ndarray, wanted: np.ndarray, offsets: np.ndarray) -> None:
    """Count the wanted pairs of each latent, as segment starts ``offsets [n_latents + 1]`` (zero before the call)."""
    for c in range(len(latents)):
        offsets[latents[c] + 1] += np.int64(wanted[c])
    for j in range(len(offsets) - 1):
        offsets[j + 1] += offsets[j]


@compiled
def sort_by_latent(terms: PairTerms, positions: np.ndarray, out: SortedTerms) -> None:
    """Put each wanted pair at ``positions[latent]``, which moves on; the rows of a latent ascend."""
    for r in range(len(terms.offsets) - 1):
        for c in range(terms.offsets[r], terms.offsets[r + 1]):
            if terms.wanted[c]:
                at = positions[terms.latents[c]]
                positions[terms.latents[c]] = at + 1
                out.rows[at] = r
                out.codes[at] = terms.codes[c]
                out.slopes[at] = terms.slopes[c]


@inlined
def _sum_rows(
    at: Int,
    last: Int,
    sources: np.ndarray,
    weights: np.ndarray,
    rows: np.ndarray,
    left: Int,
    right: Int,
    out: np.ndarray,
) -> Float:
    """``out[: right - left] += sum of weights[c] * rows[sources[c], left:right]``; returns the sum of the weights.

    Four rows at a time, as in `decode_numba._decode`.
    """
    a = np.uint64(left)
    width = np.uint64(right - left)
    total = np.float32(0.0)
    while at + 4 <= last:
        # Rows are read in any order, which the processor cannot foresee: the next four are asked for, a cache line of
        # 16 numbers at a time; maybe they are of the next latent.
        for c in range(at + 4, min(at + 8, len(sources))):
            for i in range(left, right, 16):
                prefetch(rows, sources[c], i)
        r0 = np.uint64(sources[at])
        r1 = np.uint64(sources[at + 1])
        r2 = np.uint64(sources[at + 2])
        r3 = np.uint64(sources[at + 3])
        v0 = weights[at]
        v1 = weights[at + 1]
        v2 = weights[at + 2]
        v3 = weights[at + 3]
        total += (v0 + v1) + (v2 + v3)
        for i in range(width):
            out[i] += (v0 * rows[r0, a + i] + v1 * rows[r1, a + i]) + (v2 * rows[r2, a + i] + v3 * rows[r3, a + i])
        at += 4
    while at < last:
        r0 = np.uint64(sources[at])
        v0 = weights[at]
        total += v0
        for i in range(width):
            out[i] += v0 * rows[r0, a + i]
        at += 1
    return total


@inlined
def _write(row: np.ndarray, j: Int, left: Int, right: Int, rows: np.ndarray, past_caches: bool) -> None:
    """``rows[j, left:right] = row``."""
    if past_caches:
        stream(row, right - left, rows, j * rows.shape[1] + left)
    else:
        for i in range(right - left):
            rows[j, left + i] = row[i]


@compiled
def gradient_of_decoder(
    start: Int, stop: Int, panel: Panel, sums: Sums, more: More, stretch: np.ndarray, W_dec: np.ndarray, out: OfDecoder
) -> None:
    """Gradient of decoder rows in the columns of a panel, and what is needed of its length.

    ``rows[j] = sum of code * gradient[source] + stretch[j] * W_dec[j] + more.rows[slot[j]]``, before projection.

    Decoder and encoder are done one after the other because the rows that latents have in common then stay in a cache;
    columns a panel at a time where they would not even so.
    """
    # Taken out of their tuples once: see `selection_numba`.
    left, right = panel.left, panel.right
    offsets, sources, weights, summed = sums.offsets, sums.sources, sums.weights, sums.rows
    slot, extra = more.slot, more.rows
    gradient, written, past_caches = out.to.rows, out.to.written, out.to.past_caches
    along, squares = out.along, out.squares
    a = np.uint64(left)
    width = np.uint64(right - left)
    row = np.empty(width, np.float32)
    for j in range(np.uint64(start), np.uint64(stop)):
        if not written[j]:
            continue
        for i in range(left, right, 16):
            prefetch(W_dec, j, i)
        row[:] = np.float32(0.0)
        _sum_rows(offsets[j], offsets[j + np.uint64(1)], sources, weights, summed, left, right, row)
        if slot[j] >= 0:
            s = np.uint64(slot[j])
            for i in range(width):
                row[i] += extra[s, a + i]
        factor = stretch[j]
        parallel = np.float32(0.0)
        square = np.float32(0.0)
        for i in range(width):
            value = row[i] + factor * W_dec[j, a + i]
            parallel += value * W_dec[j, a + i]
            square += value * value
            row[i] = value
        _write(row, j, left, right, gradient, past_caches)
        along[j] += parallel
        squares[j] += square
    drain()


@compiled
def gradient_of_encoder(
    start: Int, stop: Int, chunk: Int, panel: Panel, sums: Sums, more: More, encoder: tuple[np.ndarray, np.ndarray],
    out: OfEncoder,
) -> None:  # fmt: skip
    """Gradient of encoder rows, as in `gradient_of_decoder`; `encoder` is W_enc and offset.

    ``start .. stop`` counts chunks of `chunk` latents.

    ``bias[j] = sum of slope + more.bias[slot[j]]`` and ``rows[j] = sum of slope * x[row] - bias[j] * offset +
    more.rows[slot[j]]``.
    """
    W_enc, offset = encoder
    n = W_enc.shape[0]
    left, right = panel.left, panel.right
    offsets, sources, weights, summed = sums.offsets, sums.sources, sums.weights, sums.rows
    slot, extra = more.slot, more.rows
    gradient, written, past_caches = out.to.rows, out.to.written, out.to.past_caches
    extra_bias, of_bias, of_offset, squares = more.bias, out.bias, out.offset, out.squares
    a = np.uint64(left)
    width = np.uint64(right - left)
    row = np.empty(width, np.float32)
    for part in range(start, stop):
        for i in range(width):
            of_offset[part, a + i] = np.float32(0.0)
        for j in range(np.uint64(part * chunk), np.uint64(min(n, (part + 1) * chunk))):
            if not written[j]:
                of_bias[j] = np.float32(0.0)
                continue
            for i in range(left, right, 16):
                prefetch(W_enc, j, i)
            row[:] = np.float32(0.0)
            bias = _sum_rows(offsets[j], offsets[j + np.uint64(1)], sources, weights, summed, left, right, row)
            if slot[j] >= 0:
                s = np.uint64(slot[j])
                bias += extra_bias[s]
                for i in range(width):
                    row[i] += extra[s, a + i]
            of_bias[j] = bias
            square = np.float32(0.0)
            for i in range(width):
                value = row[i] - bias * offset[a + i]
                of_offset[part, a + i] += bias * W_enc[j, a + i]
                square += value * value
                row[i] = value
            _write(row, j, left, right, gradient, past_caches)
            squares[j] += square
    drain()
