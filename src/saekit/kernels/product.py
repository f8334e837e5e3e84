"""The bf16 product of rows and latents, compiled: a tile of it stays in registers until it is done.

torch's product puts the weights into an order of its own first, for every block of rows again; here they are put into
order once a step. The maxima that the search for the largest starts with cost nothing: they are taken while a tile is
still in registers.

Where a processor has AMX, torch's product uses that and is several times faster than this one: `pays` says no there.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from .loops import PANEL, _compiled, round_rows

ROWS = 6
"""Rows of a tile: with 4 vectors of latents that makes 24 sums in registers, which leaves 5 for the factors."""

SHARE = 8
"""Latents of the lanes that `multiply` finds the maxima of."""


@functools.cache
def pays() -> bool:
    """Whether this product is faster than torch's on this machine."""
    return not binding.get_host_cpu_features().get("amx-bf16", False)


@intrinsic
def _tile(
    typingctx: Any, x: Any, x_at: Any, panels: Any, panel_at: Any, pairs: Any, P: Any, P_at: Any, width: Any, best: Any,
    best_at: Any, lanes: Any,
) -> Any:  # fmt: skip
    """``P[P_at + r * width + j] = sum over p of x[x_at + r * pairs + p] . panels[panel_at + p * PANEL + j]``.

    For all r below `ROWS` and j below `PANEL`. An entry of `x` or `panels` is a pair of bf16 and their product the sum
    of two. All positions count entries of the arrays, which are contiguous. The largest of the results j, j + 8, ...
    goes into ``best[best_at + r * lanes + j]``, as a key (`saekit.kernels.loops._ordered`).
    """
    vectors = PANEL // 16
    word, long, short = ir.IntType(32), ir.IntType(64), ir.IntType(16)
    words, floats, shorts = ir.VectorType(word, 16), ir.VectorType(ir.FloatType(), 16), ir.VectorType(short, 32)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, x_at, _, panel_at, pairs, _, P_at, width, _, best_at, lanes = args
        x, panels, P, best = (
            context.make_array(signature.args[which])(context, builder, args[which]).data for which in (0, 2, 5, 8)
        )
        number = functools.partial(ir.Constant, long)

        def place(base: Any, start: Any, row: int, stride: Any, more: int, kind: Any) -> Any:
            at = builder.add(builder.add(start, builder.mul(number(row), stride)), number(more))
            return builder.bitcast(builder.gep(base, [at]), kind.as_pointer())

        def everywhere(value: Any) -> Any:
            undefined = ir.Constant(words, ir.Undefined)
            one = builder.insert_element(undefined, value, ir.Constant(word, 0))
            return builder.shuffle_vector(one, undefined, ir.Constant(words, [0] * 16))

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        def function(name: str, result: Any, *arguments: Any) -> Any:
            return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))

        dot = function("llvm.x86.avx512bf16.dpbf16ps.512", floats, floats, words, words)
        narrow = function("llvm.x86.avx512bf16.cvtne2ps2bf16.512", shorts, floats, floats)
        before = builder.block
        loop, after = builder.append_basic_block("pairs"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        p = builder.phi(long)
        p.add_incoming(number(0), before)
        sums = [[builder.phi(floats) for _ in range(vectors)] for _ in range(ROWS)]
        panel = builder.add(panel_at, builder.mul(p, number(PANEL)))
        latents = [
            builder.load(place(panels, panel, 0, number(0), 16 * v, words), align=64) for v in range(vectors)
        ]  # fmt: skip
        for r in range(ROWS):
            row = everywhere(builder.load(place(x, builder.add(x_at, p), r, pairs, 0, word), align=4))
            for v in range(vectors):
                sums[r][v].add_incoming(ir.Constant(floats, [0.0] * 16), before)
                sums[r][v].add_incoming(builder.call(dot, [sums[r][v], row, latents[v]]), loop)
        following = builder.add(p, number(1))
        p.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)
        builder.position_at_end(after)
        for r in range(ROWS):
            done = [phi.incomings[1][0] for phi in sums[r]]
            keys = []
            for half in range(vectors // 2):
                bits = builder.call(narrow, [done[2 * half + 1], done[2 * half]])
                builder.store(bits, place(P, P_at, r, width, 32 * half, shorts), align=2)
                sign = builder.ashr(bits, ir.Constant(shorts, [15] * 32))
                keys.append(builder.xor(bits, builder.and_(sign, ir.Constant(shorts, [0x7FFF] * 32))))
            largest, size = larger(*keys), PANEL // 2
            while size > PANEL // SHARE:
                size //= 2
                parts = [ir.Constant(ir.VectorType(word, size), list(range(i, i + size))) for i in (0, size)]
                largest = larger(*(builder.shuffle_vector(largest, largest, part) for part in parts))
            builder.store(largest, place(best, best_at, r, lanes, 0, largest.type), align=2)
        return context.get_dummy_value()

    whole = (types.int64,) * 11
    given = (x, None, panels, None, None, P, None, None, best, None, None)
    return types.void(*(kind or integer for kind, integer in zip(given, whole))), build


@_compiled
def round_panels(
    start: int, stop: int, W: Any, offset: Any, panels: Any, norm: Any, residual: Any, dot: Any
) -> None:  # fmt: skip
    """`saekit.kernels.loops.round_rows` of the latents of panels ``start .. stop``, put into the order of `multiply`.

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
def multiply(rows: int, x: Any, panels: Any, P: Any, best: Any) -> None:
    """``P = x @ W.T`` for the first `rows` rows of `x`, and the largest of every lane.

    `x` ``[at least rows, rounded up to tiles, pairs]`` and `panels` ``[panels, pairs, PANEL]`` hold pairs of bf16; ``P
    [rounded up, width]`` gets bf16, ``best [rounded up, at least lanes]`` the keys of lanes of `SHARE` latents (see
    `saekit.kernels.loops._lane_maxima`).
    """
    pairs = x.shape[1]
    width = P.shape[1]
    lanes = best.shape[1]
    for s in range(len(panels)):
        for r in range(0, rows, ROWS):
            _tile(  # type: ignore[call-arg]
                x, r * pairs, panels, s * pairs * PANEL, pairs, P, r * width + s * PANEL, width, best,
                r * lanes + s * (PANEL // SHARE), lanes,
            )  # fmt: skip
