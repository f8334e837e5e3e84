"""Building blocks of the compiled loops: bit patterns of floats, dot products, prefetching."""

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
"""Latents that share lanes, see `_lane_maxima`; and those of one tile of `saekit.kernels.cpu.low_bit_matmul`."""

ANY_LATENT = np.int32(2**31 - 1)
"""Above all latents."""


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
