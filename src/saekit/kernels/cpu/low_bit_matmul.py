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


class ByteProduct(NamedTuple):
    """How the processor multiplies whole numbers."""

    lanes: int
    """Sums in a register."""
    vectors: int
    """Registers of latents that a tile has side by side: with `ROWS` rows, all that sums find room in."""
    in_pairs: bool
    """Whether pairs of products are added up in 16 bits first: those of a latent must leave room for that."""
    why: str
    """What the processor has, in words."""

    @property
    def tile(self) -> int:
        """Latents of a tile; a panel is made of whole ones."""
        return self.lanes * self.vectors


class WholeRows(NamedTuple):
    """Rows as whole numbers, in the order of `multiply8`."""

    words: np.ndarray
    """``[at least rows, rounded up to tiles, width / 4]`` int32: four bytes each, numbers from -127 to 127 plus 128."""
    scale: np.ndarray
    """What the numbers count, of each row."""


class WholeLatents(NamedTuple):
    """Latents as whole numbers, in the order of `multiply8`."""

    words: np.ndarray
    """Four bytes each, numbers from -127 to 127, as int32 ``[panels, width / 4, PANEL]`` for `WIDE` and ``[panels,
    tiles, width / 4, latents of a tile]`` for `NARROW`; the same as uint32 for `PAIRED`: code is made by types."""
    starts: np.ndarray
    """-128 times the sum of each latent's numbers: takes back what was added to those of rows."""
    scale: np.ndarray
    """What the numbers count, of each latent."""
    bias: np.ndarray
    """Added to the product."""


@functools.cache
def pays() -> bool:
    """Return whether this product is faster than torch's on this machine."""
    # The processor is asked for AMX, not numba: torch uses what there is. Its product in bf16 is an alternative only
    # where what comes after it is compiled for that format.
    return backend.bf16_unavailable() is not None or not backend.host_features().get("amx-bf16", False)


WIDE = ByteProduct(16, PANEL // 16, False, "the processor has AVX-512 VNNI")
NARROW = ByteProduct(8, 2, False, "the processor has VNNI in 256-bit registers")
PAIRED = ByteProduct(8, 2, True, "the processor has AVX2, and no VNNI")


@functools.cache
def byte_products() -> tuple[ByteProduct, ...]:
    """Return how numba may multiply whole numbers on this processor, the fastest first; empty where it may not."""
    # AVX-VNNI is what processors without AVX-512 have. That of AVX-512 in 256-bit registers is the same instruction.
    narrow = backend.has_instructions("avxvnni") or backend.has_instructions("avx512vnni", "avx512vl")
    there = {WIDE: backend.has_instruction("avx512vnni"), NARROW: narrow, PAIRED: backend.has_instructions("avx2")}
    return tuple(product for product, has_it in there.items() if has_it)


def whole_numbers_pay() -> bool:
    """Return whether `multiply8` can run and is faster than `multiply` and torch's product."""
    return pays() and bool(byte_products())


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
    row_scales[row_at + r]``, and ``bias[latent_at + j]`` is added. Which product it is shows in the type of `panels`
    (see `WholeLatents`).
    """
    word, long, short = ir.IntType(32), ir.IntType(64), ir.IntType(16)
    number = functools.partial(ir.Constant, long)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = signature.args[2]
        size, vectors, in_pairs, _ = WIDE if given.ndim == 3 else NARROW if given.dtype.signed else PAIRED
        words, floats, shorts = (
            ir.VectorType(word, size), ir.VectorType(ir.FloatType(), size), ir.VectorType(short, 2 * size)
        )  # fmt: skip
        kind_of_sum = words if eight else floats

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

        def of_latents(which: int, first: int, kind: Any) -> list[Any]:
            base, at = data(which), args[14]
            places = (address(base, at, 0, number(0), first + size * v, kind) for v in range(vectors))
            return [builder.load(place, align=4) for place in places]

        def all_lanes(kind: Any, value: Any) -> Any:
            return ir.Constant(kind, [value] * kind.count)

        def plus_product(total: Any, row: Any, latents: Any) -> Any:
            if in_pairs:
                octets = ir.VectorType(ir.IntType(8), 4 * size)
                by_pairs = function("llvm.x86.avx2.pmadd.ub.sw", shorts, octets, octets)
                sum_of_pairs = function("llvm.x86.avx2.pmadd.wd", words, shorts, shorts)
                pairs = builder.call(by_pairs, [builder.bitcast(part, octets) for part in (row, latents)])
                return builder.add(total, builder.call(sum_of_pairs, [pairs, all_lanes(shorts, 1)]))
            name = f"llvm.x86.avx512.vpdpbusd.{32 * size}" if eight else "llvm.x86.avx512bf16.dpbf16ps.512"
            return builder.call(function(name, kind_of_sum, kind_of_sum, words, words), [total, row, latents])

        has_bf16 = size == 16 and backend.has_instruction("avx512bf16")

        def narrow(high: Any, low: Any) -> Any:
            """Return the bf16 of two vectors of sums, rounded to nearest, ties to even."""
            if has_bf16:
                return builder.call(
                    function("llvm.x86.avx512bf16.cvtne2ps2bf16.512", shorts, floats, floats), [high, low]
                )
            halves = []
            for part in (low, high):  # as `intrinsics_numba.narrow`
                bits = builder.bitcast(part, words)
                even = builder.and_(builder.lshr(bits, all_lanes(words, 16)), all_lanes(words, 1))
                bits = builder.add(builder.add(bits, all_lanes(words, 0x7FFF)), even)
                halves.append(builder.trunc(builder.lshr(bits, all_lanes(words, 16)), ir.VectorType(short, size)))
            mask = ir.Constant(ir.VectorType(word, 2 * size), list(range(2 * size)))
            return builder.shuffle_vector(*halves, mask)

        def sums_of(first: int) -> list[list[Any]]:
            """Return the sums of all rows and the latents of the tile that begins with this one of the panel."""
            starts = of_latents(11, first, words) if eight else [all_lanes(floats, 0.0)] * vectors
            tile_at = builder.add(panel_at, builder.mul(number(first), length))
            before = builder.block
            loop, after = builder.append_basic_block("words"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            p = builder.phi(long)
            p.add_incoming(number(0), before)
            # Every sum is a value of the loop (a phi), not memory: so it stays in its register.
            sums = [[builder.phi(kind_of_sum) for _ in range(vectors)] for _ in range(ROWS)]
            at = builder.add(tile_at, builder.mul(p, number(size * vectors)))
            places = (address(panels, at, 0, number(0), size * v, words) for v in range(vectors))
            latents = [builder.load(place, align=4) for place in places]
            for r in range(ROWS):
                place = address(x, builder.add(x_at, p), r, length, 0, word)
                row = everywhere(builder, builder.load(place, align=4), size)
                for v in range(vectors):
                    sums[r][v].add_incoming(starts[v], before)
                    sums[r][v].add_incoming(plus_product(sums[r][v], row, latents[v]), loop)
            following = builder.add(p, number(1))
            p.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, length), loop, after)
            builder.position_at_end(after)
            return [[phi.incomings[1][0] for phi in row_sums] for row_sums in sums]

        keys: list[list[Any]] = [[] for _ in range(ROWS)]
        for first in range(0, PANEL, size * vectors):
            sums = sums_of(first)
            if eight:
                scales, bias = of_latents(12, first, floats), of_latents(13, first, floats)
                row_scales, row_at = data(15), args[16]
            for r, done in enumerate(sums):
                if eight:
                    factor = address(row_scales, row_at, r, number(1), 0, ir.FloatType())
                    scale = everywhere(builder, builder.load(factor, align=4), size)
                    done = [
                        builder.fadd(
                            builder.fmul(builder.sitofp(done[v], floats), builder.fmul(scales[v], scale)), bias[v]
                        )
                        for v in range(vectors)
                    ]  # fmt: skip
                for v in range(0, vectors, 2):  # two vectors of sums make one of bf16
                    bits = narrow(done[v + 1], done[v])
                    builder.store(bits, address(P, P_at, r, width, first + size * v, shorts), align=2)
                    sign = builder.ashr(bits, all_lanes(shorts, 15))
                    keys[r].append(builder.xor(bits, builder.and_(sign, all_lanes(shorts, 0x7FFF))))
        for r in range(ROWS):
            largest, left = functools.reduce(larger, keys[r]), 2 * size
            while left > PANEL // LANE:  # halves of a vector are compared until lanes are left
                left //= 2
                parts = [ir.Constant(ir.VectorType(word, left), list(range(i, i + left))) for i in (0, left)]
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
    """`multiply` of whole numbers: ``P = (x @ W.T + starts) * scale of the row * scale of the latent + bias``.

    The instruction multiplies bytes without sign by bytes with one, which is why something is added to the numbers of
    rows, and taken back by `starts`.
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
