"""Compiled loops that round rows and latents to bf16 or whole numbers and sum what was lost."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .intrinsics_numba import PANEL, _bits_of_float, _compiled, _dot, _float_of_bits, _narrow, _widen

LARGEST = np.float32(1e18)
"""Rows and weights with a norm above this could overflow the product: the plain kernel takes them."""

BF16_UNIT = 2.0**-8
"""Largest relative error of rounding to bf16 (8 bits of significand, to nearest)."""


@_compiled
def round_rows(start: int, stop: int, x: Any, offset: Any, rounded: Any, norm: Any, residual: Any, dot: Any) -> None:
    """bf16 copy of rows, upper bounds of their norm and of the norm of what rounding lost, and ``row . offset``.

    `norm` bounds the length of the row and of its bf16 copy. Rows with NaN or infinity get a norm that is not finite.
    The copy of a row that the plain kernel takes (see `LARGEST`) is 0: oneDNN's bf16 product on AMX reads past the end
    of a row whose length is no multiple of its tile and multiplies what it finds by 0, so that NaN in one row would
    become NaN in the row before it.
    """
    d = x.shape[1]
    # Relative error of the sums below, and what flushing of denormal numbers may lose per entry.
    slack = np.float32(1.0 + (d + 8) * 2.0**-23)
    tiny = np.float32(np.sqrt(d) * 2.0**-125)
    for r in range(start, stop):
        total = np.float32(0.0)
        lost = np.float32(0.0)
        for i in range(d):
            value = x[r, i]
            bits = _narrow(value)
            rounded[r, i] = bits
            difference = value - _widen(bits)
            total += value * value
            lost += difference * difference
        residual[r] = np.sqrt(lost) * slack + tiny
        norm[r] = np.sqrt(total) * slack + residual[r]
        dot[r] = _dot(x, r, offset)
        if not norm[r] <= LARGEST:
            for i in range(d):
                rounded[r, i] = np.int16(0)


MOST_WHOLE = 2**17
"""Columns of rows of whole numbers: their sum is exact in fp32."""

TINY = np.float32(1e-12)
"""Rows without a larger number are 0 as whole numbers: the product of two scales must not underflow."""


@njit(inline="always")
def _whole(value: Any) -> Any:
    """The nearest whole number."""
    return np.int32(value + (np.float32(0.5) if value >= np.float32(0.0) else np.float32(-0.5)))


@_compiled
def round_rows8(
    start: int, stop: int, x: Any, factor: Any, offset: Any, shift: int, rounded: Any, scale: Any, total: Any,
    norm: Any, residual: Any, dot: Any,
) -> None:  # fmt: skip
    """Rows as whole numbers from -127 to 127: ``row * factor = scale * (rounded - shift)``.

    ``total`` gets the sum of a row's whole numbers, of which there are at most `MOST_WHOLE`; `norm` and `residual` are
    those of ``row * factor``. The rest is as in `round_rows`.
    """
    d = x.shape[1]
    slack = np.float32(1.0 + (d + 8) * 2.0**-23)
    tiny = np.float32(np.sqrt(d) * 2.0**-125)
    for r in range(start, stop):
        bits: Any = np.int64(0)
        for i in range(d):  # the largest as whole numbers, which becomes vector code
            bits = max(bits, _bits_of_float(x[r, i] * factor[i]) & 0x7FFFFFFF)  # type: ignore[call-arg]
        largest: Any = _float_of_bits(bits)  # type: ignore[call-arg]
        squares = np.float32(0.0)
        for i in range(d):
            value = x[r, i] * factor[i]
            squares += value * value
        step = largest / np.float32(127.0)
        inverse = np.float32(127.0) / largest if largest >= TINY else np.float32(0.0)
        row = rounded[r]
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
        for i in range(d, rounded.shape[1]):
            rounded[r, i] = np.uint8(0)
        scale[r] = step
        total[r] = np.int32(count)
        # `factor` times the row, `scale` and its multiples are rounded too.
        length = np.sqrt(squares) * slack
        residual[r] = np.sqrt(lost) * slack + length * np.float32(2.0**-22) + tiny
        norm[r] = length + residual[r]
        dot[r] = _dot(x, r, offset)


@_compiled
def round_panels(
    start: int, stop: int, W: Any, offset: Any, panels: Any, norm: Any, residual: Any, dot: Any
) -> None:  # fmt: skip
    """`round_rows` of the latents of panels ``start .. stop``, in the order of `low_bit_matmul.multiply`.

    ``panels[s, p, j]`` is the pair p of latent ``s * PANEL + j``; 0 beyond the last latent and the last entry of a row.
    """
    n = len(W)
    pairs = panels.shape[1]
    rounded = np.zeros((PANEL, 2 * pairs), np.int16)
    words = rounded.view(np.int32)
    for s in range(start, stop):
        first = s * PANEL
        last = min(n, first + PANEL)
        if last < first + PANEL:
            rounded[:] = 0
        round_rows(
            0, last - first, W[first:last], offset, rounded, norm[first:last], residual[first:last], dot[first:last]
        )  # fmt: skip
        for p in range(pairs):
            for j in range(PANEL):
                panels[s, p, j] = words[j, p]


@_compiled
def round_panels8(
    start: int, stop: int, W: Any, factor: Any, offset: Any, panels: Any, scales: Any, starts: Any, norm: Any,
    residual: Any, dot: Any,
) -> None:  # fmt: skip
    """`round_rows8` of the latents of panels ``start .. stop``, in the order of `low_bit_matmul.multiply8`.

    `scales` and `starts` have entries for whole panels: 0 beyond the last latent.
    """
    n = len(W)
    count = panels.shape[1]
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
        round_rows8(
            0, last - first, W[first:last], factor, offset, 0, rounded, scale, total, norm[first:last],
            residual[first:last], dot[first:last],
        )  # fmt: skip
        for j in range(PANEL):
            scales[first + j] = scale[j]
            starts[first + j] = np.int32(-128) * total[j]
        for p in range(count):
            for j in range(PANEL):
                panels[s, p, j] = words[j, p]


@_compiled
def center_rows(start: int, stop: int, x: Any, scale: Any, center: Any, out: Any) -> None:
    """``out = x * scale - center``."""
    for r in range(start, stop):
        for i in range(x.shape[1]):
            out[r, i] = x[r, i] * scale - center[i]


@_compiled
def spread(x: Any, W: Any) -> Any:
    """Standard deviation of the entries of ``x @ W.T``."""
    total: Any = 0.0
    squares: Any = 0.0
    for r in range(len(x)):
        for j in range(len(W)):
            value = np.float32(0.0)
            for i in range(x.shape[1]):
                value += x[r, i] * W[j, i]
            total += value
            squares += value * value
    count = len(x) * len(W)
    return np.sqrt(max(squares / count - (total / count) * (total / count), 0.0))


@_compiled
def row_norms(start: int, stop: int, x: Any, norms: Any) -> None:
    """Length of each row."""
    for r in range(start, stop):
        total = np.float32(0.0)
        for i in range(x.shape[1]):
            total += x[r, i] * x[r, i]
        norms[r] = np.sqrt(total)


@_compiled
def column_sums(start: int, stop: int, chunk: int, x: Any, columns: Any) -> None:
    """Sum of the rows over chunks of `chunk` rows."""
    n, d = x.shape
    for part in range(start, stop):
        for i in range(d):
            columns[part, i] = np.float32(0.0)
        for r in range(part * chunk, min(n, (part + 1) * chunk)):
            for i in range(d):
                columns[part, i] += x[r, i]


@_compiled
def squares_around(start: int, stop: int, chunk: int, x: Any, mean: Any, squares: Any) -> None:
    """Sum of ``|row - mean|^2`` over chunks of `chunk` rows."""
    n, d = x.shape
    for part in range(start, stop):
        total = np.float32(0.0)
        for r in range(part * chunk, min(n, (part + 1) * chunk)):
            for i in range(d):
                away = x[r, i] - mean[i]
                total += away * away
        squares[part] = total
