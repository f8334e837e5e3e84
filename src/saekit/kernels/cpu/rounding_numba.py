"""Compiled loops that round rows and latents to bf16 or whole numbers and measure what was lost.

What is lost is measured, not estimated: the bound of a product (see `rounded.row_reach`) uses the length of the
difference between a row and its copy, which is several times less than the largest rounding error of each entry.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .intrinsics_numba import (
    FAST,
    Float,
    Int,
    bits_of_float,
    compiled,
    float_of_bits,
    inlined,
    lane_maxima_of_64,
    narrow,
    widen,
)
from .low_bit_matmul import LANE, PANEL, WholeLatents

BF16_UNIT = 2.0**-8
"""Largest relative error of rounding to bf16 (8 bits of significand, to nearest)."""

LARGEST = np.float32(1e18)
"""Rows and weights with a norm above this are left to the plain kernel: a product of two of them, 1e36, and a sum of
such products stay below the largest float32, 3e38."""

MOST_WHOLE = 2**17
"""Maximum columns of rows of whole numbers. The sum of a row's, at most 127 * 2^17, is then exact in fp32, and the
product of two rows, at most 127^2 * 2^17, stays below 2^31; that it wraps around on the way does not matter."""

TINY = np.float32(1e-12)
"""Rows without a larger number are 0 as whole numbers: the product of two scales must not underflow."""


class Facts(NamedTuple):
    """What is known about rounded rows; the arrays are ``[n]`` float32."""

    norm: np.ndarray
    """At least the length of the row, and of its copy; not finite when the row is not."""
    residual: np.ndarray
    """At least the length of the difference between the two."""
    dot: np.ndarray
    """Product of the row, not rounded, with an offset."""


class WholeCopy(NamedTuple):
    """Rows as whole numbers."""

    numbers: np.ndarray
    """``[n, width]`` uint8."""
    scale: np.ndarray
    """What the numbers count, ``[n]``."""
    total: np.ndarray
    """Sum of a row's numbers, ``[n]`` int32."""


# Compiled by itself, so that its terms are added in the same order wherever it is used: `dot` does not depend on the
# format of the copy, and so neither does the bias of an encoder.
@njit(fastmath=FAST)
def _dot(x: np.ndarray, r: Int, offset: np.ndarray) -> Float:
    """Return ``x[r] . offset``."""
    along = np.float32(0.0)
    for i in range(x.shape[1]):
        along += x[r, i] * offset[i]
    return along


@inlined
def _slack(d: Int) -> Float:
    """Return a factor that makes an upper bound of a sum of d squares, or its root.

    A sum of d rounded terms is off by at most d 2^-24 of itself in any order (Higham 2002, Accuracy and Stability of
    Numerical Algorithms, section 3.1); twice that, and some more for the root and this product.
    """
    return np.float32(1.0 + (d + 8) * 2.0**-23)


@inlined
def _flushed(d: Int) -> Float:
    """Return the largest length of d entries of which each was flushed to 0 for being below 2^-126, and some more."""
    return np.float32(np.sqrt(d) * 2.0**-125)


@compiled
def round_rows(
    start: Int, stop: Int, x: np.ndarray, offset: np.ndarray, copy: np.ndarray, facts: Facts
) -> None:  # fmt: skip
    """Round rows to bf16: their bits go into `copy`.

    The copy of a row that the plain kernel takes (see `LARGEST`) is 0: oneDNN's bf16 product on AMX reads past the end
    of a row whose length is no multiple of its tile and multiplies what it finds by 0, so that NaN in one row would
    become NaN in the row before it.
    """
    d = x.shape[1]
    slack = _slack(d)
    tiny = _flushed(d)
    for r in range(start, stop):
        total = np.float32(0.0)
        lost = np.float32(0.0)
        for i in range(d):
            value = x[r, i]
            bits = narrow(value)
            copy[r, i] = bits
            difference = value - widen(bits)
            total += value * value
            lost += difference * difference
        facts.residual[r] = np.sqrt(lost) * slack + tiny
        facts.norm[r] = np.sqrt(total) * slack + facts.residual[r]  # of the row and, by the triangle inequality, copy
        facts.dot[r] = _dot(x, r, offset)
        if not facts.norm[r] <= LARGEST:  # also when it is NaN
            for i in range(d):
                copy[r, i] = np.int16(0)


@compiled
def measure_rows(start: Int, stop: Int, x: np.ndarray, offset: np.ndarray, facts: Facts) -> None:
    """`round_rows` where the product takes the rows as they are, in fp32."""
    d = x.shape[1]
    slack = _slack(d)
    tiny = _flushed(d)  # a library may flush entries to 0, too
    for r in range(start, stop):
        total = np.float32(0.0)
        for i in range(d):
            total += x[r, i] * x[r, i]
        facts.residual[r] = tiny
        facts.norm[r] = np.sqrt(total) * slack + tiny
        facts.dot[r] = _dot(x, r, offset)


@compiled
def narrow_product(product: np.ndarray, bias: np.ndarray, first: Int, P: np.ndarray, maxima: np.ndarray) -> None:
    """Write ``product + bias`` in bf16 into the columns of `P` from `first` on, and the largest of every whole lane.

    Parameters
    ----------
    product
        Rows and some latents in fp32, ``[n, m]``.
    bias
        Biases of these latents, ``[m]``.
    first
        Number of the first of them: a multiple of `PANEL`.
    P
        bf16 as int16, ``[at least n, at least first + m]``.
    maxima
        Keys of lanes of `LANE` latents, ``[at least n, at least lanes]``.
    """
    n, m = product.shape
    start = np.uint64(first)
    whole = m - m % PANEL
    for at in range(n):
        r = np.uint64(at)
        best = maxima[r]
        for i in range(np.uint64(m)):
            P[r, start + i] = narrow(product[r, i] + bias[i])
        for s in range(0, whole, PANEL):
            column = np.uint64(first + s)
            lane_maxima_of_64(P, r, column, best, np.uint64((first + s) // LANE), LANE)


@inlined
def _whole(value: Float) -> Int:
    """Return the nearest whole number."""
    return np.int32(value + (np.float32(0.5) if value >= np.float32(0.0) else np.float32(-0.5)))


@compiled
def round_rows8(
    start: Int, stop: Int, x: np.ndarray, factor: np.ndarray, offset: np.ndarray, shift: Int, in_pairs: bool,
    copy: WholeCopy, facts: Facts,
) -> None:  # fmt: skip
    """Round rows to whole numbers from -127 to 127: ``row * factor = scale * (numbers - shift)``.

    With `in_pairs`, the sizes of the two numbers of a pair of columns add up to 128 at most: the sum of two products
    with bytes is then at most 128 * 255, which 16 bits hold. There are at most `MOST_WHOLE` columns. `norm` and
    `residual` are those of ``row * factor``. -128 is not used, so that a number and its negative are rounded alike.
    """
    d = x.shape[1]
    slack = _slack(d)
    tiny = _flushed(d)
    for r in range(start, stop):
        bits = np.int64(0)
        for i in range(d):  # the largest as whole numbers, which becomes vector code
            bits = max(bits, bits_of_float(x[r, i] * factor[i]) & 0x7FFFFFFF)
        if in_pairs:  # the sum of two is 127 steps then, and rounding adds half a step to each
            for i in range(d // 2):
                first = abs(x[r, 2 * i] * factor[2 * i])
                bits = max(bits, bits_of_float(first + abs(x[r, 2 * i + 1] * factor[2 * i + 1])) & 0x7FFFFFFF)
        largest = float_of_bits(bits)
        squares = np.float32(0.0)
        for i in range(d):
            value = x[r, i] * factor[i]
            squares += value * value
        step = largest / np.float32(127.0)
        inverse = np.float32(127.0) / largest if largest >= TINY else np.float32(0.0)
        row = copy.numbers[r]
        for i in range(d):
            row[i] = np.uint8(_whole(x[r, i] * factor[i] * inverse) + shift)
        lost = np.float32(0.0)
        count = np.float32(0.0)  # exact below 2^24
        for i in range(d):
            value = x[r, i] * factor[i]
            number = np.float32(_whole(value * inverse))
            difference = value - number * step
            lost += difference * difference
            count += number
        for i in range(d, copy.numbers.shape[1]):
            copy.numbers[r, i] = np.uint8(0)
        copy.scale[r] = step
        copy.total[r] = np.int32(count)
        # `factor` times the row, `scale` and its multiples are rounded too: 2^-22 is four such errors.
        length = np.sqrt(squares) * slack
        facts.residual[r] = np.sqrt(lost) * slack + length * np.float32(2.0**-22) + tiny
        facts.norm[r] = length + facts.residual[r]
        facts.dot[r] = _dot(x, r, offset)


@compiled
def round_panels(
    start: Int, stop: Int, W: np.ndarray, offset: np.ndarray, panels: np.ndarray, facts: Facts
) -> None:  # fmt: skip
    """`round_rows` of the latents of panels ``start .. stop``, in the order of `low_bit_matmul.multiply`.

    ``panels[s, p, j]`` is the pair p of latent ``s * PANEL + j``; 0 beyond the last latent and the last entry of a row.
    """
    n = len(W)
    pairs = panels.shape[1]
    # A panel is rounded row by row and then transposed, which stays in the first cache.
    rounded = np.zeros((PANEL, 2 * pairs), np.int16)
    words = rounded.view(np.int32)
    for s in range(start, stop):
        first = s * PANEL
        last = min(n, first + PANEL)
        if last < first + PANEL:
            rounded[:] = 0
        part = Facts(facts.norm[first:last], facts.residual[first:last], facts.dot[first:last])
        round_rows(0, last - first, W[first:last], offset, rounded, part)
        for p in range(pairs):
            for j in range(PANEL):
                panels[s, p, j] = words[j, p]


@compiled
def round_panels8(
    start: Int, stop: Int, W: np.ndarray, factor: np.ndarray, offset: np.ndarray, in_pairs: bool, panels: WholeLatents,
    facts: Facts,
) -> None:  # fmt: skip
    """`round_rows8` of the latents of panels ``start .. stop``, in the order of `low_bit_matmul.multiply8`.

    ``panels.words[s, t, p, j]``: word p of latent j of tile t. `scale` and `starts` have entries for whole panels:
    0 beyond the last latent.
    """
    n = len(W)
    tiles, count, wide = panels.words.shape[1:]
    rounded = np.zeros((PANEL, 4 * count), np.uint8)
    words = rounded.view(np.int32)
    total = np.zeros(PANEL, np.int32)
    scale = np.zeros(PANEL, np.float32)
    for s in range(start, stop):
        first = s * PANEL
        last = min(n, first + PANEL)
        if last < first + PANEL:
            rounded[:] = 0
            scale[:] = 0
            total[:] = 0
        part = Facts(facts.norm[first:last], facts.residual[first:last], facts.dot[first:last])
        copy = WholeCopy(rounded, scale, total)
        round_rows8(0, last - first, W[first:last], factor, offset, 0, in_pairs, copy, part)
        for j in range(PANEL):
            panels.scale[first + j] = scale[j]
            panels.starts[first + j] = np.int32(-128) * total[j]
        for t in range(tiles):
            for p in range(count):
                for j in range(wide):
                    panels.words[s, t, p, j] = words[t * wide + j, p]
