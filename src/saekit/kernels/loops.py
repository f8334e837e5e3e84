"""Compiled inner loops (numba). Plain numpy arrays in, results written in place; `saekit.kernels.cpu` is the caller.

Every function works on a range ``start .. stop`` of rows or latents that nobody else writes to, so ranges may run on
several threads. What is computed for a row or a latent does not depend on the range it is in: results are bitwise the
same for any number of threads.

numba remembers the machine code of a function until its file changes: what these functions call is in this file too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Sums may be re-associated and multiply-adds fused; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz"}

LOWEST = np.int16(-32768)
"""Key of a lane without latents: below all others."""

PANEL = 64
"""Latents that share lanes, see `_lane_maxima`; and those of one tile of `saekit.kernels.product`."""

ANY_LATENT = np.int32(2**31 - 1)
"""Above all latents."""

AT_ONCE = 512
"""Latents of a row that are compared with their thresholds before it is asked whether there are too many."""

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


@njit(inline="always")
def _order_of_float(value: Any) -> Any:
    """int64 that sorts like this float32."""
    bits: Any = _bits_of_float(value)  # type: ignore[call-arg]
    return bits ^ ((bits >> 63) & 0x7FFFFFFF)


@njit(inline="always")
def _float_of_order(order: Any) -> Any:
    """The inverse of `_order_of_float`."""
    return _float_of_bits(order ^ ((order >> 63) & 0x7FFFFFFF))  # type: ignore[call-arg]


@intrinsic
def _ordered(typingctx: Any, bits: Any) -> Any:
    """int16 that sorts like the bf16 with these bits; its own inverse."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sign = builder.ashr(args[0], ir.Constant(ir.IntType(16), 15))
        return builder.xor(args[0], builder.and_(sign, ir.Constant(ir.IntType(16), 0x7FFF)))

    return types.int16(types.int16), build


@njit(fastmath=FAST)
def _dot(x: Any, r: Any, offset: Any) -> Any:
    """``x[r] . offset``: in a loop of its own its terms are added in the same order wherever it is used."""
    along = np.float32(0.0)
    for i in range(x.shape[1]):
        along += x[r, i] * offset[i]
    return along


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
    """`round_rows` of the latents of panels ``start .. stop``, put into the order of `saekit.kernels.product.multiply`.

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
    """`round_rows8` of the latents of panels ``start .. stop``, in the order of `saekit.kernels.product.multiply8`.

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


@intrinsic
def _prefetch(typingctx: Any, W: Any, row: Any, column: Any) -> Any:
    """Ask for the cache line that ``W[row, column]`` is in; `W` is contiguous."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        width = builder.extract_value(array.shape, 1)
        place = builder.gep(array.data, [builder.add(builder.mul(args[1], width), args[2])])
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(function, [builder.bitcast(place, byte), *(ir.Constant(number, v) for v in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(W, types.int64, types.int64), build


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


@_compiled
def count_by_latent(indices: Any, wanted: Any, offsets: Any) -> None:
    """How many wanted pairs each latent has, as segment starts ``offsets [n_latents + 1]`` (zero before the call)."""
    for c in range(len(indices)):
        offsets[indices[c] + 1] += np.int64(wanted[c])
    for j in range(len(offsets) - 1):
        offsets[j + 1] += offsets[j]


@_compiled
def sort_by_latent(
    row_offsets: Any,
    values: Any,
    indices: Any,
    products: Any,
    wanted: Any,
    place: Any,
    rows: Any,
    code: Any,
    slope: Any,
) -> None:
    """Put row, value and gradient of each wanted pair at ``place[latent]``, which moves on; rows ascend."""
    for r in range(len(row_offsets) - 1):
        for c in range(row_offsets[r], row_offsets[r + 1]):
            if wanted[c]:
                at = place[indices[c]]
                place[indices[c]] = at + 1
                rows[at] = r
                code[at] = values[c]
                slope[at] = products[c]


@njit(inline="always")
def _sum_rows(at: Any, last: Any, sources: Any, weight: Any, rows: Any, left: Any, right: Any, out: Any) -> Any:
    """``out += sum of weight[c] * rows[sources[c]]`` in columns ``left .. right``, four at a time.

    Returns the sum of the weights.
    """
    a = np.uint64(left)
    z = np.uint64(right)
    total = np.float32(0.0)
    while at + 4 <= last:
        for c in range(at + 4, min(at + 8, len(sources))):  # maybe of the next latent
            for i in range(left, right, 16):
                _prefetch(rows, sources[c], i)  # type: ignore[call-arg]
        r0 = np.uint64(sources[at])
        r1 = np.uint64(sources[at + 1])
        r2 = np.uint64(sources[at + 2])
        r3 = np.uint64(sources[at + 3])
        v0 = weight[at]
        v1 = weight[at + 1]
        v2 = weight[at + 2]
        v3 = weight[at + 3]
        total += (v0 + v1) + (v2 + v3)
        for i in range(a, z):
            out[i] += (v0 * rows[r0, i] + v1 * rows[r1, i]) + (v2 * rows[r2, i] + v3 * rows[r3, i])
        at += 4
    while at < last:
        r0 = np.uint64(sources[at])
        v0 = weight[at]
        total += v0
        for i in range(a, z):
            out[i] += v0 * rows[r0, i]
        at += 1
    return total


@_compiled
def gradient_of_decoder(
    start: int, stop: int, left: int, right: int, offsets: Any, sources: Any, code: Any, gradient: Any, W_dec: Any,
    slot: Any, more_dec: Any, stretch: Any, of_dec: Any, along: Any, squares: Any,
) -> None:  # fmt: skip
    """Columns ``left .. right`` of the gradient of decoder rows, and what is needed of its length.

    ``of_dec[j] = sum over pairs of code * gradient[source] + stretch[j] * W_dec[j] + more_dec[slot[j]]``, before
    projection. Adds up over panels of columns: ``along[j] = of_dec[j] . W_dec[j]`` and ``squares[j] = |of_dec[j]|^2``.

    Decoder and encoder are done one after the other because the rows that latents have in common then stay in a cache;
    columns a panel at a time where they would not even so.
    """
    a = np.uint64(left)
    z = np.uint64(right)
    for j in range(np.uint64(start), np.uint64(stop)):
        for i in range(left, right, 16):
            _prefetch(W_dec, j, i)  # type: ignore[call-arg]
        out = of_dec[j]
        for i in range(a, z):
            out[i] = np.float32(0.0)
        _sum_rows(offsets[j], offsets[j + np.uint64(1)], sources, code, gradient, left, right, out)
        if slot[j] >= 0:
            s = np.uint64(slot[j])
            for i in range(a, z):
                out[i] += more_dec[s, i]
        more = stretch[j]
        parallel = np.float32(0.0)
        square = np.float32(0.0)
        for i in range(a, z):
            value = out[i] + more * W_dec[j, i]
            parallel += value * W_dec[j, i]
            square += value * value
            out[i] = value
        along[j] += parallel
        squares[j] += square


@_compiled
def gradient_of_encoder(
    start: int, stop: int, chunk: int, left: int, right: int, offsets: Any, rows: Any, slope: Any, x: Any, offset: Any,
    W_enc: Any, slot: Any, more_enc: Any, more_bias: Any, of_enc: Any, of_bias: Any, of_offset: Any,
    squares: Any,
) -> None:  # fmt: skip
    """The same of encoder rows, ``start .. stop`` counting chunks of `chunk` latents.

    ``of_bias[j] = sum over pairs of slope + more_bias[slot[j]]``, ``of_enc[j] = sum over pairs of slope * x[row] -
    of_bias[j] * offset + more_enc[slot[j]]``, and ``of_offset[chunk]`` the sum over the chunk of ``of_bias[j] *
    W_enc[j]``. ``squares[j] += |of_enc[j]|^2``.
    """
    n = W_enc.shape[0]
    a = np.uint64(left)
    z = np.uint64(right)
    for part in range(start, stop):
        for i in range(a, z):
            of_offset[part, i] = np.float32(0.0)
        for j in range(np.uint64(part * chunk), np.uint64(min(n, (part + 1) * chunk))):
            for i in range(left, right, 16):
                _prefetch(W_enc, j, i)  # type: ignore[call-arg]
            out = of_enc[j]
            for i in range(a, z):
                out[i] = np.float32(0.0)
            bias = _sum_rows(offsets[j], offsets[j + np.uint64(1)], rows, slope, x, left, right, out)
            if slot[j] >= 0:
                s = np.uint64(slot[j])
                bias += more_bias[s]
                for i in range(a, z):
                    out[i] += more_enc[s, i]
            of_bias[j] = bias
            square = np.float32(0.0)
            for i in range(a, z):
                value = out[i] - bias * offset[i]
                of_offset[part, i] += bias * W_enc[j, i]
                square += value * value
                out[i] = value
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
    unit: bool, factor: Any, memory_m: Any, memory_v: Any, rate: Any, root: Any, eps: Any,
) -> None:  # fmt: skip
    """Clipping by `factor` and Adam for a range of latents, in one pass; with `unit`, projection of the decoder rows'
    gradient before, and length 1 afterwards.

    Latents that did not fire have gradient 0 and move too, as with a dense Adam.
    """
    d = W_enc.shape[1]
    adam_row(
        of_bias[start:stop], b_enc[start:stop], m_bias[start:stop], v_bias[start:stop],
        factor, memory_m, memory_v, rate, root, eps,
    )  # fmt: skip
    for j in range(start, stop):
        adam_row(of_enc[j], W_enc[j], m_enc[j], v_enc[j], factor, memory_m, memory_v, rate, root, eps)
        if unit:
            for i in range(d):
                of_dec[j, i] -= along[j] * W_dec[j, i]
        adam_row(of_dec[j], W_dec[j], m_dec[j], v_dec[j], factor, memory_m, memory_v, rate, root, eps)
        if unit:
            length = np.float32(0.0)
            for i in range(d):
                length += W_dec[j, i] * W_dec[j, i]
            length = np.float32(1.0) / max(np.sqrt(length), np.float32(1e-12))
            for i in range(d):
                W_dec[j, i] *= length
