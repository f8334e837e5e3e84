"""Compiled selection: candidates from coarse products, exact scores for what the bound cannot exclude."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .intrinsics_numba import (
    ANY_LATENT,
    LOWEST,
    PANEL,
    _bits_of_float,
    _compiled,
    _float_of_order,
    _order_of_float,
    _ordered,
    _prefetch,
    _widen,
)
from .rounding_numba import BF16_UNIT

AT_ONCE = 512
"""Latents of a row that are compared with their thresholds before it is asked whether there are too many."""

WAITING = 128
"""Latents that are found before they are multiplied: products in a row overlap their waits for memory."""


ROUNDING = np.float32(BF16_UNIT * 1.01 + 2.0**-22)
"""bf16 rounding of a pre-activation, and the fp32 rounding of the reference: error relative to the bf16 value."""


@njit(inline="always")
def _error(a: Any, reach: Any) -> Any:
    """Bound of the difference between the bf16 pre-activation `a` and the exact one; `reach`: all but its rounding."""
    return ROUNDING * abs(a) + reach


@njit(inline="always")
def _below(sum_: Any) -> Any:
    """A number that no `a` with ``a + ROUNDING |a| >= sum_`` is below."""
    one = np.float32(1.0)
    bar = sum_ / (one + ROUNDING) if sum_ > np.float32(0.0) else sum_ / (one - ROUNDING)
    return bar - np.float32(2.0**-20) * abs(bar)


@njit(inline="always")
def _key_below(bar: Any) -> Any:
    """The `_ordered` key that no bf16 at or above `bar` is below."""
    # Cutting bits off goes towards 0: below a positive bar, and no bf16 is between a negative one and the result.
    return _ordered(np.int16(_bits_of_float(bar) >> 16))  # type: ignore[call-arg]


@njit(inline="always")
def _lane_maxima(P: Any, r: Any, n: Any, share: Any, known: Any, best: Any) -> Any:
    """Key of the largest bf16 in every lane of a row but the first `known`; returns how many lanes there are.

    `PANEL` latents side by side make ``PANEL / share`` lanes: a lane has every so many-th of them, `share` in all. So
    the latents of one lane are in two cache lines. Lanes at the end may have fewer, or none: their key is `LOWEST`.
    """
    apart = np.uint64(PANEL // share)
    panels = (n + PANEL - 1) // PANEL
    for s in range(known // (PANEL // share), panels):
        base = np.uint64(s * PANEL)
        lane = np.uint64(s) * apart
        for i in range(apart):
            best[lane + i] = LOWEST
        for t in range(base, min(base + np.uint64(PANEL), np.uint64(n)), apart):
            for i in range(min(apart, np.uint64(n) - t)):
                key: Any = _ordered(P[r, t + i])  # type: ignore[call-arg]
                best[lane + i] = key if key > best[lane + i] else best[lane + i]
    lanes = panels * (PANEL // share)
    while lanes % 32:  # whole vectors
        best[lanes] = LOWEST
        lanes += 1
    return lanes


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


@_compiled
def _multiply(x: Any, row: Any, W: Any, bias: Any, latents: Any, count: int, scores: Any) -> None:
    """``scores[c] = x[row] . W[latents[c]] + bias[latents[c]]`` for c below `count`.

    Four at a time, because then four waits for memory overlap; both lists have room for three more.
    """
    for c in range(count, count + 3):
        latents[c] = latents[count - 1]
    for c in range(0, count, 4):
        j0 = np.uint64(latents[c])
        j1 = np.uint64(latents[c + 1])
        j2 = np.uint64(latents[c + 2])
        j3 = np.uint64(latents[c + 3])
        for z in range(c + 4, min(c + 8, count)):
            for i in range(0, x.shape[1], 16):
                _prefetch(W, latents[z], i)  # type: ignore[call-arg]
        s0 = np.float32(0.0)
        s1 = np.float32(0.0)
        s2 = np.float32(0.0)
        s3 = np.float32(0.0)
        for i in range(x.shape[1]):
            value = x[row, i]
            s0 += value * W[j0, i]
            s1 += value * W[j1, i]
            s2 += value * W[j2, i]
            s3 += value * W[j3, i]
        scores[c] = s0 + bias[j0]
        scores[c + 1] = s1 + bias[j1]
        scores[c + 2] = s2 + bias[j2]
        scores[c + 3] = s3 + bias[j3]


@njit(inline="always")
def _pad(scores: Any, count: Any) -> None:
    """Make what `_before` reads behind the last score harmless."""
    for c in range(count, (count + 15) // 16 * 16):
        scores[c] = -np.float32(np.inf)


@intrinsic
def _before_of_16(typingctx: Any, scores: Any, latents: Any, at: Any, score: Any, latent: Any) -> Any:
    """How many of the 16 from `at` come before this one; as vector code, which loops this short do not become."""
    floats, ints = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def part(which: int, kind: Any) -> Any:
            array = context.make_array(signature.args[which])(context, builder, args[which])
            place = builder.gep(array.data, [args[2]])
            return builder.load(builder.bitcast(place, kind.as_pointer()), align=4)

        def everywhere(value: Any, kind: Any) -> Any:
            zero = ir.Constant(ir.IntType(32), 0)
            one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, zero)
            mask = ir.Constant(ints, [0] * 16)
            return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask)

        score_of, latent_of = part(0, floats), part(1, ints)
        score_, latent_ = everywhere(args[3], floats), everywhere(args[4], ints)
        larger = builder.fcmp_ordered(">", score_of, score_)
        equal = builder.fcmp_ordered("==", score_of, score_)
        smaller = builder.icmp_signed("<", latent_of, latent_)
        first = builder.bitcast(builder.or_(larger, builder.and_(equal, smaller)), ir.IntType(16))
        return builder.zext(builder.ctpop(first), ir.IntType(64))

    return types.int64(scores, latents, types.int64, types.float32, types.int32), build


@njit(inline="always")
def _before(scores: Any, latents: Any, count: int, score: Any, latent: Any) -> Any:
    """How many of the first `count` come before this one: larger, or equal and of a smaller latent; see `_pad`."""
    larger = 0
    for c in range(0, count, 16):
        larger += _before_of_16(scores, latents, c, score, latent)  # type: ignore[call-arg]
    return larger


@njit(inline="always")
def _insert_all(
    x: Any, row: Any, W: Any, bias: Any, waiting: Any, n_waiting: int, found: Any, scores: Any, latents: Any, held: Any
) -> Any:
    """Multiply the latents that wait and put them into the list of the best; returns how many that holds."""
    if n_waiting:
        _multiply(x, row, W, bias, waiting, n_waiting, found)
    for c in range(n_waiting):
        held = _insert(found[c], waiting[c], scores, latents, held)
    return held


@njit(inline="always")
def _kth_best(scores: Any, latents: Any, count: int, k: Any) -> Any:
    """A number that k of the first `count` scores reach, or where scores are equal, more; see `_pad`.

    Bisection over the floats in their order: the k-th largest itself, or less as soon as no other score is above it.
    """
    lowest = scores[0]
    highest = scores[0]
    for c in range(count):
        lowest = min(lowest, scores[c])
        highest = max(highest, scores[c])
    low = _order_of_float(lowest)
    high = _order_of_float(highest) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reaching = _before(scores, latents, count, _float_of_order(middle), ANY_LATENT)
        if reaching >= k:
            low = middle
            if reaching == k:
                break
        else:
            high = middle
    return _float_of_order(low)


@intrinsic
def _reaching(typingctx: Any, keys: Any, at: Any, bar: Any) -> Any:
    """Which of the 32 keys from `at` are not below `bar`, as bits; as vector code, which the compiler does not find."""
    shorts = ir.VectorType(ir.IntType(16), 32)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.bitcast(builder.gep(array.data, [args[1]]), shorts.as_pointer())
        undefined = ir.Constant(shorts, ir.Undefined)
        one = builder.insert_element(undefined, args[2], ir.Constant(ir.IntType(32), 0))
        bars = builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), 32), [0] * 32))
        bits = builder.icmp_signed(">=", builder.load(place, align=2), bars)
        return builder.zext(builder.bitcast(bits, ir.IntType(32)), ir.IntType(64))

    return types.int64(keys, types.int64, types.int16), build


@intrinsic
def _ones(typingctx: Any, bits: Any) -> Any:
    """How many bits are set."""
    return types.int64(types.int64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def _first_one(typingctx: Any, bits: Any) -> Any:
    """Place of the lowest bit that is set; some bit is."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), build


@njit(inline="always")
def _near(
    P: Any, r: Any, n: Any, share: Any, best: Any, lanes: Any, bar_key: Any, opened: Any, near: Any
) -> Any:  # fmt: skip
    """The latents of a row whose key is not below `bar_key`; returns how many there are."""
    apart = PANEL // share
    n_open = 0
    for lane in range(0, lanes, 32):
        bits: Any = _reaching(best, lane, bar_key)  # type: ignore[call-arg]
        while bits:
            i = lane + _first_one(bits)
            bits &= bits - 1
            first = i // apart * PANEL
            # Asked for here: a lane that waits for its line holds up all others behind it.
            _prefetch(P, r, first)
            _prefetch(P, r, first + PANEL // 2)
            opened[n_open] = first + i % apart
            n_open += 1
    n_near = 0
    for c in range(n_open):
        j = opened[c]
        for _ in range(share):
            # Stored whatever it is and kept by moving on: which latents qualify cannot be predicted.
            if j < n:
                near[n_near] = j
                n_near += int(_ordered(P[r, np.uint64(j)]) >= bar_key)  # type: ignore[call-arg]
            j += apart
    return n_near


@njit(inline="always")
def _level(best: Any, lanes: Any, k: Any) -> Any:
    """A key that at least k lanes reach, and few more where possible: bisection."""
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
            count += _ones(_reaching(best, lane, middle))  # type: ignore[call-arg]
        if count >= k:
            low = np.int64(middle)
            if count <= k + k // 8:
                break
        else:
            high = np.int64(middle)
    return np.int16(low)


@_compiled
def choose(
    start: int, stop: int, P: Any, x: Any, row_reach: Any, row_norm: Any, W: Any, bias: Any, latent_norm: Any,
    latent_lost: Any, bias_reach: Any, most: Any, k: int, maxima: Any, share: int, known: int, exact: bool,
    ordered: bool, values: Any, indices: Any,
) -> None:  # fmt: skip
    """The `k` largest of ``x[r] . W[j] + bias[j]`` per row, from a bf16 product that narrows them down.

    For every row r and latent j the pre-activation P, bias included, is off by at most ``row_reach[r] * latent_norm[j]
    + row_norm[r] * latent_lost[j] + bias_reach[j]`` plus its own rounding. At least k latents with the largest P are
    multiplied again in fp32. A latent whose upper bound is below the k-th best of these is not among the k largest; all
    others are multiplied again too. The k best are returned, with `ordered` largest first.

    Rows must be finite. There are at least k lanes of `share` latents each; ``maxima[r]`` has the keys of the first
    `known` and room for all (see `_lane_maxima`). `most` has the largest ``latent_norm``, ``latent_lost`` and
    ``bias_reach``.
    """
    n = len(bias)
    room = 8 * k + 256  # more than that are close to each other: then one by one, in a list that is kept in order
    sure = np.zeros(room + 16, np.int32)
    sure_scores = np.empty(room + 16, np.float32)
    opened = np.empty(maxima.shape[1], np.int32)
    near = np.empty(n + 1, np.int32)
    scores = np.empty(k, np.float32)
    latents = np.empty(k, np.int64)
    waiting = np.empty(WAITING + 4, np.int32)
    found = np.empty(WAITING + 4, np.float32)
    zero = np.float32(0.0)
    for at in range(start, stop):
        r = np.uint64(at)
        best = maxima[r]
        lanes = _lane_maxima(P, r, n, share, known, best)
        level_key = _level(best, lanes, k)
        level = _widen(_ordered(level_key))  # type: ignore[call-arg]
        reach = row_reach[r]
        norm = row_norm[r]
        widest = np.float32(1.0001) * (reach * most[0] + norm * most[1] + most[2])
        # --- latents at or above the level: at least k
        n_sure = _near(P, r, n, share, best, lanes, level_key, opened, near)
        if n_sure <= room:
            for c in range(n_sure):
                sure[c] = near[c]
            _multiply(x, r, W, bias, sure, n_sure, sure_scores)
        if exact and n_sure <= room:
            lowest = sure_scores[0]
            if n_sure > k and x.shape[1] >= 256:  # long rows: finding the k-th best costs less than more products
                _pad(sure_scores, n_sure)
                lowest = _kth_best(sure_scores, sure, n_sure, k)
            else:
                for c in range(n_sure):
                    lowest = min(lowest, sure_scores[c])
            # --- those below the level that may still be among the k best, and positive (others have value 0 anyway)
            bar_key = _key_below(_below(max(lowest, zero) - widest))
            n_waiting = 0
            if bar_key < level_key:
                n_near = _near(P, r, n, share, best, lanes, bar_key, opened, near)
                for c in range(n_near):
                    j = near[c]
                    a = _widen(P[r, j])
                    upper = a + _error(a, reach * latent_norm[j] + norm * latent_lost[j] + bias_reach[j])
                    if n_sure + n_waiting < room:
                        sure[n_sure + n_waiting] = j
                        n_waiting += int((upper >= lowest) & (upper > zero) & (not a >= level))
            if n_waiting:
                _multiply(x, r, W, bias, sure[n_sure:], n_waiting, sure_scores[n_sure:])
                n_sure += n_waiting
        if n_sure < room:
            _pad(sure_scores, n_sure)
            if not ordered:
                edge = _kth_best(sure_scores, sure, n_sure, k)
                if _before(sure_scores, sure, n_sure, edge, ANY_LATENT) == k:
                    place = 0
                    for c in range(n_sure):
                        if sure_scores[c] >= edge:
                            values[r, place] = max(sure_scores[c], zero)
                            indices[r, place] = sure[c]
                            place += 1
                    continue
            for c in range(n_sure):
                place = _before(sure_scores, sure, n_sure, sure_scores[c], sure[c])
                if place < k:
                    values[r, place] = max(sure_scores[c], zero)
                    indices[r, place] = sure[c]
            continue
        # The k-th best is not below the level by more than the error.
        bar = _below(level - ROUNDING * abs(level) - widest - widest)
        bar_key = min(_key_below(max(bar, min(level, _below(-widest)))), level_key)
        held = 0
        n_waiting = 0
        for lower in range(2 if exact else 1):
            for i in range(lanes):
                if best[i] >= (bar_key if lower else level_key):
                    apart = PANEL // share
                    first = i // apart * PANEL + i % apart
                    for j in range(first, min(n, first + PANEL), apart):
                        a = _widen(P[r, j])
                        wanted = a >= level
                        if lower:
                            upper = a + _error(a, reach * latent_norm[j] + norm * latent_lost[j] + bias_reach[j])
                            wanted = (a < level) & (upper >= scores[k - 1]) & (upper > zero)
                        if wanted:
                            waiting[n_waiting] = j
                            n_waiting += 1
                            if n_waiting == WAITING:
                                held = _insert_all(x, r, W, bias, waiting, n_waiting, found, scores, latents, held)
                                n_waiting = 0
            held = _insert_all(x, r, W, bias, waiting, n_waiting, found, scores, latents, held)
            n_waiting = 0
        for c in range(held):
            values[r, c] = max(scores[c], zero)
            indices[r, c] = latents[c]


@_compiled
def choose_above(
    start: int, stop: int, P: Any, x: Any, row_reach: Any, row_norm: Any, W: Any, bias: Any, latent_norm: Any,
    latent_lost: Any, bias_reach: Any, most: Any, threshold: Any, maxima: Any, share: int, known: int, values: Any,
    indices: Any, counts: Any,
) -> None:  # fmt: skip
    """All latents of a row with ``x[r] . W[j] + bias[j] > threshold[j]``, from a bf16 product that narrows them down.

    P is how far they are above their threshold, in bf16. Row r writes its latents, lane by lane, into row r of `values`
    and `indices`, and their number into ``counts[r]``; the number is -1 when there are more than these have room for.
    The bound is that of `choose`, and so are the lanes.
    """
    n = len(bias)
    room = values.shape[1]
    opened = np.empty(maxima.shape[1], np.int32)
    near = np.empty(n + 1, np.int32)
    waiting = np.empty(n + 4, np.int32)
    asked = np.empty(AT_ONCE + 4, np.int32)
    found = np.empty(AT_ONCE + 4, np.float32)
    zero = np.float32(0.0)
    for at in range(start, stop):
        r = np.uint64(at)
        reach = row_reach[r]
        best = maxima[r]
        lanes = _lane_maxima(P, r, n, share, known, best)
        norm = row_norm[r]
        bar_key = _key_below(_below(np.float32(-1.0001) * (reach * most[0] + norm * most[1] + most[2])))
        n_near = _near(P, r, n, share, best, lanes, bar_key, opened, near)
        count = 0
        for c in range(n_near):
            j = near[c]
            a = _widen(P[r, j])
            waiting[count] = j
            count += int(a + _error(a, reach * latent_norm[j] + norm * latent_lost[j] + bias_reach[j]) >= zero)
        # --- multiplied again in fp32; those at or below their threshold go
        kept = 0
        for first in range(0, count, AT_ONCE):
            size = min(AT_ONCE, count - first)
            for c in range(size):
                asked[c] = waiting[first + c]
            _multiply(x, r, W, bias, asked, size, found)
            for c in range(size):
                if found[c] > threshold[asked[c]]:
                    if kept < room:
                        values[r, kept] = found[c]
                        indices[r, kept] = asked[c]
                    kept += 1
            if kept > room:
                break
        counts[r] = kept if kept <= room else -1


@_compiled
def pack_rows(values: Any, indices: Any, offsets: Any, packed_values: Any, packed_indices: Any) -> None:
    """The first ``offsets[r + 1] - offsets[r]`` entries of each row r, one row after the other."""
    for r in range(len(offsets) - 1):
        first = offsets[r]
        for c in range(offsets[r + 1] - first):
            packed_values[first + c] = values[r, c]
            packed_indices[first + c] = indices[r, c]
