"""Compiled selection: candidates from coarse products, exact scores for what the bound cannot exclude."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .intrinsics_numba import (
    Float,
    Int,
    before_of_16,
    bits_of_float,
    compiled,
    first_one,
    float_of_order,
    inlined,
    ones,
    order_of_float,
    ordered,
    prefetch,
    reaching,
    widen,
)
from .low_bit_matmul import PANEL
from .rounding_numba import BF16_UNIT

LOWEST = np.int16(-32768)
"""Key of a lane without latents: below all others."""

ANY_LATENT = np.int32(2**31 - 1)
"""Above all latents."""

AT_ONCE = 512
"""Latents of a row that are compared with their thresholds before it is asked whether there are too many."""

WAITING = 128
"""Latents that are found before they are multiplied: products in a row overlap their waits for memory."""

LONG = 256
"""Columns from which on finding the k-th best of the first candidates costs less than the products that it saves."""

ROUNDING = np.float32(BF16_UNIT * 1.01 + 2.0**-22)
"""Error relative to the bf16 value: its own rounding, which is relative to the exact one (hence 1.01), and the fp32
rounding of the reference."""


class Rows(NamedTuple):
    """Rows and their factors of the bound."""

    x: np.ndarray
    """``[n, d]``."""
    reach: np.ndarray
    """See `saekit.kernels.cpu.rounded.row_reach`, ``[n]``."""
    norm: np.ndarray
    """``[n]``."""


class Latents(NamedTuple):
    """An encoder and its factors of the bound."""

    W: np.ndarray
    """``[n_latents, d]``."""
    bias: np.ndarray
    norm: np.ndarray
    residual: np.ndarray
    """What rounding lost, as lengths."""
    bias_reach: np.ndarray
    """What the product may lose of the bias."""
    largest: np.ndarray
    """The largest `norm`, `residual` and `bias_reach`."""


class Product(NamedTuple):
    """A product of rows and latents in few bits."""

    P: np.ndarray
    """bf16 as int16, ``[n, at least n_latents]``."""
    maxima: np.ndarray
    """Room for the keys of a row's lanes, see `_lane_maxima`."""
    lane: Int
    """Latents of a lane."""
    known: Int
    """Lanes whose keys are there already."""


class Chosen(NamedTuple):
    """What is written, row by row."""

    values: np.ndarray
    latents: np.ndarray


class Row(NamedTuple):
    """What is found out about one row first."""

    r: Int
    lanes: Int
    """How many lanes there are."""
    level_key: Int
    """Key that at least k lanes reach."""
    widest: Float
    """The bound of any latent, besides the rounding of the product."""


class Some(NamedTuple):
    """Some latents of a row and their scores, with room for 16 more than are used."""

    latents: np.ndarray
    scores: np.ndarray


class Opened(NamedTuple):
    """Room of `_near`: latents that stand for a lane to look into, and latents found."""

    lanes: np.ndarray
    near: np.ndarray


# ---------------------------------------------------------------- the bound


@inlined
def _rounding(a: Float) -> Float:
    """What rounding may have changed of a pre-activation that is `a` in bf16."""
    size: Any = abs(a)
    return ROUNDING * size


@inlined
def _upper(a: Float, row: tuple[Float, Float], latents: Latents, j: Int) -> Float:
    """The largest exact pre-activation whose bf16 may be `a`; `row` is reach and norm."""
    reach, norm = row
    rest = reach * latents.norm[j] + norm * latents.residual[j] + latents.bias_reach[j]
    return a + (_rounding(a) + rest)


@inlined
def _widest(rows: Rows, r: Int, latents: Latents) -> Float:
    """The bound with the largest factors of any latent; 1.0001 for the rounding of all these sums."""
    largest = latents.largest
    return np.float32(1.0001) * (rows.reach[r] * largest[0] + rows.norm[r] * largest[1] + largest[2])


@inlined
def _below(sum_: Float) -> Float:
    """A number that no `a` with ``a + ROUNDING |a| >= sum_`` is below."""
    one = np.float32(1.0)
    bar = sum_ / (one + ROUNDING) if sum_ > np.float32(0.0) else sum_ / (one - ROUNDING)
    return bar - np.float32(2.0**-20) * abs(bar)  # the division and the sum are rounded


@inlined
def _key_below(bar: Float) -> Int:
    """The `ordered` key that no bf16 at or above `bar` is below."""
    # Cutting bits off goes towards 0: below a positive bar, and no bf16 is between a negative one and the result.
    return ordered(np.int16(bits_of_float(bar) >> 16))


# ---------------------------------------------------------------- lanes


@inlined
def _lane_maxima(product: Product, r: Int, n: Int) -> Int:
    """Key of the largest bf16 in every lane of a row but the known ones; returns how many lanes there are.

    `PANEL` latents side by side make ``PANEL / lane`` lanes: a lane has every so many-th of them. So the latents of
    one lane are in two cache lines. Lanes at the end may have fewer, or none: their key is `LOWEST`.
    """
    best = product.maxima[r]
    apart = np.uint64(PANEL // product.lane)
    panels = (n + PANEL - 1) // PANEL
    for s in range(product.known // (PANEL // product.lane), panels):
        base = np.uint64(s * PANEL)
        lane = np.uint64(s) * apart
        for i in range(apart):
            best[lane + i] = LOWEST
        for t in range(base, min(base + np.uint64(PANEL), np.uint64(n)), apart):
            for i in range(min(apart, np.uint64(n) - t)):
                key = ordered(product.P[r, t + i])
                best[lane + i] = key if key > best[lane + i] else best[lane + i]
    lanes = panels * (PANEL // product.lane)
    while lanes % 32:  # whole vectors
        best[lanes] = LOWEST
        lanes += 1
    return lanes


@inlined
def _level(best: np.ndarray, lanes: Int, k: Int) -> Int:
    """A key that at least k lanes reach, and few more where possible: bisection.

    k lanes hold at least k latents that reach it, so the k-th largest product is not below it. An eighth more than k
    is near enough: another turn costs more than the products that it would save.
    """
    lowest = best[0]
    highest = best[0]
    for i in range(lanes):
        lowest = best[i] if best[i] < lowest else lowest
        highest = best[i] if best[i] > highest else highest
    low = np.int64(lowest)
    high = np.int64(highest) + 1
    while high - low > 1:
        middle = np.int16((low + high) >> 1)
        count = 0
        for lane in range(0, lanes, 32):
            count += ones(reaching(best, lane, middle))
        if count >= k:
            low = np.int64(middle)
            if count <= k + k // 8:
                break
        else:
            high = np.int64(middle)
    return np.int16(low)


@inlined
def _near(product: Product, row: tuple[Int, Int], n: Int, bar_key: Int, opened: Opened) -> Int:
    """The latents of a row whose key is not below `bar_key`; returns how many there are. `row` is row and lanes."""
    r, lanes = row
    best = product.maxima[r]
    apart = PANEL // product.lane
    n_open = 0
    for lane in range(0, lanes, 32):
        bits = reaching(best, lane, bar_key)
        while bits:
            i = lane + first_one(bits)
            bits &= bits - 1  # without its lowest one
            first = i // apart * PANEL
            # Asked for here: a lane that waits for its line holds up all others behind it.
            prefetch(product.P, r, first)
            prefetch(product.P, r, first + PANEL // 2)
            opened.lanes[n_open] = first + i % apart
            n_open += 1
    n_near = 0
    for c in range(n_open):
        j = opened.lanes[c]
        for _ in range(product.lane):
            # Stored whatever it is and kept by moving on: which latents qualify cannot be predicted.
            if j < n:
                opened.near[n_near] = j
                n_near += int(ordered(product.P[r, np.uint64(j)]) >= bar_key)
            j += apart
    return n_near


# ---------------------------------------------------------------- exact scores


@compiled
def _multiply(rows: Rows, r: Int, latents: Latents, some: Some, first: Int, count: Int) -> None:
    """``scores[c] = x[r] . W[latents[c]] + bias[latents[c]]`` for the `count` latents from `first` on.

    Four at a time, because then four waits for memory overlap; both lists have room for three more. Compiled by
    itself: every path then adds in the same order, and a latent has the same score in all of them.
    """
    x, W, bias = rows.x, latents.W, latents.bias
    asked, scores = some.latents[first:], some.scores[first:]
    for c in range(count, count + 3):
        asked[c] = asked[count - 1]
    for c in range(0, count, 4):
        j0 = np.uint64(asked[c])
        j1 = np.uint64(asked[c + 1])
        j2 = np.uint64(asked[c + 2])
        j3 = np.uint64(asked[c + 3])
        for z in range(c + 4, min(c + 8, count)):
            for i in range(0, x.shape[1], 16):
                prefetch(W, asked[z], i)
        s0 = np.float32(0.0)
        s1 = np.float32(0.0)
        s2 = np.float32(0.0)
        s3 = np.float32(0.0)
        for i in range(x.shape[1]):
            value = x[r, i]
            s0 += value * W[j0, i]
            s1 += value * W[j1, i]
            s2 += value * W[j2, i]
            s3 += value * W[j3, i]
        scores[c] = s0 + bias[j0]
        scores[c + 1] = s1 + bias[j1]
        scores[c + 2] = s2 + bias[j2]
        scores[c + 3] = s3 + bias[j3]


@inlined
def _pad(scores: np.ndarray, count: Int) -> None:
    """Make what `_before` reads behind the last score harmless."""
    for c in range(count, (count + 15) // 16 * 16):
        scores[c] = -np.float32(np.inf)


@inlined
def _before(some: Some, count: Int, score: Float, latent: Int) -> Int:
    """How many of the first `count` come before this one: larger, or equal and of a smaller latent; see `_pad`."""
    larger = 0
    for c in range(0, count, 16):
        larger += before_of_16(some.scores, some.latents, c, score, latent)
    return larger


@inlined
def _kth_best(some: Some, count: Int, k: Int) -> Float:
    """A number that k of the first `count` scores reach, or where scores are equal, more; see `_pad`.

    Bisection over the floats in their order: the k-th largest itself, or less as soon as no other score is above it.
    """
    lowest = some.scores[0]
    highest = some.scores[0]
    for c in range(count):
        lowest = min(lowest, some.scores[c])
        highest = max(highest, some.scores[c])
    low = order_of_float(lowest)
    high = order_of_float(highest) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        n_reaching = _before(some, count, float_of_order(middle), ANY_LATENT)
        if n_reaching >= k:
            low = middle
            if n_reaching == k:
                break
        else:
            high = middle
    return float_of_order(low)


# ---------------------------------------------------------------- the k largest


@inlined
def _add_near(
    product: Product, row: Row, rows: Rows, latents: Latents, k: Int, sure: Some, n_sure: Int, opened: Opened
) -> Int:
    """Multiply the latents below the level that may still be among the k best; returns how many `sure` then has.

    Those whose upper bound is not positive need not be: they would have the value 0.
    """
    zero = np.float32(0.0)
    level = widen(ordered(row.level_key))
    lowest = sure.scores[0]
    if n_sure > k and rows.x.shape[1] >= LONG:
        _pad(sure.scores, n_sure)
        lowest = _kth_best(sure, n_sure, k)
    else:
        for c in range(n_sure):
            lowest = min(lowest, sure.scores[c])
    bar_key = _key_below(_below(max(lowest, zero) - row.widest))
    n_waiting = 0
    if bar_key < row.level_key:
        n_near = _near(product, (row.r, row.lanes), len(latents.bias), bar_key, opened)
        of_row = rows.reach[row.r], rows.norm[row.r]
        for c in range(n_near):
            j = opened.near[c]
            a = widen(product.P[row.r, j])
            upper = _upper(a, of_row, latents, j)
            if n_sure + n_waiting < len(sure.latents) - 16:
                sure.latents[n_sure + n_waiting] = j
                n_waiting += int((upper >= lowest) & (upper > zero) & (not a >= level))
    if n_waiting:
        _multiply(rows, row.r, latents, sure, n_sure, n_waiting)
    return n_sure + n_waiting


@inlined
def _write_best(r: Int, sure: Some, n_sure: Int, k: Int, in_order: bool, out: Chosen) -> None:
    """Write the k best of some latents, all of which have a score."""
    zero = np.float32(0.0)
    _pad(sure.scores, n_sure)
    done = False
    if not in_order:
        edge = _kth_best(sure, n_sure, k)
        if _before(sure, n_sure, edge, ANY_LATENT) == k:
            done = True
            at: Int = 0
            for c in range(n_sure):
                if sure.scores[c] >= edge:
                    out.values[r, at] = max(sure.scores[c], zero)
                    out.latents[r, at] = sure.latents[c]
                    at += 1
    if not done:  # in order, or several at the edge of which the smallest latents are kept
        for c in range(n_sure):
            at = _before(sure, n_sure, sure.scores[c], sure.latents[c])
            if at < k:
                out.values[r, at] = max(sure.scores[c], zero)
                out.latents[r, at] = sure.latents[c]


@inlined
def _insert(score: Float, j: Int, best: Some, held: Int) -> Int:
    """Put a latent into a full-sized list of the best, sorted by score, then latent; returns how many it holds."""
    scores, latents = best.scores, best.latents
    room = len(scores)
    if held == room:
        if scores[room - 1] > score or (scores[room - 1] == score and latents[room - 1] < j):
            return held
        held -= 1
    at = held
    while at > 0 and (scores[at - 1] < score or (scores[at - 1] == score and latents[at - 1] > j)):
        scores[at] = scores[at - 1]
        latents[at] = latents[at - 1]
        at -= 1
    scores[at] = score
    latents[at] = j
    return held + 1


@inlined
def _insert_all(rows: Rows, r: Int, latents: Latents, waiting: Some, n_waiting: Int, best: Some, held: Int) -> Int:
    """Multiply the latents that wait and put them into the list of the best; returns how many that holds."""
    if n_waiting:
        _multiply(rows, r, latents, waiting, 0, n_waiting)
    for c in range(n_waiting):
        held = _insert(waiting.scores[c], waiting.latents[c], best, held)
    return held


@compiled
def _choose_one_by_one(
    product: Product, row: Row, rows: Rows, latents: Latents, k: Int, exact: bool, out: Chosen
) -> None:  # fmt: skip
    """`choose` for a row with more candidates than there is room for: a list of the best is kept in order.

    First those at or above the level, so that the list is full; then, each against the last of the list, those below.
    """
    r = row.r
    n = len(latents.bias)
    best = Some(np.empty(k, np.int64), np.empty(k, np.float32))
    waiting = Some(np.empty(WAITING + 4, np.int32), np.empty(WAITING + 4, np.float32))
    zero = np.float32(0.0)
    level = widen(ordered(row.level_key))
    of_row = rows.reach[r], rows.norm[r]
    keys = product.maxima[r]
    apart = PANEL // product.lane
    # The k-th best is not below the level by more than the error; a latent below it by as much may be as large.
    bar = _below(level - _rounding(level) - row.widest - row.widest)
    bar_key = min(_key_below(max(bar, min(level, _below(-row.widest)))), row.level_key)
    held: Int = 0
    n_waiting = 0
    for lower in range(2 if exact else 1):
        for i in range(row.lanes):
            if keys[i] >= (bar_key if lower else row.level_key):
                first = i // apart * PANEL + i % apart
                for j in range(first, min(n, first + PANEL), apart):
                    a = widen(product.P[r, j])
                    wanted: Any = a >= level
                    if lower:
                        upper = _upper(a, of_row, latents, j)
                        wanted = (a < level) & (upper >= best.scores[k - 1]) & (upper > zero)
                    if wanted:
                        waiting.latents[n_waiting] = j
                        n_waiting += 1
                        if n_waiting == WAITING:
                            held = _insert_all(rows, r, latents, waiting, n_waiting, best, held)
                            n_waiting = 0
        held = _insert_all(rows, r, latents, waiting, n_waiting, best, held)
        n_waiting = 0
    for c in range(held):
        out.values[r, c] = max(best.scores[c], zero)
        out.latents[r, c] = best.latents[c]


@compiled
def choose(
    n_rows: Int, product: Product, rows: Rows, latents: Latents, k: Int, exact: bool, in_order: bool, out: Chosen
) -> None:
    """The `k` largest of ``x[r] . W[j] + bias[j]`` per row, from a bf16 product that narrows them down.

    For every row r and latent j the pre-activation P, bias included, is off by at most ``reach[r] * norm[j] +
    norm[r] * residual[j] + bias_reach[j]`` plus its own rounding. At least k latents with the largest P are
    multiplied again in fp32. A latent whose upper bound is below the k-th best of these is not among the k largest; all
    others are multiplied again too. The k best are returned, with `in_order` largest first.

    There are at least k lanes. What is written for rows that are not finite has no meaning: the plain kernel does them
    again.
    """
    n = len(latents.bias)
    room = 8 * k + 256  # more than that are close to each other: then one by one, in a list that is kept in order
    sure = Some(np.zeros(room + 16, np.int32), np.empty(room + 16, np.float32))
    opened = Opened(np.empty(product.maxima.shape[1], np.int32), np.empty(n + 1, np.int32))
    for at in range(n_rows):
        r = np.uint64(at)
        lanes = _lane_maxima(product, r, n)
        level_key = _level(product.maxima[r], lanes, k)
        row = Row(r, lanes, level_key, _widest(rows, r, latents))
        n_sure = _near(product, (r, lanes), n, level_key, opened)  # at least k
        if n_sure <= room:
            for c in range(n_sure):
                sure.latents[c] = opened.near[c]
            _multiply(rows, r, latents, sure, 0, n_sure)
            if exact:
                n_sure = _add_near(product, row, rows, latents, k, sure, n_sure, opened)
        if n_sure < room:
            _write_best(r, sure, n_sure, k, in_order, out)
        else:
            _choose_one_by_one(product, row, rows, latents, k, exact, out)


# ---------------------------------------------------------------- all above a threshold


@compiled
def choose_above(
    n_rows: Int, product: Product, rows: Rows, latents: Latents, threshold: np.ndarray, out: Chosen, counts: np.ndarray
) -> None:
    """All latents of a row with ``x[r] . W[j] + bias[j] > threshold[j]``, from a bf16 product that narrows them down.

    P is how far they are above their threshold, in bf16. Row r writes its latents, lane by lane, into row r of `out`,
    and their number into ``counts[r]``; the number is -1 when there are more than these have room for. The bound is
    that of `choose`, and so are the lanes.
    """
    n = len(latents.bias)
    room = out.values.shape[1]
    opened = Opened(np.empty(product.maxima.shape[1], np.int32), np.empty(n + 1, np.int32))
    waiting = np.empty(n + 4, np.int32)
    asked = Some(np.empty(AT_ONCE + 4, np.int32), np.empty(AT_ONCE + 4, np.float32))
    zero = np.float32(0.0)
    for at in range(n_rows):
        r = np.uint64(at)
        of_row = rows.reach[r], rows.norm[r]
        lanes = _lane_maxima(product, r, n)
        bar_key = _key_below(_below(-_widest(rows, r, latents)))
        n_near = _near(product, (r, lanes), n, bar_key, opened)
        count = 0
        for c in range(n_near):
            j = opened.near[c]
            waiting[count] = j
            count += int(_upper(widen(product.P[r, j]), of_row, latents, j) >= zero)
        # Multiplied again in fp32; those at or below their threshold go.
        kept = 0
        for first in range(0, count, AT_ONCE):
            size = min(AT_ONCE, count - first)
            for c in range(size):
                asked.latents[c] = waiting[first + c]
            _multiply(rows, r, latents, asked, 0, size)
            for c in range(size):
                if asked.scores[c] > threshold[asked.latents[c]]:
                    if kept < room:
                        out.values[r, kept] = asked.scores[c]
                        out.latents[r, kept] = asked.latents[c]
                    kept += 1
            if kept > room:
                break
        counts[r] = kept if kept <= room else -1


@compiled
def pack_rows(found: Chosen, offsets: np.ndarray, packed: Chosen) -> None:
    """The first ``offsets[r + 1] - offsets[r]`` entries of each row r, one row after the other."""
    for r in range(len(offsets) - 1):
        first = offsets[r]
        for c in range(offsets[r + 1] - first):
            packed.values[first + c] = found.values[r, c]
            packed.latents[first + c] = found.latents[r, c]
