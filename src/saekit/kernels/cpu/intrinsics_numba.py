"""Building blocks of the compiled loops: how they are compiled, bit patterns of floats, vector code, prefetching.

numba compiles a loop for the types that it is called with, so annotations here are for readers and for mypy alone.
Functions of LLVM take a builder; what they return is one instruction or a few that the compiler does not find itself.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FAST = {"reassoc", "contract", "nsz"}
"""Sums may be re-associated and multiply-adds fused, or no loop of sums is vectorized. Not ``fast``, which would let
the compiler assume the absence of NaN and infinity: those have to show."""

Float: TypeAlias = float | np.floating
"""A number of the loops, whatever its width."""

Int: TypeAlias = int | np.integer
"""A whole number or an index of the loops. Indices without a sign are faster: there is no counting from the end."""

Function = TypeVar("Function", bound=Callable[..., Any])

llvm_code: Any = intrinsic
"""`numba.extending.intrinsic`; as Any, because callers do not pass the typing context that the definition has."""


def compiled(function: Function) -> Function:
    """Compile on first use, release Python's lock while running, and remember the machine code between processes."""
    # `error_model`: a division by 0 gives infinity, as in numpy, and loops have no branch for it.
    options: Any = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    try:
        loop = njit(cache=True, **options)(function)
        loop._cache._cache_file._version += _sources()
    except (RuntimeError, AttributeError):  # no folder to write to, or another numba: compiled anew in every process
        return njit(**options)(function)
    return loop


@functools.cache
def _sources() -> str:
    """Return a digest of this folder's modules, which machine code is remembered for.

    numba looks at the file of a function alone, though loops are made of what other files define; and it ends at an
    index that names a class which is no longer there, unless that is of another version.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f" {digest.hexdigest()}"


def inlined(function: Function) -> Function:
    """Compile into the loops that call it, with their settings."""
    return cast(Function, njit(inline="always")(function))


# ---------------------------------------------------------------- bits of floats


@llvm_code
def _float_of_bits(typingctx: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), build


@llvm_code
def bits_of_float(typingctx: Any, value: Any) -> Any:
    """Return the bits of a float32 as int64, sign-extended."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(builder.bitcast(args[0], ir.IntType(32)), ir.IntType(64))

    return types.int64(types.float32), build


@inlined
def float_of_bits(bits: Int) -> Float:
    """Return the inverse of `bits_of_float`."""
    return _float_of_bits(bits)


@inlined
def widen(bits: Int) -> Float:
    """Return the float32 of a bf16 given as int16."""
    return _float_of_bits(np.int64(bits) << 16)


@inlined
def narrow(value: Float) -> Any:
    """Return the bf16 bits (int16) of a float32, rounded to nearest, ties to even."""
    bits = bits_of_float(value)
    # Half of the last place is added, less one where the last bit is even: a tie then goes to the even neighbour.
    return np.int16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@inlined
def order_of_float(value: Float) -> Int:
    """Return an int64 that sorts like this float32."""
    bits = bits_of_float(value)
    return bits ^ ((bits >> 63) & 0x7FFFFFFF)  # negative numbers sort the other way round


@inlined
def float_of_order(order: Int) -> Float:
    """Return the inverse of `order_of_float`."""
    return _float_of_bits(order ^ ((order >> 63) & 0x7FFFFFFF))


@llvm_code
def ordered(typingctx: Any, bits: Any) -> Any:
    """Return an int16 key that sorts like the bf16 with these bits; its own inverse."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sign = builder.ashr(args[0], ir.Constant(ir.IntType(16), 15))
        return builder.xor(args[0], builder.and_(sign, ir.Constant(ir.IntType(16), 0x7FFF)))

    return types.int16(types.int16), build


# ---------------------------------------------------------------- sets of bits


@llvm_code
def ones(typingctx: Any, bits: Any) -> Any:
    """Return how many bits are set."""
    return types.int64(types.int64), lambda context, builder, signature, args: builder.ctpop(args[0])


@llvm_code
def first_one(typingctx: Any, bits: Any) -> Any:
    """Return the index of the lowest bit that is set; some bit is."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), build


# ---------------------------------------------------------------- vectors


def everywhere(builder: Any, value: Any, lanes: Int) -> Any:
    """Return code that puts a value into all lanes of a vector."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


@llvm_code
def reaching(typingctx: Any, keys: Any, at: Any, bar: Any) -> Any:
    """Return which of the 32 keys from `at` are not below `bar`, as bits."""
    shorts = ir.VectorType(ir.IntType(16), 32)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.bitcast(builder.gep(array.data, [args[1]]), shorts.as_pointer())
        bits = builder.icmp_signed(">=", builder.load(place, align=2), everywhere(builder, args[2], 32))
        return builder.zext(builder.bitcast(bits, ir.IntType(32)), ir.IntType(64))

    return types.int64(keys, types.int64, types.int16), build


@llvm_code
def lane_maxima_of_64(
    typingctx: Any, P: Any, row: Any, column: Any, best: Any, lane: Any, lane_size: Any
) -> Any:  # fmt: skip
    """Write the largest keys (`ordered`) of the 64 bf16 from ``P[row, column]`` on, from ``best[lane]`` on.

    There are ``64 / lane_size`` of them, and each is that of every so many-th: `lane_size` is 1, 2, 4 or 8.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        matrix, into = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 3))
        width = builder.extract_value(matrix.shape, 1)
        place = builder.gep(matrix.data, [builder.add(builder.mul(args[1], width), args[2])])
        lanes, size = 64, 1
        short, word = ir.IntType(16), ir.IntType(32)
        bits = builder.load(builder.bitcast(place, ir.VectorType(short, lanes).as_pointer()), align=2)
        sign = builder.ashr(bits, everywhere(builder, ir.Constant(short, 15), lanes))
        keys = builder.xor(bits, builder.and_(sign, everywhere(builder, ir.Constant(short, 0x7FFF), lanes)))
        while True:
            with builder.if_then(builder.icmp_signed("==", args[5], ir.Constant(args[5].type, size))):
                out = builder.bitcast(builder.gep(into.data, [args[4]]), keys.type.as_pointer())
                builder.store(keys, out, align=2)
            if size == 8:
                return context.get_dummy_value()
            lanes, size = lanes // 2, 2 * size
            halves = (range(lanes), range(lanes, 2 * lanes))
            masks = (ir.Constant(ir.VectorType(word, lanes), list(half)) for half in halves)
            low, high = (builder.shuffle_vector(keys, keys, mask) for mask in masks)
            keys = builder.select(builder.icmp_signed(">", low, high), low, high)

    return types.void(P, types.int64, types.int64, best, types.int64, types.int64), build


@llvm_code
def before_of_16(typingctx: Any, scores: Any, latents: Any, at: Any, score: Any, latent: Any) -> Any:
    """Return how many of the 16 entries from `at` come before this one: a larger score, or an equal one of a smaller
    latent.
    """
    floats, ints = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def part(which: Int, kind: Any) -> Any:
            array = context.make_array(signature.args[which])(context, builder, args[which])
            place = builder.gep(array.data, [args[2]])
            return builder.load(builder.bitcast(place, kind.as_pointer()), align=4)

        score_of, latent_of = part(0, floats), part(1, ints)
        score_, latent_ = everywhere(builder, args[3], 16), everywhere(builder, args[4], 16)
        larger = builder.fcmp_ordered(">", score_of, score_)
        equal = builder.fcmp_ordered("==", score_of, score_)
        smaller = builder.icmp_signed("<", latent_of, latent_)
        first = builder.bitcast(builder.or_(larger, builder.and_(equal, smaller)), ir.IntType(16))
        return builder.zext(builder.ctpop(first), ir.IntType(64))

    return types.int64(scores, latents, types.int64, types.float32, types.int32), build


@llvm_code
def prefetch(typingctx: Any, W: Any, row: Any, column: Any) -> Any:
    """Ask for the cache line that ``W[row, column]`` is in; `W` is contiguous."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        width = builder.extract_value(array.shape, 1)
        place = builder.gep(array.data, [builder.add(builder.mul(args[1], width), args[2])])
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        # To be read (0), into all caches (3), as data (1).
        builder.call(function, [builder.bitcast(place, byte), *(ir.Constant(number, v) for v in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(W, types.int64, types.int64), build


@llvm_code
def stream(typingctx: Any, row: Any, count: Any, out: Any, at: Any) -> Any:
    """``out.flat[at : at + count] = row[:count]``, past the caches; both places and `count` are whole cache lines.

    What is written so is to be seen by other threads only after `drain`.
    """
    line = ir.VectorType(ir.FloatType(), 16)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
        with cgutils.for_range_slice(builder, args[1].type(0), args[1], args[1].type(16), inc=True) as (i, _):
            value = builder.load(builder.bitcast(builder.gep(source, [i]), line.as_pointer()), align=4)
            place = builder.gep(target, [builder.add(args[3], i)])
            stored = builder.store(value, builder.bitcast(place, line.as_pointer()), align=64)
            stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(row, types.int64, out, types.int64), build


@llvm_code
def drain(typingctx: Any) -> Any:
    """Wait until everything that was streamed can be seen."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build
