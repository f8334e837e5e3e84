"""Compiled selection: candidates from coarse products, exact scores for what the bound cannot exclude.

Arrays that belong together come together, but loops over rows use them one by one: numba counts who uses an array
whenever it is taken out of a tuple, and threads would wait for each other's counting.
"""

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
    lane_maxima_of_64,
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
    """What is known about one row at a time."""

    r: Int
    reach: Float
    norm: Float
    widest: Float
    """The bound of any latent, besides the rounding of the product."""
    level_key: Int
    """Key that at least k lanes reach."""
    lowest: Float
    """Score that at least k latents reach."""


class Lists(NamedTuple):
    """Candidates of some rows, a list for each, and room for them latent by latent."""

    latents: np.ndarray
    """``[rows, length + 16]``."""
    scores: np.ndarray
    firsts: np.ndarray
    """Where in a list those without a score begin."""
    lasts: np.ndarray
    """Length of each list; 0 where it would have been too long."""
    level_keys: np.ndarray
    """See `Row`."""
    ends: np.ndarray
    """``[n_latents]``."""
    present: np.ndarray
    """``[n_latents + 1]``."""
    rows: np.ndarray
    """``[rows * length]``, as the next."""
    places: np.ndarray


class Some(NamedTuple):
    """Some latents of a row and their scores."""

    latents: np.ndarray
    scores: np.ndarray


# ---------------------------------------------------------------- the bound


@inlined
def _rounding(a: Float) -> Float:
    """Return what rounding may have changed of a pre-activation that is `a` in bf16."""
    size: Any = abs(a)
    return ROUNDING * size


@inlined
def _upper(
    a: Float, reach: Float, norm: Float, j: Int, norms: np.ndarray, residuals: np.ndarray, bias_reach: np.ndarray
) -> Float:
    """Return the largest exact pre-activation of a row and latent j whose bf16 may be `a`."""
    return a + (_rounding(a) + (reach * norms[j] + norm * residuals[j] + bias_reach[j]))


@inlined
def _widest(reach: Float, norm: Float, largest: np.ndarray) -> Float:
    """Return the bound with the largest factors of any latent; 1.0001 for the rounding of all these sums."""
    return np.float32(1.0001) * (reach * largest[0] + norm * largest[1] + largest[2])


@inlined
def _below(sum_: Float) -> Float:
    """Return a number that no `a` with ``a + ROUNDING |a| >= sum_`` is below."""
    one = np.float32(1.0)
    bar = sum_ / (one + ROUNDING) if sum_ > np.float32(0.0) else sum_ / (one - ROUNDING)
    return bar - np.float32(2.0**-20) * abs(bar)  # the division and the sum are rounded


@inlined
def _key_below(bar: Float) -> Int:
    """Return the `ordered` key that no bf16 at or above `bar` is below."""
    # Cutting bits off goes towards 0: below a positive bar, and no bf16 is between a negative one and the result.
    return ordered(np.int16(bits_of_float(bar) >> 16))


# ---------------------------------------------------------------- lanes


@inlined
def _lane_maxima(P: np.ndarray, r: Int, n: Int, lane_size: Int, known: Int, best: np.ndarray) -> Int:
    """Write the key of the largest bf16 in every lane of a row but the known ones; return how many lanes there are.

    `PANEL` latents side by side make ``PANEL / lane_size`` lanes: a lane has every so many-th of them. So the latents
    of one lane are in two cache lines. Lanes at the end may have fewer, or none: their key is `LOWEST`.
    """
    apart = np.uint64(PANEL // lane_size)
    panels = (n + PANEL - 1) // PANEL
    for s in range(known // (PANEL // lane_size), panels):
        base = np.uint64(s * PANEL)
        lane = np.uint64(s) * apart
        if base + np.uint64(PANEL) <= np.uint64(n):
            lane_maxima_of_64(P, r, base, best, lane, lane_size)
            continue
        for i in range(apart):
            best[lane + i] = LOWEST
        for t in range(base, min(base + np.uint64(PANEL), np.uint64(n)), apart):
            for i in range(min(apart, np.uint64(n) - t)):
                key = ordered(P[r, t + i])
                best[lane + i] = key if key > best[lane + i] else best[lane + i]
    lanes = panels * (PANEL // lane_size)
    while lanes % 32:  # whole vectors
        best[lanes] = LOWEST
        lanes += 1
    return lanes


@inlined
def _whole_vectors(n: Int, lane_size: Int) -> Int:
    """Return how many lanes n latents have, rounded up to vectors of 32 keys."""
    lanes = (n + PANEL - 1) // PANEL * (PANEL // lane_size)
    return (lanes + 31) // 32 * 32


@inlined
def _level(best: np.ndarray, lanes: Int, k: Int) -> Int:
    """Return a key that at least k lanes reach, and few more where possible: bisection.

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
def _near(
    P: np.ndarray, r: Int, n: Int, lane_size: Int, best: np.ndarray, lanes: Int, bar_key: Int, near: np.ndarray
) -> Int:
    """Find the latents of a row whose key is not below `bar_key`; return how many.

    `near` has room for all of them and one more, and behind that for all lanes: the first latent of those to look into.
    """
    apart = PANEL // lane_size
    n_open = 0
    for lane in range(0, lanes, 32):
        bits = reaching(best, lane, bar_key)
        while bits:
            i = lane + first_one(bits)
            bits &= bits - 1  # without its lowest one
            first = i // apart * PANEL
            # Asked for here: a lane that waits for its line holds up all others behind it.
            prefetch(P, r, first)
            prefetch(P, r, first + PANEL // 2)
            near[n + 1 + n_open] = first + i % apart
            n_open += 1
    n_near = 0
    for c in range(n_open):
        j = near[n + 1 + c]
        for _ in range(lane_size):
            # Stored whatever it is and kept by moving on: which latents qualify cannot be predicted.
            if j < n:
                near[n_near] = j
                n_near += int(ordered(P[r, np.uint64(j)]) >= bar_key)
            j += apart
    return n_near


# ---------------------------------------------------------------- exact scores


@compiled
def _multiply(
    x: np.ndarray, r: Int, W: np.ndarray, asked: np.ndarray, count: Int, far: bool, products: np.ndarray
) -> None:
    """``products[c] = x[r] . W[asked[c]]`` for c below `count`.

    Four at a time, because then four waits for memory overlap; both lists have room for three more. `far`: whether rows
    of `W` come from memory, and are asked for early. Compiled by itself: every path then adds in the same order, and a
    latent has the same score in all of them, also when rows and latents change places.
    """
    for c in range(count, count + 3):
        asked[c] = asked[count - 1]
    for c in range(0, count, 4):
        j0 = np.uint64(asked[c])
        j1 = np.uint64(asked[c + 1])
        j2 = np.uint64(asked[c + 2])
        j3 = np.uint64(asked[c + 3])
        if far:
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
        products[c] = s0
        products[c + 1] = s1
        products[c + 2] = s2
        products[c + 3] = s3


@inlined
def _score(
    x: np.ndarray, r: Int, W: np.ndarray, bias: np.ndarray, asked: np.ndarray, count: Int, scores: np.ndarray
) -> None:
    """``scores[c] = x[r] . W[asked[c]] + bias[asked[c]]`` for c below `count`; both have room for three more."""
    _multiply(x, r, W, asked, count, True, scores)
    for c in range(count):
        scores[c] += bias[asked[c]]


@compiled
def _score_by_latent(x: np.ndarray, start: Int, W: np.ndarray, bias: np.ndarray, lists: Lists) -> None:
    """Do the same for all lists, those of the rows from `start`: a latent is read once for all rows that ask for it."""
    asked, scores, firsts, lasts, _, ends, present, rows, places = lists
    ends[:] = 0
    for i in range(len(asked)):
        for c in range(firsts[i], lasts[i]):
            ends[asked[i, c]] += 1
    total = 0
    n_present = 0
    for j in range(len(ends)):
        size = ends[j]
        present[n_present] = j
        n_present += int(size > 0)
        ends[j] = total
        total += size
    for i in range(len(asked)):
        for c in range(firsts[i], lasts[i]):
            at = ends[asked[i, c]]
            ends[asked[i, c]] = at + 1
            rows[at] = start + i
            places[at] = c
    asking, products = np.empty(len(asked) + 4, np.int32), np.empty(len(asked) + 4, np.float32)
    at = 0
    for z in range(n_present):
        j = present[z]
        count = ends[j] - at
        for c in range(count):
            asking[c] = rows[at + c]
        _multiply(W, np.uint64(j), x, asking, count, False, products)
        for c in range(count):
            scores[asking[c] - start, places[at + c]] = products[c] + bias[j]
        at += count


@inlined
def _pad(scores: np.ndarray, count: Int) -> None:
    """Make what `_before` reads behind the last score harmless."""
    for c in range(count, (count + 15) // 16 * 16):
        scores[c] = -np.float32(np.inf)


@inlined
def _before(scores: np.ndarray, latents: np.ndarray, count: Int, score: Float, latent: Int) -> Int:
    """Return how many of the first `count` are larger, or equal and of a smaller latent; see `_pad`."""
    larger = 0
    for c in range(0, count, 16):
        larger += before_of_16(scores, latents, c, score, latent)
    return larger


@inlined
def _kth_best(scores: np.ndarray, latents: np.ndarray, count: Int, k: Int) -> Float:
    """Return a number that k of the first `count` scores reach, or where scores are equal, more; see `_pad`.

    Bisection over the floats in their order: the k-th largest itself, or less as soon as no other score is above it.
    """
    lowest = scores[0]
    highest = scores[0]
    for c in range(count):
        lowest = min(lowest, scores[c])
        highest = max(highest, scores[c])
    low = order_of_float(lowest)
    high = order_of_float(highest) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        n_reaching = _before(scores, latents, count, float_of_order(middle), ANY_LATENT)
        if n_reaching >= k:
            low = middle
            if n_reaching == k:
                break
        else:
            high = middle
    return float_of_order(low)


# ---------------------------------------------------------------- the k largest


@inlined
def _lowest(scores: np.ndarray, latents: np.ndarray, count: Int, k: Int, d: Int) -> Float:
    """Return a number that k of the first `count` scores reach: the better it is, the fewer latents are left."""
    lowest = scores[0]
    if count > k and d >= LONG:
        _pad(scores, count)
        lowest = _kth_best(scores, latents, count, k)
    else:
        for c in range(count):
            lowest = min(lowest, scores[c])
    return lowest


@inlined
def _plausible(
    P: np.ndarray, row: Row, near: np.ndarray, n_near: Int, norms: np.ndarray, residuals: np.ndarray,
    bias_reach: np.ndarray, sure: np.ndarray,
) -> Int:  # fmt: skip
    """Put those of some latents into `sure` that are below the level and may reach the lowest; return how many.

    Those whose upper bound is not positive need not be: they would have the value 0.
    """
    zero = np.float32(0.0)
    level = widen(ordered(row.level_key))
    count = 0
    for c in range(n_near):
        j = near[c]
        a = widen(P[row.r, j])
        upper = _upper(a, row.reach, row.norm, j, norms, residuals, bias_reach)
        if count < len(sure):
            sure[count] = j
            count += int((upper >= row.lowest) & (upper > zero) & (not a >= level))
    return count


@inlined
def _write_best(
    r: Int, scores: np.ndarray, latents: np.ndarray, count: Int, k: Int, in_order: bool, values: np.ndarray,
    indices: np.ndarray,
) -> None:  # fmt: skip
    """Write the k best of some latents, all of which have a score."""
    zero = np.float32(0.0)
    _pad(scores, count)
    done = False
    if not in_order:
        edge = _kth_best(scores, latents, count, k)
        if _before(scores, latents, count, edge, ANY_LATENT) == k:
            done = True
            at: Int = 0
            for c in range(count):
                if scores[c] >= edge:
                    values[r, at] = max(scores[c], zero)
                    indices[r, at] = latents[c]
                    at += 1
    if not done:  # in order, or several at the edge of which the smallest latents are kept
        for c in range(count):
            at = _before(scores, latents, count, scores[c], latents[c])
            if at < k:
                values[r, at] = max(scores[c], zero)
                indices[r, at] = latents[c]


@inlined
def _insert(score: Float, j: Int, best: Some, held: Int) -> Int:
    """Put a latent into a full-sized list of the best, sorted by score, then latent; return how many it holds."""
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
    """Multiply the latents that wait and put them into the list of the best; return how many that holds."""
    if n_waiting:
        _score(rows.x, r, latents.W, latents.bias, waiting.latents, n_waiting, waiting.scores)
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
    P, keys = product.P, product.maxima[r]
    norm_of, residual_of, bias_reach = latents.norm, latents.residual, latents.bias_reach
    lanes = _whole_vectors(n, product.lane)
    apart = PANEL // product.lane
    # The k-th best is not below the level by more than the error; a latent below it by as much may be as large.
    bar = _below(level - _rounding(level) - row.widest - row.widest)
    bar_key = min(_key_below(max(bar, min(level, _below(-row.widest)))), row.level_key)
    held: Int = 0
    n_waiting = 0
    for lower in range(2 if exact else 1):
        for i in range(lanes):
            if keys[i] >= (bar_key if lower else row.level_key):
                first = i // apart * PANEL + i % apart
                for j in range(first, min(n, first + PANEL), apart):
                    a = widen(P[r, j])
                    wanted: Any = a >= level
                    if lower:
                        upper = _upper(a, row.reach, row.norm, j, norm_of, residual_of, bias_reach)
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
    n_rows: Int, product: Product, rows: Rows, latents: Latents, k: Int, exact: bool, in_order: bool, lists: Lists,
    out: Chosen,
) -> None:  # fmt: skip
    """Find the `k` largest of ``x[r] . W[j] + bias[j]`` per row, from a bf16 product that narrows them down.

    For every row r and latent j the pre-activation P, bias included, is off by at most ``reach[r] * norm[j] +
    norm[r] * residual[j] + bias_reach[j]`` plus its own rounding. At least k latents with the largest P are
    multiplied again in fp32. A latent whose upper bound is below the k-th best of these is not among the k largest; all
    others are multiplied again too. The k best are returned, with `in_order` largest first.

    As many rows as there are lists take these steps together. There are at least k lanes. What is written for rows that
    are not finite has no meaning: the plain kernel does them again.
    """
    n = len(latents.bias)
    P, W, bias = product.P, latents.W, latents.bias
    norm_of, residual_of, bias_reach = latents.norm, latents.residual, latents.bias_reach
    x, values, indices = rows.x, out.values, out.latents
    asked, scores, firsts, lasts, level_keys, _, _, _, _ = lists
    together, room = len(asked), asked.shape[1] - 16
    near = np.empty(n + 1 + product.maxima.shape[1], np.int32)
    zero = np.float32(0.0)
    lane_size, known, maxima = product.lane, product.known, product.maxima
    reaches, norms, largest = rows.reach, rows.norm, latents.largest
    for start in range(0, n_rows, together):
        size = min(together, n_rows - start)
        firsts[:], lasts[:] = 0, 0
        for i in range(size):
            r = np.uint64(start + i)
            best = maxima[r]
            lanes = _lane_maxima(P, r, n, lane_size, known, best)
            level_keys[i] = _level(best, lanes, k)
            n_sure = _near(P, r, n, lane_size, best, lanes, level_keys[i], near)  # at least k
            if n_sure <= room:
                lasts[i] = n_sure
                for c in range(n_sure):
                    asked[i, c] = near[c]
        for lower in range(2 if exact else 1):
            for i in range(size if lower else 0):
                r = np.uint64(start + i)
                firsts[i] = lasts[i]
                if lasts[i]:
                    reach, norm = reaches[r], norms[r]
                    lowest = _lowest(scores[i], asked[i], lasts[i], k, x.shape[1])
                    row = Row(r, reach, norm, _widest(reach, norm, largest), level_keys[i], lowest)
                    bar_key = _key_below(_below(max(lowest, zero) - row.widest))
                    if bar_key < row.level_key:
                        lanes = _whole_vectors(n, lane_size)
                        n_near = _near(P, r, n, lane_size, maxima[r], lanes, bar_key, near)
                        more = asked[i, lasts[i] : room]
                        lasts[i] += _plausible(P, row, near, n_near, norm_of, residual_of, bias_reach, more)
            if together > 1:
                _score_by_latent(x, start, W, bias, lists)
            elif lasts[0] > firsts[0]:
                first = firsts[0]
                _score(x, np.uint64(start), W, bias, asked[0, first:], lasts[0] - first, scores[0, first:])
        for i in range(size):
            r = np.uint64(start + i)
            if 0 < lasts[i] < room:
                _write_best(r, scores[i], asked[i], lasts[i], k, in_order, values, indices)
            else:
                reach, norm = reaches[r], norms[r]
                row = Row(r, reach, norm, _widest(reach, norm, largest), level_keys[i], zero)
                _choose_one_by_one(product, row, rows, latents, k, exact, out)


# ---------------------------------------------------------------- all above a threshold


@compiled
def choose_above(
    n_rows: Int, product: Product, rows: Rows, latents: Latents, threshold: np.ndarray, out: Chosen, counts: np.ndarray
) -> None:
    """Find all latents with ``x[r] . W[j] + bias[j] > threshold[j]``, from a bf16 product that narrows them down.

    P is how far they are above their threshold, in bf16. Row r writes its latents, lane by lane, into row r of `out`,
    and their number into ``counts[r]``; the number is -1 when there are more than these have room for. The bound is
    that of `choose`, and so are the lanes.
    """
    n = len(latents.bias)
    P, W, bias = product.P, latents.W, latents.bias
    norm_of, residual_of, bias_reach = latents.norm, latents.residual, latents.bias_reach
    x, values, indices = rows.x, out.values, out.latents
    room = values.shape[1]
    near = np.empty(n + 1 + product.maxima.shape[1], np.int32)
    waiting = np.empty(n + 4, np.int32)
    asked, scores = np.empty(AT_ONCE + 4, np.int32), np.empty(AT_ONCE + 4, np.float32)
    zero = np.float32(0.0)
    lane_size, known, maxima = product.lane, product.known, product.maxima
    reaches, norms, largest = rows.reach, rows.norm, latents.largest
    for at in range(n_rows):
        r = np.uint64(at)
        best = maxima[r]
        lanes = _lane_maxima(P, r, n, lane_size, known, best)
        reach, norm = reaches[r], norms[r]
        bar_key = _key_below(_below(-_widest(reach, norm, largest)))
        n_near = _near(P, r, n, lane_size, best, lanes, bar_key, near)
        count = 0
        for c in range(n_near):
            j = near[c]
            waiting[count] = j
            count += int(_upper(widen(P[r, j]), reach, norm, j, norm_of, residual_of, bias_reach) >= zero)
        # Multiplied again in fp32; those at or below their threshold go.
        kept = 0
        for first in range(0, count, AT_ONCE):
            size = min(AT_ONCE, count - first)
            for c in range(size):
                asked[c] = waiting[first + c]
            _score(x, r, W, bias, asked, size, scores)
            for c in range(size):
                if scores[c] > threshold[asked[c]]:
                    if kept < room:
                        values[r, kept] = scores[c]
                        indices[r, kept] = asked[c]
                    kept += 1
            if kept > room:
                break
        counts[r] = kept if kept <= room else -1


@compiled
def pack_rows(found: Chosen, offsets: np.ndarray, packed: Chosen) -> None:
    """Copy the first ``offsets[r + 1] - offsets[r]`` entries of each row r, one row after the other."""
    for r in range(len(offsets) - 1):
        first = offsets[r]
        for c in range(offsets[r + 1] - first):
            packed.values[first + c] = found.values[r, c]
            packed.latents[first + c] = found.latents[r, c]
