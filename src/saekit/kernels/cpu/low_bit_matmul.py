"""The product of rows and latents in bf16 or in whole numbers, compiled: a tile stays in registers until it is done.

torch's product puts the weights into an order of its own first, for every block of rows again; here they are put into
order once a step. The maxima that the search for the largest starts with cost nothing: they are taken while a tile is
still in registers.

Where a processor has AMX, torch's product uses that and is several times faster than these: `pays` says no there.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from .intrinsics_numba import PANEL, _compiled

ROWS = 6
"""Rows of a tile: with 4 vectors of latents that makes 24 sums in registers, which leaves 5 for the factors."""

SHARE = 8
"""Latents of the lanes that `multiply` finds the maxima of."""


@functools.cache
def pays() -> bool:
    """Whether this product is faster than torch's on this machine."""
    return not binding.get_host_cpu_features().get("amx-bf16", False)


@functools.cache
def whole_numbers_pay() -> bool:
    """Whether `multiply8` can run and is faster than `multiply`."""
    return pays() and binding.get_host_cpu_features().get("avx512vnni", False)


def _tile_of(eight: bool) -> Any:
    """The intrinsic ``_tile(x, x_at, panels, panel_at, words, P, P_at, width, best, best_at, lanes)``, or with `eight`
    also ``..., starts, scales, bias, latent_at, row_scales, row_at)``.

    ``P[P_at + r * width + j] = sum over p of x[x_at + r * words + p] . panels[panel_at + p * PANEL + j]`` for all r
    below `ROWS` and j below `PANEL`. An entry of `x` or `panels` is a pair of bf16, or four whole numbers (those of `x`
    without sign), and the product of two is the sum of theirs. All positions count entries of the arrays, which are
    contiguous. The largest of the results j, j + 8, ... goes into ``best[best_at + r * lanes + j]``, as a key
    (`saekit.kernels.cpu.intrinsics_numba._ordered`).

    Sums of whole numbers begin at ``starts[latent_at + j]``; they are multiplied by ``scales[latent_at + j] *
    row_scales[row_at + r]``, and ``bias[latent_at + j]`` is added.
    """
    vectors = PANEL // 16
    word, long, short = ir.IntType(32), ir.IntType(64), ir.IntType(16)
    words, floats, shorts = ir.VectorType(word, 16), ir.VectorType(ir.FloatType(), 16), ir.VectorType(short, 32)
    kind_of_sum = words if eight else floats
    number = functools.partial(ir.Constant, long)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def data(which: int) -> Any:
            return context.make_array(signature.args[which])(context, builder, args[which]).data

        x, panels, P, best = (data(which) for which in (0, 2, 5, 8))
        _, x_at, _, panel_at, length, _, P_at, width, _, best_at, lanes, *_ = args

        def place(base: Any, start: Any, row: int, stride: Any, more: int, kind: Any) -> Any:
            at = builder.add(builder.add(start, builder.mul(number(row), stride)), number(more))
            return builder.bitcast(builder.gep(base, [at]), kind.as_pointer())

        def everywhere(value: Any) -> Any:
            undefined = ir.Constant(ir.VectorType(value.type, 16), ir.Undefined)
            one = builder.insert_element(undefined, value, ir.Constant(word, 0))
            return builder.shuffle_vector(one, undefined, ir.Constant(words, [0] * 16))

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        def function(name: str, result: Any, *arguments: Any) -> Any:
            return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))

        def of_latents(which: int, kind: Any) -> list[Any]:
            base, at = data(which), args[14]
            return [builder.load(place(base, at, 0, number(0), 16 * v, kind), align=4) for v in range(vectors)]

        name = "llvm.x86.avx512.vpdpbusd.512" if eight else "llvm.x86.avx512bf16.dpbf16ps.512"
        dot = function(name, kind_of_sum, kind_of_sum, words, words)
        narrow = function("llvm.x86.avx512bf16.cvtne2ps2bf16.512", shorts, floats, floats)
        starts = of_latents(11, words) if eight else [ir.Constant(floats, [0.0] * 16)] * vectors
        before = builder.block
        loop, after = builder.append_basic_block("words"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        p = builder.phi(long)
        p.add_incoming(number(0), before)
        sums = [[builder.phi(kind_of_sum) for _ in range(vectors)] for _ in range(ROWS)]
        panel = builder.add(panel_at, builder.mul(p, number(PANEL)))
        latents = [
            builder.load(place(panels, panel, 0, number(0), 16 * v, words), align=64) for v in range(vectors)
        ]  # fmt: skip
        for r in range(ROWS):
            row = everywhere(builder.load(place(x, builder.add(x_at, p), r, length, 0, word), align=4))
            for v in range(vectors):
                sums[r][v].add_incoming(starts[v], before)
                sums[r][v].add_incoming(builder.call(dot, [sums[r][v], row, latents[v]]), loop)
        following = builder.add(p, number(1))
        p.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, length), loop, after)
        builder.position_at_end(after)
        if eight:
            scales, bias = of_latents(12, floats), of_latents(13, floats)
            row_scales, row_at = data(15), args[16]
        for r in range(ROWS):
            done = [phi.incomings[1][0] for phi in sums[r]]
            if eight:
                place_of_row = place(row_scales, row_at, r, number(1), 0, ir.FloatType())
                scale = everywhere(builder.load(place_of_row, align=4))
                done = [
                    builder.fadd(
                        builder.fmul(builder.sitofp(done[v], floats), builder.fmul(scales[v], scale)), bias[v]
                    )
                    for v in range(vectors)
                ]  # fmt: skip
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

    integer = types.int64

    if eight:

        @intrinsic
        def tile8(
            typingctx: Any, x: Any, x_at: Any, panels: Any, panel_at: Any, length: Any, P: Any, P_at: Any, width: Any,
            best: Any, best_at: Any, lanes: Any, starts: Any, scales: Any, bias: Any, latent_at: Any, row_scales: Any,
            row_at: Any,
        ) -> Any:  # fmt: skip
            given = (x, integer, panels, integer, integer, P, integer, integer, best, integer, integer)
            return types.void(*given, starts, scales, bias, integer, row_scales, integer), build

        return tile8

    @intrinsic
    def tile(
        typingctx: Any, x: Any, x_at: Any, panels: Any, panel_at: Any, length: Any, P: Any, P_at: Any, width: Any,
        best: Any, best_at: Any, lanes: Any,
    ) -> Any:  # fmt: skip
        given = (x, integer, panels, integer, integer, P, integer, integer, best, integer, integer)
        return types.void(*given), build

    return tile


_tile = _tile_of(eight=False)
_tile8 = _tile_of(eight=True)


@_compiled
def multiply(rows: int, x: Any, panels: Any, P: Any, best: Any) -> None:
    """``P = x @ W.T`` for the first `rows` rows of `x`, and the largest of every lane.

    `x` ``[at least rows, rounded up to tiles, pairs]`` and `panels` ``[panels, pairs, PANEL]`` hold pairs of bf16; ``P
    [rounded up, width]`` gets bf16, ``best [rounded up, at least lanes]`` the keys of lanes of `SHARE` latents (see
    `saekit.kernels.cpu.selection_numba._lane_maxima`).
    """
    pairs = x.shape[1]
    width = P.shape[1]
    lanes = best.shape[1]
    for s in range(len(panels)):
        for r in range(0, rows, ROWS):
            _tile(
                x, r * pairs, panels, s * pairs * PANEL, pairs, P, r * width + s * PANEL, width, best,
                r * lanes + s * (PANEL // SHARE), lanes,
            )  # fmt: skip


@_compiled
def multiply8(
    rows: int, x: Any, row_scales: Any, panels: Any, starts: Any, scales: Any, bias: Any, P: Any, best: Any
) -> None:
    """`multiply` of whole numbers: ``P = (x @ W.T - 128 sum W) * row_scales * scales + bias``.

    `x` holds four bytes an entry, numbers from -127 to 127 plus 128, `panels` four from -127 to 127. `starts` are
    ``-128 sum W`` of each latent.
    """
    words = x.shape[1]
    width = P.shape[1]
    lanes = best.shape[1]
    for s in range(len(panels)):
        for r in range(0, rows, ROWS):
            _tile8(
                x, r * words, panels, s * words * PANEL, words, P, r * width + s * PANEL, width, best,
                r * lanes + s * (PANEL // SHARE), lanes, starts, scales, bias, s * PANEL, row_scales, r,
            )  # fmt: skip
