"""Inner loops in Triton for a CUDA device; `saekit.kernels.cuda.ops` is the caller.

A program works on one row, one latent or one segment of pairs and writes to nobody else's memory, and every sum has a
fixed order: the same input gives bitwise the same result. Pointers are to contiguous tensors, floats are fp32.

Arguments have no types because Triton's compiler reads annotations and knows its own only. With ``TRITON_INTERPRET=1``
in the environment the kernels run on tensors in main memory, slowly: that is how the tests run them where there is no
GPU.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # this module can be read without it; `saekit.kernels.backend.triton_here` says whether it is there
    triton = tl = None


def _compiled(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


def blocks_of(size: int, block: int) -> int:
    """Return how many blocks of `block` cover `size`."""
    return -(-size // block)


# ---------------------------------------------------------------- keys


@_compiled
def _ordered(bits, low: tl.constexpr):
    """Return integers that sort like the floats with these (sign-extended) bits; its own inverse.

    `low`: all bits but one.
    """
    return bits ^ ((bits >> 31) & low)


@_compiled
def _value_of_key(key):
    """Return the bf16 of an `_ordered` key, as fp32."""
    return (_ordered(key, 0x7FFF) << 16).to(tl.float32, bitcast=True)


@_compiled
def _rank_key(score, latent):
    """Return an int64 that sorts by score, then by smaller latent; NaN is larger than all, so that it shows."""
    score = tl.where(score == 0, 0.0, score)  # one zero
    bits = tl.where(score != score, 0x7FC00000, score.to(tl.int32, bitcast=True))
    return (_ordered(bits, 0x7FFFFFFF).to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@_compiled
def _store_best(keys, values, indices, r, k, SIZE: tl.constexpr):
    """Store the first k of sorted keys, as values after ReLU and latents."""
    at = tl.arange(0, SIZE)
    score = _ordered((keys >> 32).to(tl.int32), 0x7FFFFFFF).to(tl.float32, bitcast=True)
    score = tl.where(score <= 0, 0.0, score)  # NaN stays
    tl.store(values + r * k + at, score, mask=at < k)
    tl.store(indices + r * k + at, 0x7FFFFFFF - (keys & 0x7FFFFFFF), mask=at < k)


# ---------------------------------------------------------------- encode


@_compiled
def round_rows(
    x, offset, low, norm, residual, dot, d, slack, HAS_OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Round a row to bf16; store upper bounds of its norm and of the norm of what was lost, and ``row . offset``."""
    r = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    lost = tl.zeros((BLOCK_D,), tl.float32)
    along = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, d, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        value = tl.load(x + r * d + at, mask=at < d, other=0.0)
        rounded = value.to(tl.bfloat16)
        tl.store(low + r * d + at, rounded, mask=at < d)
        difference = value - rounded.to(tl.float32)
        total += value * value
        lost += difference * difference
        if HAS_OFFSET:
            along += value * tl.load(offset + at, mask=at < d, other=0.0)
    left = tl.sqrt(tl.sum(lost)) * slack + 1e-36  # for what is flushed to 0: sqrt(d) 2^-126, up to d = 4,000
    tl.store(residual + r, left)
    tl.store(norm + r, tl.sqrt(tl.sum(total)) * slack + left)
    if HAS_OFFSET:
        tl.store(dot + r, tl.sum(along))


@_compiled
def select(
    P, row_reach, latent_reach, bias_reach, most_reach, most_bias, candidates,
    counts, n_latents, width, k, room, rounding, ABOVE: tl.constexpr, EXACT: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Find the latents of a row that may be among its k largest, or (with ABOVE) not below 0; count them.

    ``P [n, width]`` are the bits of a bf16 product, bias included; its first `n_latents` columns are meant. It is off
    by at most ``row_reach * latent_reach + bias_reach``, and ``rounding`` times itself. Lane maxima locate a level that
    k latents reach for sure; a latent whose upper bound is below the level's lower bound is not among the k largest.
    Latents go to ``candidates [n, room]`` in ascending order, as many as there is room for.
    """
    r = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    reach = tl.load(row_reach + r)
    # 1.0001 for the rounding of these sums.
    widest = 1.0001 * (reach * tl.load(most_reach) + tl.load(most_bias))
    level = 0.0
    least = 0.0
    if not ABOVE:
        best = tl.full((LANES,), -32768, tl.int32)
        for first in range(0, n_latents, LANES):
            at = first + lane
            bits = tl.load(P + r * width + at, mask=at < n_latents, other=0).to(tl.int32)
            best = tl.maximum(best, tl.where(at < n_latents, _ordered(bits, 0x7FFF), -32768))
        low = tl.min(best)
        high = tl.max(best) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            reached = tl.sum((best >= middle).to(tl.int32))
            # An eighth more lanes than k are near enough: then both ends meet. A loop has no break here.
            low = tl.where(reached >= k, middle, low)
            high = tl.where(reached >= k, tl.where(reached <= k + k // 8, low + 1, high), middle)
        level = _value_of_key(low)
        # Not below 0: a latent that is not positive would have the value 0.
        least = tl.maximum(level - rounding * tl.abs(level) - widest, 0.0)
    count = 0
    for first in range(0, n_latents, LANES):
        at = first + lane
        bits = tl.load(P + r * width + at, mask=at < n_latents, other=0).to(tl.int32)
        a = _value_of_key(_ordered(bits, 0x7FFF))
        near = (at < n_latents) & (a + (rounding * tl.abs(a) + widest) >= least)
        error = reach * tl.load(latent_reach + at, mask=near, other=0.0) + tl.load(
            bias_reach + at, mask=near, other=0.0
        )
        upper = a + (rounding * tl.abs(a) + error)
        if ABOVE:
            wanted = near & (upper >= 0)
        else:
            sure = (at < n_latents) & (a >= level)
            wanted = sure | (near & (upper >= least) & (upper > 0)) if EXACT else sure
        index = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
        tl.store(candidates + r * room + index, at, mask=wanted & (index < room))
        count += tl.sum(wanted.to(tl.int32))
    # -1: not finite, or so large that a product could overflow; `best_of_all` takes such rows, and -1 is below any k.
    tl.store(counts + r, tl.where(reach < 1e18, count, -1))


@_compiled
def rescore(
    x, W, bias, candidates, counts, scores, d, room, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store ``scores[r, c] = x[r] . W[candidates[r, c]] + bias`` in fp32 for the candidates of a row."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.minimum(tl.load(counts + r), room)
    if tl.program_id(1) * BLOCK_C < count:
        there = c < count
        j = tl.load(candidates + r * room + c, mask=there, other=0).to(tl.int64)
        total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        for first in range(0, d, BLOCK_D):
            at = first + tl.arange(0, BLOCK_D)
            row = tl.load(x + r * d + at, mask=at < d, other=0.0)
            w = tl.load(W + j[:, None] * d + at[None, :], mask=there[:, None] & (at[None, :] < d), other=0.0)
            total += row[None, :] * w
        score = tl.sum(total, axis=1) + tl.load(bias + j, mask=there, other=0.0)
        tl.store(scores + r * room + c, score, mask=there)


@_compiled
def best_of(
    candidates, scores, counts, values, indices, k, ROOM: tl.constexpr,
):  # fmt: skip
    """Store the k largest scores of a row, largest first, smaller latents first among equals.

    Rows for `best_of_all` are not written.
    """
    r = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + r)
    if (count >= k) & (count <= ROOM):
        at = tl.arange(0, ROOM)
        there = at < count
        score = tl.load(scores + r * ROOM + at, mask=there, other=0.0)
        latent = tl.load(candidates + r * ROOM + at, mask=there, other=0)
        keys = tl.where(there, _rank_key(score, latent), -0x7FFFFFFFFFFFFFFF)
        _store_best(tl.sort(keys, descending=True), values, indices, r, k, ROOM)


@_compiled
def best_of_all(
    x, W, bias, counts, values, indices, n_latents, d, k, room,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`best_of` for the few rows with more candidates than there is room for, or that are not finite: every latent is
    multiplied in fp32.
    """
    r = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + r)
    if (count < k) | (count > room):
        best = tl.full((SIZE,), -0x7FFFFFFFFFFFFFFF, tl.int64)
        for start in range(0, n_latents, SIZE):
            j = start + tl.arange(0, SIZE)
            there = j < n_latents
            total = tl.zeros((SIZE, BLOCK_D), tl.float32)
            for first in range(0, d, BLOCK_D):
                at = first + tl.arange(0, BLOCK_D)
                row = tl.load(x + r * d + at, mask=at < d, other=0.0)
                inside = there[:, None] & (at[None, :] < d)
                total += row[None, :] * tl.load(W + j[:, None].to(tl.int64) * d + at[None, :], mask=inside, other=0.0)
            score = tl.sum(total, axis=1) + tl.load(bias + j, mask=there, other=0.0)
            keys = tl.where(there, _rank_key(score, j), -0x7FFFFFFFFFFFFFFF)
            # Two sorted lists, one of them turned round: the larger of each two are the largest of all.
            best = tl.sort(tl.maximum(best, tl.sort(keys)), descending=True)
        _store_best(best, values, indices, r, k, SIZE)


# ---------------------------------------------------------------- decode


@_compiled
def weighted_sums(
    offsets, indices, weights, W, out, d, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store ``out[r] = sum over the row's entries of weight * W[index]``."""
    r = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    last = tl.load(offsets + r + 1)
    for first in range(tl.load(offsets + r), last, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        there = c < last
        j = tl.load(indices + c, mask=there, other=0).to(tl.int64)
        weight = tl.load(weights + c, mask=there, other=0.0)
        inside = there[:, None] & (at[None, :] < d)
        total += weight[:, None] * tl.load(W + j[:, None] * d + at[None, :], mask=inside, other=0.0)
    tl.store(out + r * d + at, tl.sum(total, axis=0), mask=at < d)


@_compiled
def reconstruct(
    x, offsets, indices, values, W, offset, scale, gradient, slopes,
    squares, n, n_pairs, d, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Decode BLOCK_D columns of a row and differentiate its squared error.

    ``error = sum_c values[c] * W[indices[c]] + offset - x``; writes ``gradient = scale * error``, the error's sum of
    squares over these columns, ``squares [panels, n]``, and their part of ``gradient . W[indices[c]]``, ``slopes
    [panels, n_pairs]``.
    """
    r = tl.program_id(0).to(tl.int64)
    panel = tl.program_id(1).to(tl.int64)
    at = panel * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(offsets + r)
    last = tl.load(offsets + r + 1)
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for first in range(begin, last, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        there = c < last
        j = tl.load(indices + c, mask=there, other=0).to(tl.int64)
        value = tl.load(values + c, mask=there, other=0.0)
        inside = there[:, None] & (at[None, :] < d)
        total += value[:, None] * tl.load(W + j[:, None] * d + at[None, :], mask=inside, other=0.0)
    error = tl.load(offset + at, mask=at < d, other=0.0) - tl.load(x + r * d + at, mask=at < d, other=0.0)
    error += tl.sum(total, axis=0)
    tl.store(squares + panel * n + r, tl.sum(error * error))
    error *= scale
    tl.store(gradient + r * d + at, error, mask=at < d)
    for first in range(begin, last, BLOCK_C):  # the same rows again: they are in the first cache
        c = first + tl.arange(0, BLOCK_C)
        there = c < last
        j = tl.load(indices + c, mask=there, other=0).to(tl.int64)
        inside = there[:, None] & (at[None, :] < d)
        w = tl.load(W + j[:, None] * d + at[None, :], mask=inside, other=0.0)
        tl.store(slopes + panel * n_pairs + c, tl.sum(w * error[None, :], axis=1), mask=there)


# ---------------------------------------------------------------- gradient of the weights


@_compiled
def _finish_latent(
    j, at, panel, dec, enc, bias, offset, W_dec, slot, more_dec,
    more_enc, more_bias, stretch, of_dec, of_enc, of_bias, along, squares,
    n_latents, d, HAS_MORE: tl.constexpr, HAS_STRETCH: tl.constexpr,
):  # fmt: skip
    """Add what is added to a latent's sums once; store them and what is needed of their length."""
    inside = at < d
    w = tl.load(W_dec + j * d + at, mask=inside, other=0.0)
    if HAS_STRETCH:
        dec += tl.load(stretch + j) * w
    if HAS_MORE:
        s = tl.load(slot + j).to(tl.int64)
        if s >= 0:
            dec += tl.load(more_dec + s * d + at, mask=inside, other=0.0)
            enc += tl.load(more_enc + s * d + at, mask=inside, other=0.0)
            bias += tl.load(more_bias + s)
    enc -= bias * tl.load(offset + at, mask=inside, other=0.0)
    tl.store(of_dec + j * d + at, dec, mask=inside)
    tl.store(of_enc + j * d + at, enc, mask=inside)
    tl.store(along + panel * n_latents + j, tl.sum(dec * w))
    tl.store(squares + panel * n_latents + j, tl.sum(dec * dec + enc * enc))
    if panel == 0:
        tl.store(of_bias + j, bias)


@_compiled
def gradient_of_segments(
    segment_latent, segment_first, starts, order, rows, code, slope, gradient,
    x, shift, parts_dec, parts_enc, parts_bias,
    offset, W_dec, slot, more_dec, more_enc, more_bias, stretch, of_dec,
    of_enc, of_bias, along, squares, n, n_latents, d, SEGMENT: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_MORE: tl.constexpr, HAS_STRETCH: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum BLOCK_D columns of the gradient of one latent's weights, from at most SEGMENT of its pairs.

    Segments are numbered latent by latent: segment s is of latent ``segment_latent[s]``, whose first one is
    ``segment_first[latent]``. The pairs of latent j are ``order[starts[j]:starts[j + 1]]``. ``of_dec = sum code *
    gradient[row + shift]``, ``of_enc = sum slope * (x[row % n] - offset)``. A latent of several segments leaves its
    sums in the `parts`; `gradient_of_parts` adds them up. Latents that fired often would otherwise keep one program
    busy when all others are done.
    """
    s = tl.program_id(0).to(tl.int64)
    panel = tl.program_id(1).to(tl.int64)
    j = tl.load(segment_latent + s).to(tl.int64)
    if j < n_latents:
        at = panel * BLOCK_D + tl.arange(0, BLOCK_D)
        number = s - tl.load(segment_first + j)
        begin = tl.load(starts + j) + number * SEGMENT
        end = tl.load(starts + j + 1)
        last = tl.minimum(end, begin + SEGMENT)
        moved = 0
        if HAS_SHIFT:
            moved = tl.load(shift + j)
        dec = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        enc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        bias = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(begin, last, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            there = c < last
            pair = tl.load(order + c, mask=there, other=0)
            row = tl.load(rows + pair, mask=there, other=0).to(tl.int64)
            value = tl.load(code + pair, mask=there, other=0.0)
            of_value = tl.load(slope + pair, mask=there, other=0.0)
            inside = there[:, None] & (at[None, :] < d)
            g = tl.load(gradient + (row + moved)[:, None] * d + at[None, :], mask=inside, other=0.0)
            u = tl.load(x + (row % n)[:, None] * d + at[None, :], mask=inside, other=0.0)
            dec += value[:, None] * g
            enc += of_value[:, None] * u
            bias += of_value
        if (number == 0) & (end <= last):
            _finish_latent(
                j, at, panel, tl.sum(dec, axis=0), tl.sum(enc, axis=0), tl.sum(bias), offset, W_dec, slot, more_dec,
                more_enc, more_bias, stretch, of_dec, of_enc, of_bias, along, squares, n_latents, d, HAS_MORE,
                HAS_STRETCH,
            )  # fmt: skip
        else:
            # A latent with m > 1 segments has m slots from here on, before those of the next latent with several: it
            # has more than (m - 1) SEGMENT pairs, so 2 (m - 1) >= m slots lie between its first pair and the next.
            slot_of_part = (tl.load(starts + j) // SEGMENT) * 2 + number
            tl.store(parts_dec + slot_of_part * d + at, tl.sum(dec, axis=0), mask=at < d)
            tl.store(parts_enc + slot_of_part * d + at, tl.sum(enc, axis=0), mask=at < d)
            if panel == 0:
                tl.store(parts_bias + slot_of_part, tl.sum(bias))


@_compiled
def gradient_of_parts(
    starts, parts_dec, parts_enc, parts_bias, offset, W_dec, slot, more_dec,
    more_enc, more_bias, stretch, of_dec, of_enc, of_bias, along, squares,
    n_latents, d, SEGMENT: tl.constexpr, HAS_MORE: tl.constexpr, HAS_STRETCH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up the gradient of latents with more than SEGMENT pairs, from the sums of `gradient_of_segments`."""
    j = tl.program_id(0).to(tl.int64)
    panel = tl.program_id(1).to(tl.int64)
    begin = tl.load(starts + j)
    pairs = tl.load(starts + j + 1) - begin
    if pairs > SEGMENT:
        at = panel * BLOCK_D + tl.arange(0, BLOCK_D)
        dec = tl.zeros((BLOCK_D,), tl.float32)
        enc = tl.zeros((BLOCK_D,), tl.float32)
        bias = 0.0
        first_slot = (begin // SEGMENT) * 2
        for number in range(0, tl.cdiv(pairs, SEGMENT)):
            dec += tl.load(parts_dec + (first_slot + number) * d + at, mask=at < d, other=0.0)
            enc += tl.load(parts_enc + (first_slot + number) * d + at, mask=at < d, other=0.0)
            bias += tl.load(parts_bias + first_slot + number)
        _finish_latent(
            j, at, panel, dec, enc, bias, offset, W_dec, slot, more_dec, more_enc, more_bias, stretch, of_dec, of_enc,
            of_bias, along, squares, n_latents, d, HAS_MORE, HAS_STRETCH,
        )  # fmt: skip


# ---------------------------------------------------------------- update


@_compiled
def _adam(g, w, m, v, at, inside, memory_m, memory_v, rate, root, eps):
    """Update the moments of `g` in place; return the new weights."""
    mean = tl.load(m + at, mask=inside, other=0.0)
    square = tl.load(v + at, mask=inside, other=0.0)
    mean += (g - mean) * memory_m
    square += (g * g - square) * memory_v
    tl.store(m + at, mean, mask=inside)
    tl.store(v + at, square, mask=inside)
    return tl.load(w + at, mask=inside, other=0.0) - rate * mean / (tl.sqrt(square) * root + eps)


@_compiled
def adam_vector(
    g, w, m, v, factor, size, memory_m, memory_v, rate, root,
    eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adam for one vector of weights with gradient ``factor * g``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    slope = tl.load(g + at, mask=inside, other=0.0) * tl.load(factor)
    tl.store(w + at, _adam(slope, w, m, v, at, inside, memory_m, memory_v, rate, root, eps), mask=inside)


@_compiled
def update_latents(
    of_dec, of_enc, along, W_enc, W_dec, m_enc, m_dec, v_enc, v_dec,
    factor, memory_m, memory_v, rate, root, eps, d, UNIT: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Clipping by ``factor`` and Adam for one latent; with UNIT, projection of its decoder row's gradient before, and
    length 1 afterwards.
    """
    j = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    inside = i < d
    at = j * d + i
    scale = tl.load(factor)
    g = tl.load(of_enc + at, mask=inside, other=0.0) * scale
    tl.store(W_enc + at, _adam(g, W_enc, m_enc, v_enc, at, inside, memory_m, memory_v, rate, root, eps), mask=inside)
    g = tl.load(of_dec + at, mask=inside, other=0.0)
    if UNIT:
        g -= tl.load(along + j) * tl.load(W_dec + at, mask=inside, other=0.0)
    w = _adam(g * scale, W_dec, m_dec, v_dec, at, inside, memory_m, memory_v, rate, root, eps)
    if UNIT:
        w = tl.where(inside, w, 0.0)
        w /= tl.maximum(tl.sqrt(tl.sum(w * w)), 1e-12)
    tl.store(W_dec + at, w, mask=inside)
