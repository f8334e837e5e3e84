"""The product of rows and latents in bf16 or in whole numbers, compiled: a tile stays in registers until it is done.

torch's product puts the weights into an order of its own first, for every block of rows again; here they are put into
order once a step. The maxima that the search for the largest starts with cost nothing: they are taken while a tile is
still in registers.

Where a processor has AMX, torch's product uses that and is several times faster than these: `pays` says no there.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from .. import backend
from .intrinsics_numba import compiled, everywhere, llvm_code

PANEL = 64
"""Latents of a tile, side by side: 4 vectors of 16. Also the latents that share lanes, see `selection_numba`."""

ROWS = 6
"""Rows of a tile: with 4 vectors of latents that makes 24 of the 32 registers for sums; factors take 5."""

LANE = 8
"""Latents of the lanes that `multiply` finds the maxima of."""


class WholeRows(NamedTuple):
    """Rows as whole numbers, in the order of `multiply8`."""

    words: np.ndarray
    """``[at least rows, rounded up to tiles, width / 4]`` int32: four bytes each, numbers from -127 to 127 plus 128."""
    scale: np.ndarray
    """What the numbers count, of each row."""


class WholeLatents(NamedTuple):
    """Latents as whole numbers, in the order of `multiply8`."""

    words: np.ndarray
    """``[panels, width / 4, PANEL]`` int32: four bytes each, numbers from -127 to 127."""
    starts: np.ndarray
    """-128 times the sum of each latent's numbers: takes back what was added to those of rows."""
    scale: np.ndarray
    """What the numbers count, of each latent."""
    bias: np.ndarray
    """Added to the product."""


@functools.cache
def pays() -> bool:
    """Return whether this product is faster than torch's on this machine."""
    # The processor is asked, not numba: torch uses what there is.
    return not backend.host_features().get("amx-bf16", False)


def multiplies_bytes() -> bool:
    """Return whether numba may use the instructions of `multiply8`."""
    return backend.has_instruction("avx512vnni")


def whole_numbers_pay() -> bool:
    """Return whether `multiply8` can run and is faster than `multiply` and torch's product."""
    return pays() and multiplies_bytes()


def _tile_of(eight: bool) -> Any:
    """Build the intrinsic ``_tile(x, x_at, panels, panel_at, words, P, P_at, width, best, best_at, lanes)``.

    With `eight`, it also takes ``..., starts, scales, bias, latent_at, row_scales, row_at)``.

    ``P[P_at + r * width + j] = sum over p of x[x_at + r * words + p] . panels[panel_at + p * PANEL + j]`` for all r
    below `ROWS` and j below `PANEL`. An entry of `x` or `panels` is a pair of bf16, or four whole numbers (those of `x`
    without sign), and the product of two is the sum of theirs. All positions count entries of the arrays, which are
    contiguous. The largest of the results j, j + 8, ... goes into ``best[best_at + r * lanes + j]``, as a key
    (`saekit.kernels.cpu.intrinsics_numba.ordered`).

    Written in LLVM, because a compiler does not keep 24 sums in registers by itself and knows no instruction that
    multiplies pairs of bf16. Arguments are flat: what builds code takes arrays and numbers only.

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

        def address(base: Any, start: Any, row: int, stride: Any, more: int, kind: Any) -> Any:
            at = builder.add(builder.add(start, builder.mul(number(row), stride)), number(more))
            return builder.bitcast(builder.gep(base, [at]), kind.as_pointer())

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        def function(name: str, result: Any, *arguments: Any) -> Any:
            return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))

        def of_latents(which: int, kind: Any) -> list[Any]:
            base, at = data(which), args[14]
            return [builder.load(address(base, at, 0, number(0), 16 * v, kind), align=4) for v in range(vectors)]

        name = "llvm.x86.avx512.vpdpbusd.512" if eight else "llvm.x86.avx512bf16.dpbf16ps.512"
        dot = function(name, kind_of_sum, kind_of_sum, words, words)
        has_bf16 = backend.has_instruction("avx512bf16")

        def narrow(high: Any, low: Any) -> Any:
            """Return 32 bf16 of two vectors of sums, rounded to nearest, ties to even."""
            if has_bf16:
                return builder.call(
                    function("llvm.x86.avx512bf16.cvtne2ps2bf16.512", shorts, floats, floats), [high, low]
                )
            halves = []
            for part in (low, high):  # as `intrinsics_numba.narrow`
                bits = builder.bitcast(part, words)
                even = builder.and_(builder.lshr(bits, ir.Constant(words, [16] * 16)), ir.Constant(words, [1] * 16))
                bits = builder.add(builder.add(bits, ir.Constant(words, [0x7FFF] * 16)), even)
                upper = builder.lshr(bits, ir.Constant(words, [16] * 16))
                halves.append(builder.trunc(upper, ir.VectorType(short, 16)))
            mask = ir.Constant(ir.VectorType(word, 32), list(range(32)))
            return builder.shuffle_vector(*halves, mask)

        starts = of_latents(11, words) if eight else [ir.Constant(floats, [0.0] * 16)] * vectors
        before = builder.block
        loop, after = builder.append_basic_block("words"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        p = builder.phi(long)
        p.add_incoming(number(0), before)
        # Every sum is a value of the loop (a phi), not memory: so it stays in its register.
        sums = [[builder.phi(kind_of_sum) for _ in range(vectors)] for _ in range(ROWS)]
        panel = builder.add(panel_at, builder.mul(p, number(PANEL)))
        latents = [
            builder.load(address(panels, panel, 0, number(0), 16 * v, words), align=64) for v in range(vectors)
        ]  # fmt: skip
        for r in range(ROWS):
            row = everywhere(builder, builder.load(address(x, builder.add(x_at, p), r, length, 0, word), align=4), 16)
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
                factor = address(row_scales, row_at, r, number(1), 0, ir.FloatType())
                scale = everywhere(builder, builder.load(factor, align=4), 16)
                done = [
                    builder.fadd(
                        builder.fmul(builder.sitofp(done[v], floats), builder.fmul(scales[v], scale)), bias[v]
                    )
                    for v in range(vectors)
                ]  # fmt: skip
            keys = []  # two vectors of 16 sums make one of 32 bf16
            for half in range(vectors // 2):
                bits = narrow(done[2 * half + 1], done[2 * half])
                builder.store(bits, address(P, P_at, r, width, 32 * half, shorts), align=2)
                sign = builder.ashr(bits, ir.Constant(shorts, [15] * 32))
                keys.append(builder.xor(bits, builder.and_(sign, ir.Constant(shorts, [0x7FFF] * 32))))
            largest, size = larger(*keys), PANEL // 2  # halves of a vector are compared until lanes are left
            while size > PANEL // LANE:
                size //= 2
                parts = [ir.Constant(ir.VectorType(word, size), list(range(i, i + size))) for i in (0, size)]
                largest = larger(*(builder.shuffle_vector(largest, largest, part) for part in parts))
            builder.store(largest, address(best, best_at, r, lanes, 0, largest.type), align=2)
        return context.get_dummy_value()

    integer = types.int64

    if eight:

        @llvm_code
        def tile8(
            typingctx: Any, x: Any, x_at: Any, panels: Any, panel_at: Any, length: Any, P: Any, P_at: Any, width: Any,
            best: Any, best_at: Any, lanes: Any, starts: Any, scales: Any, bias: Any, latent_at: Any, row_scales: Any,
            row_at: Any,
        ) -> Any:  # fmt: skip
            given = (x, integer, panels, integer, integer, P, integer, integer, best, integer, integer)
            return types.void(*given, starts, scales, bias, integer, row_scales, integer), build

        return tile8

    @llvm_code
    def tile(
        typingctx: Any, x: Any, x_at: Any, panels: Any, panel_at: Any, length: Any, P: Any, P_at: Any, width: Any,
        best: Any, best_at: Any, lanes: Any,
    ) -> Any:  # fmt: skip
        given = (x, integer, panels, integer, integer, P, integer, integer, best, integer, integer)
        return types.void(*given), build

    return tile


_tile = _tile_of(eight=False)
_tile8 = _tile_of(eight=True)


@compiled
def multiply(rows: int, x: np.ndarray, panels: np.ndarray, P: np.ndarray, best: np.ndarray) -> None:
    """``P = x @ W.T`` for the first `rows` rows of `x`, and the largest of every lane.

    `x` ``[at least rows, rounded up to tiles, pairs]`` and `panels` ``[panels, pairs, PANEL]`` hold pairs of bf16; ``P
    [rounded up, width]`` gets bf16, ``best [rounded up, at least lanes]`` the keys of lanes of `LANE` latents (see
    `saekit.kernels.cpu.selection_numba._lane_maxima`).
    """
    pairs = x.shape[1]
    width = P.shape[1]
    lanes = best.shape[1]
    # All rows of a block for one panel: it is read from memory once, and the rows stay in the second cache.
    for s in range(len(panels)):
        for r in range(0, rows, ROWS):
            _tile(
                x, r * pairs, panels, s * pairs * PANEL, pairs, P, r * width + s * PANEL, width, best,
                r * lanes + s * (PANEL // LANE), lanes,
            )  # fmt: skip


@compiled
def multiply8(rows: int, x: WholeRows, W: WholeLatents, P: np.ndarray, best: np.ndarray) -> None:
    """`multiply` of whole numbers: ``P = (x @ W.T - 128 sum W) * scale of the row * scale of the latent + bias``.

    The instruction multiplies bytes without sign by bytes with one, which is why 128 is added to the numbers of rows.
    """
    words = x.words.shape[1]
    width = P.shape[1]
    lanes = best.shape[1]
    for s in range(len(W.words)):
        for r in range(0, rows, ROWS):
            _tile8(
                x.words, r * words, W.words, s * words * PANEL, words, P, r * width + s * PANEL, width, best,
                r * lanes + s * (PANEL // LANE), lanes, W.starts, W.scale, W.bias, s * PANEL, x.scale, r,
            )  # fmt: skip
