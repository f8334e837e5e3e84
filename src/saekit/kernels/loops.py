"""Compiled inner loops (numba). Plain numpy arrays in, results written in place; `saekit.kernels.cpu` is the caller.

Every function works on a range ``start .. stop`` of rows or latents that nobody else writes to, so ranges may run on
several threads. What is computed for a row or a latent does not depend on the range it is in: results are bitwise the
same for any number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Sums may be re-associated and multiply-adds fused; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz"}

WAITING = 128
"""Latents that are found before they are multiplied: products in a row overlap their waits for memory."""

BF16_UNIT = 2.0**-8
"""Largest relative error of rounding to bf16 (8 bits of significand, to nearest)."""


def _compiled(function: Any) -> Any:
    """Compile on first use, release Python's lock while running, and remember the machine code between processes."""
    options: Any = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to write to: compiled anew in every process
        return njit(**options)(function)


@intrinsic
def _float_of_bits(typingctx: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), build


@intrinsic
def _bits_of_float(typingctx: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(builder.bitcast(args[0], ir.IntType(32)), ir.IntType(64))

    return types.int64(types.float32), build


@njit(inline="always")
def _widen(bits: Any) -> Any:
    """float32 of a bf16 given as int16."""
    return _float_of_bits(np.int64(bits) << 16)  # type: ignore[call-arg]


@njit(inline="always")
def _narrow(value: Any) -> Any:
    """bf16 bits (int16) of a float32, rounded to nearest, ties to even."""
    bits: Any = _bits_of_float(value)  # type: ignore[call-arg]
    return np.int16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@_compiled
def round_rows(start: int, stop: int, x: Any, offset: Any, rounded: Any, norm: Any, residual: Any, dot: Any) -> None:
    """bf16 copy of rows, upper bounds of their norm and of the norm of what rounding lost, and ``row . offset``.

    `norm` bounds the length of the row and of its bf16 copy. Rows with NaN or infinity get a norm that is not finite.
    """
    d = x.shape[1]
    # Relative error of the sums below, and what flushing of denormal numbers may lose per entry.
    slack = np.float32(1.0 + (d + 8) * 2.0**-23)
    tiny = np.float32(np.sqrt(d) * 2.0**-125)
    for r in range(start, stop):
        total = np.float32(0.0)
        lost = np.float32(0.0)
        along = np.float32(0.0)
        for i in range(d):
            value = x[r, i]
            bits = _narrow(value)
            rounded[r, i] = bits
            difference = value - _widen(bits)
            total += value * value
            lost += difference * difference
            along += value * offset[i]
        residual[r] = np.sqrt(lost) * slack + tiny
        norm[r] = np.sqrt(total) * slack + residual[r]
        dot[r] = along


@njit(inline="always")
def _error(p: Any, a: Any, reach: Any) -> Any:
    """Bound of the difference between the approximate value ``a = p + bias`` and the exact one."""
    # bf16 rounding of the product; fp32 rounding of the addition here and in the reference; rounding of both factors.
    return np.float32(BF16_UNIT * 1.01) * abs(p) + np.float32(2.0**-22) * abs(a) + reach


@njit(inline="always")
def _insert(score: Any, j: Any, scores: Any, latents: Any, held: Any) -> Any:
    """Put a latent into a list of the best, sorted by score, then latent; returns how many it holds."""
    room = len(scores)
    if held == room:
        if scores[room - 1] > score or (scores[room - 1] == score and latents[room - 1] < j):
            return held
        held -= 1
    place = held
    while place > 0 and (scores[place - 1] < score or (scores[place - 1] == score and latents[place - 1] > j)):
        scores[place] = scores[place - 1]
        latents[place] = latents[place - 1]
        place -= 1
    scores[place] = score
    latents[place] = j
    return held + 1


@njit(inline="always")
def _score(
    waiting: Any, n_waiting: Any, found: Any, x: Any, row: Any, W: Any, bias: Any, scores: Any, latents: Any, held: Any
) -> Any:
    """Multiply the first `n_waiting` latents of `waiting` in fp32 and put them into the list; returns its length."""
    for c in range(n_waiting):
        j = np.uint64(waiting[c])
        total = np.float32(0.0)
        for i in range(x.shape[1]):
            total += x[row, i] * W[j, i]
        found[c] = total + bias[j]
    for c in range(n_waiting):
        held = _insert(found[c], waiting[c], scores, latents, held)
    return held


@_compiled
def choose(
    start: int, stop: int, first: int, P: Any, x: Any, row_reach: Any, W: Any, bias: Any, latent_reach: Any,
    most_reach: Any, most_bias: Any, k: int, lanes: int, exact: bool, values: Any, indices: Any,
) -> None:  # fmt: skip
    """The `k` largest of ``x[r] . W[j] + bias[j]`` per row, from a bf16 product that narrows them down.

    For every row r (of the block, row ``first + r`` of x) and latent j the product P is off by at most
    ``row_reach[r] * latent_reach[j]`` plus its own rounding. At least k latents with the largest P are multiplied again
    in fp32. A latent whose upper bound is below the k-th best of these is not among the k largest; all others are
    multiplied again too. The k best are returned, largest first.

    Rows must be finite. `lanes` is at least k; `most_reach` and `most_bias` are the largest ``latent_reach``
    and ``|bias|``.
    """
    n = P.shape[1]
    best = np.empty(lanes, np.float32)
    scores = np.empty(k, np.float32)
    latents = np.empty(k, np.int64)
    waiting = np.empty(WAITING, np.int64)
    found = np.empty(WAITING, np.float32)
    zero = np.float32(0.0)
    for r in range(start, stop):
        row = np.uint64(first + r)
        # --- the largest approximate value of every lane (latents i, i + lanes, i + 2 lanes, ...)
        for i in range(lanes):
            best[i] = _widen(P[r, i]) + bias[i]
        for base in range(np.uint64(lanes), np.uint64(n), np.uint64(lanes)):
            for i in range(min(np.uint64(lanes), np.uint64(n) - base)):
                a = _widen(P[r, base + i]) + bias[base + i]
                best[i] = a if a > best[i] else best[i]
        # --- a level that at least k lanes reach: bisection
        level = best[0]
        top = best[0]
        for i in range(lanes):
            level = best[i] if best[i] < level else level
            top = best[i] if best[i] > top else top
        largest = max(abs(level), abs(top))
        for _ in range(24):
            middle = np.float32(0.5) * level + np.float32(0.5) * top
            if not level < middle:
                break
            count = np.int32(0)
            for i in range(lanes):
                count += np.int32(best[i] >= middle)
            if count >= k:
                level = middle
                if count <= k + k // 8:
                    break
            else:
                top = middle
        # --- latents at or above the level
        held = 0
        n_waiting = 0
        for i in range(lanes):
            if best[i] >= level:
                for j in range(i, n, lanes):
                    if _widen(P[r, j]) + bias[j] >= level:
                        waiting[n_waiting] = j
                        n_waiting += 1
                        if n_waiting == WAITING:
                            held = _score(waiting, n_waiting, found, x, row, W, bias, scores, latents, held)
                            n_waiting = 0
        held = _score(waiting, n_waiting, found, x, row, W, bias, scores, latents, held)
        # --- latents below it that may still be among the k best (those that cannot be positive have value 0 anyway)
        if exact and held == k:
            reach = row_reach[row]
            # 1.01: a negative value that its error lifts above 0 is itself not larger than that error.
            widest = np.float32(1.01) * _error(largest + most_bias, largest + most_bias, reach * most_reach)
            n_waiting = 0
            for i in range(lanes):
                if best[i] + widest >= max(scores[k - 1], zero):
                    for j in range(i, n, lanes):
                        p = _widen(P[r, j])
                        a = p + bias[j]
                        if a < level:
                            upper = a + _error(p, a, reach * latent_reach[j])
                            if upper >= scores[k - 1] and upper > zero:
                                waiting[n_waiting] = j
                                n_waiting += 1
                                if n_waiting == WAITING:
                                    held = _score(waiting, n_waiting, found, x, row, W, bias, scores, latents, held)
                                    n_waiting = 0
            held = _score(waiting, n_waiting, found, x, row, W, bias, scores, latents, held)
        for c in range(held):
            values[row, c] = max(scores[c], zero)
            indices[row, c] = latents[c]


@_compiled
def choose_above(
    start: int, stop: int, first: int, P: Any, x: Any, row_reach: Any, W: Any, bias: Any, latent_reach: Any,
    threshold: Any, lanes: int, values: Any, indices: Any, counts: Any,
) -> None:  # fmt: skip
    """All latents of a row with ``x[r] . W[j] + bias[j] > threshold[j]``, from a bf16 product that narrows them down.

    Row r of the block writes its latents in ascending order into row r of `values` and `indices`, and their number into
    ``counts[r]``; the number is -1 when there are more than these have room for. The bound is that of `choose`.
    """
    n = P.shape[1]
    d = x.shape[1]
    room = values.shape[1]
    best = np.empty(lanes, np.float32)
    zero = np.float32(0.0)
    for r in range(start, stop):
        row = np.uint64(first + r)
        reach = row_reach[row]
        # --- how far the best latent of every lane (i, i + lanes, i + 2 lanes, ...) could be above its threshold
        for i in range(lanes):
            best[i] = -np.float32(np.inf)
        for base in range(np.uint64(0), np.uint64(n), np.uint64(lanes)):
            for i in range(min(np.uint64(lanes), np.uint64(n) - base)):
                p = _widen(P[r, base + i])
                a = p + bias[base + i]
                a = a + _error(p, a, reach * latent_reach[base + i]) - threshold[base + i]
                best[i] = a if a > best[i] else best[i]
        found = 0
        for i in range(lanes):
            if not best[i] >= zero:
                continue
            for j in range(i, n, lanes):
                p = _widen(P[r, j])
                a = p + bias[j]
                if a + _error(p, a, reach * latent_reach[j]) - threshold[j] >= zero:
                    if found == room:
                        found = -1
                        break
                    indices[r, found] = j
                    found += 1
            if found < 0:
                break
        counts[r] = found
        # --- multiplied again in fp32; those at or below their threshold go
        kept = 0
        for c in range(found):
            latent = np.uint64(indices[r, c])
            total = zero
            for i in range(d):
                total += x[row, i] * W[latent, i]
            total += bias[latent]
            if total > threshold[latent]:
                values[r, kept] = total
                indices[r, kept] = indices[r, c]
                kept += 1
        if found >= 0:
            counts[r] = kept


@_compiled
def reconstruct(
    start: int, stop: int, chunk: int, x: Any, values: Any, indices: Any, W: Any, offset: Any, scale: Any,
    gradient: Any, products: Any, squares: Any, columns: Any,
) -> None:  # fmt: skip
    """Decode rows and differentiate their squared error.

    ``error = sum_c values[c] * W[indices[c]] + offset - x``; writes ``gradient = scale * error``, its sum of squares
    (before scaling), and for each code with a positive value ``gradient . W[latent]``, the gradient of the code.
    ``start .. stop`` counts chunks of `chunk` rows; ``columns [chunks, d]`` gets the sum of the gradient over each.
    """
    k = values.shape[1]
    n, d = x.shape
    for at in range(start * chunk, min(n, stop * chunk)):
        r = np.uint64(at)
        part = np.uint64(at // chunk)
        if at % chunk == 0:
            for i in range(d):
                columns[part, i] = np.float32(0.0)
        for i in range(d):
            gradient[r, i] = offset[i] - x[r, i]
        for c in range(k):
            value = values[r, c]
            if value > np.float32(0.0):
                j = np.uint64(indices[r, c])
                for i in range(d):
                    gradient[r, i] += value * W[j, i]
        total = np.float32(0.0)
        for i in range(d):
            total += gradient[r, i] * gradient[r, i]
            gradient[r, i] *= scale
            columns[part, i] += gradient[r, i]
        squares[r] = total
        for c in range(k):
            product = np.float32(0.0)
            if values[r, c] > np.float32(0.0):
                j = np.uint64(indices[r, c])
                for i in range(d):
                    product += gradient[r, i] * W[j, i]
            products[r, c] = product


@_compiled
def count_by_latent(values: Any, indices: Any, offsets: Any) -> None:
    """How many positive codes each latent has, as segment starts ``offsets [n_latents + 1]`` (zero before the call)."""
    for r in range(values.shape[0]):
        for c in range(values.shape[1]):
            if values[r, c] > 0:
                offsets[indices[r, c] + 1] += 1
    for j in range(len(offsets) - 1):
        offsets[j + 1] += offsets[j]


@_compiled
def sort_by_latent(values: Any, indices: Any, products: Any, place: Any, rows: Any, code: Any, slope: Any) -> None:
    """Put row, value and gradient of each positive code at ``place[latent]``, which moves on; rows ascend."""
    for r in range(values.shape[0]):
        for c in range(values.shape[1]):
            if values[r, c] > 0:
                at = place[indices[r, c]]
                place[indices[r, c]] = at + 1
                rows[at] = r
                code[at] = values[r, c]
                slope[at] = products[r, c]


@_compiled
def gradient_of_latents(
    start: int, stop: int, chunk: int, left: int, right: int, offsets: Any, rows: Any, code: Any, slope: Any,
    gradient: Any, x: Any, offset: Any, W_enc: Any, W_dec: Any, slot: Any, more_dec: Any, more_enc: Any, more_bias: Any,
    of_dec: Any, of_enc: Any, of_bias: Any, of_offset: Any, along: Any, squares: Any,
) -> None:  # fmt: skip
    """Columns ``left .. right`` of the gradients of the latents' weights, and what is needed of their length.

    ``start .. stop`` counts chunks of `chunk` latents. Columns are done a panel at a time because then the rows that
    latents have in common stay in a cache. Writes ``of_dec[j]`` and ``of_enc[j]`` (before projection), ``of_bias[j]``,
    and ``of_offset[chunk]``, the sum over the chunk of ``of_bias[j] * W_enc[j]``. Adds up over the panels: ``along[j] =
    of_dec[j] . W_dec[j]`` and ``squares[j] = |of_dec[j]|^2 + |of_enc[j]|^2``.
    """
    n = W_enc.shape[0]
    a = np.uint64(left)
    z = np.uint64(right)
    for part in range(start, stop):
        for i in range(a, z):
            of_offset[part, i] = np.float32(0.0)
        for j in range(np.uint64(part * chunk), np.uint64(min(n, (part + 1) * chunk))):
            for i in range(a, z):
                of_dec[j, i] = np.float32(0.0)
                of_enc[j, i] = np.float32(0.0)
            bias = np.float32(0.0)
            for at in range(offsets[j], offsets[j + np.uint64(1)]):
                r = np.uint64(rows[at])
                value = code[at]
                weight = slope[at]
                bias += weight
                for i in range(a, z):
                    of_dec[j, i] += value * gradient[r, i]
                    of_enc[j, i] += weight * x[r, i]
            if slot[j] >= 0:
                s = np.uint64(slot[j])
                bias += more_bias[s]
                for i in range(a, z):
                    of_dec[j, i] += more_dec[s, i]
                    of_enc[j, i] += more_enc[s, i]
            of_bias[j] = bias
            parallel = np.float32(0.0)
            square = np.float32(0.0)
            for i in range(a, z):
                of_enc[j, i] -= bias * offset[i]
                of_offset[part, i] += bias * W_enc[j, i]
                parallel += of_dec[j, i] * W_dec[j, i]
                square += of_dec[j, i] * of_dec[j, i] + of_enc[j, i] * of_enc[j, i]
            along[j] += parallel
            squares[j] += square


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
    factor: Any, memory_m: Any, memory_v: Any, rate: Any, root: Any, eps: Any,
) -> None:  # fmt: skip
    """Projection, clipping by `factor`, Adam and unit length for a range of latents, in one pass.

    Latents that did not fire have gradient 0 and move too, as with a dense Adam.
    """
    d = W_enc.shape[1]
    adam_row(
        of_bias[start:stop], b_enc[start:stop], m_bias[start:stop], v_bias[start:stop],
        factor, memory_m, memory_v, rate, root, eps,
    )  # fmt: skip
    for j in range(start, stop):
        adam_row(of_enc[j], W_enc[j], m_enc[j], v_enc[j], factor, memory_m, memory_v, rate, root, eps)
        for i in range(d):
            of_dec[j, i] -= along[j] * W_dec[j, i]
        adam_row(of_dec[j], W_dec[j], m_dec[j], v_dec[j], factor, memory_m, memory_v, rate, root, eps)
        length = np.float32(0.0)
        for i in range(d):
            length += W_dec[j, i] * W_dec[j, i]
        length = np.float32(1.0) / max(np.sqrt(length), np.float32(1e-12))
        for i in range(d):
            W_dec[j, i] *= length
