"""Copies of rows and latents in few bits, and how far a product of two such copies may be off.

Where the processor multiplies neither whole numbers nor bf16 (NEON), rows and latents are their own copies, in
fp32.

For a row x and a latent w with copies x~ and w~, by Cauchy-Schwarz::

    |x.w - x~.w~| <= |x - x~| |w~| + |x| |w - w~|

The lengths of both differences are measured while the copies are made (`rounding_numba`). What the product adds to
that, its sum in fp32 and its own rounding, is bounded by `row_reach` and `selection_numba.ROUNDING`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import backend
from . import low_bit_matmul, rounding_numba, rows_numba
from .buffers import buffer, buffer_within, remembered
from .low_bit_matmul import PANEL, WholeLatents, WholeRows
from .rounding_numba import Facts, WholeCopy
from .threads import spread

UNIT = 2.0**-23
"""Twice the largest relative error of one fp32 operation."""

SPREAD_ROWS = 48
"""Rows and latents, evenly spaced, that the size of pre-activations is estimated from: 2,304 of them."""

BALANCED_ROWS = 256
"""Rows and latents, evenly spaced, that factors of columns are found from. Any factors are right; good ones tighten the
bound."""

FARTHER = 3.0
"""How fast candidates become more with the bound, in standard deviations of pre-activations: k latents are ``k
exp(FARTHER * bound)`` then, if pre-activations are normal and 0.1% to 1% of the latents are kept."""

CHEAPER = {"bf16": {True: 28, False: 75}, "fp32": {True: 25, False: 40}}
"""On how many latents whole numbers save the time that one more candidate costs, by the format that takes over:
when the encoder stays in the last cache, and when it comes from memory. From times on a Zen 5 (bf16), where it makes
little difference near the limit, and on a Zen 4 with no instructions beyond AVX2 (fp32)."""

CACHED = 16 * 2**20
"""Size up to which an encoder stays in the last cache. Unit: bytes."""

NOT_AGAIN = 30
"""So many encoders of a shape go into bf16 at once after whole numbers were too coarse for one: trying takes time."""


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """A copy of some rows, and what is known about it."""

    copy: Tensor
    """bf16 ``[n, width]``; the last two of a row are 1, and multiply the bias (see `with_bias`). `width` is even:
    before them there may be a 0. Or whole numbers: uint8 ``[n, width]``, 128 more than the number. Or the rows
    themselves, fp32 ``[n, d]``."""
    facts: Facts
    whole: WholeRows | None = None

    @property
    def words(self) -> np.ndarray:
        """What is multiplied at once, two bf16 or four whole numbers, as int32."""
        return self.copy.view(torch.int32).numpy()


@dataclass(frozen=True, eq=False)
class RoundedLatents:
    """A copy of some latents, and what is known about it."""

    copy: Tensor
    """bf16 ``[n, width]``, where the last two of a row are the parts of a bias; or in the order of `low_bit_matmul`:
    bf16 ``[panels, width / 2, PANEL, 2]``, or whole numbers as int32 (see `WholeLatents`); or the latents themselves,
    fp32 ``[n, d]``."""
    facts: Facts
    whole: WholeLatents | None = None
    factor: np.ndarray | None = None
    """What columns were divided by before they became whole numbers, those of rows multiplied by; None in bf16."""
    bias: np.ndarray | None = None
    """Added to a product in fp32, ``[n]``."""

    @property
    def is_packed(self) -> bool:
        """Whether this is in the order of `low_bit_matmul`."""
        return self.copy.ndim > 2

    @property
    def format(self) -> str:
        """Format of the product: ``packed`` (in the order of `low_bit_matmul`), ``bf16`` or ``fp32`` (of torch)."""
        return "packed" if self.is_packed else "bf16" if self.bias is None else "fp32"

    @property
    def panels(self) -> np.ndarray:
        """Pairs of bf16 as int32, ``[panels, width / 2, PANEL]``."""
        return self.copy.view(torch.int32)[..., 0].numpy()


# ---------------------------------------------------------------- rounding


def _facts(n: int, name: str) -> Facts:
    return Facts(*(buffer(f"{name} {part}", (n,)).numpy() for part in Facts._fields))


def _offset(offset: Tensor | None, d: int) -> np.ndarray:
    return np.zeros(d, np.float32) if offset is None else offset.numpy()


def _bf16_copy(x: Tensor, name: str, offset: Tensor | None) -> tuple[Tensor, Facts]:
    n, d = x.shape
    facts = _facts(n, name)
    # Behind the last row there is room for a tile, which `multiply` reads and throws away.
    copy = buffer(f"{name} bf16", (n + low_bit_matmul.ROWS, d + d % 2 + 2), torch.bfloat16)[:n]
    copy[:, d:-2], copy[:, -2:] = 0, 1
    bits = copy.view(torch.int16).numpy()
    spread(rounding_numba.round_rows, n, 4 * d, x.numpy(), _offset(offset, d), bits, facts)
    return copy, facts


def round_rows(x: Tensor, name: str) -> RoundedRows:
    """Return rows in bf16; the memory belongs to `name`."""
    return RoundedRows(*_bf16_copy(x, name, None))


def rows_as_they_are(x: Tensor, name: str) -> RoundedRows:
    """Return rows for a product in fp32."""
    return RoundedRows(x, _measured(x, name, None))


def latents_as_they_are(W: Tensor, name: str, offset: Tensor | None = None) -> RoundedLatents:
    """Return latents for a product in fp32; see `round_latents` for the arguments."""
    return RoundedLatents(W, _measured(W, name, offset), bias=buffer(f"{name} bias", (len(W),)).numpy())


def _measured(x: Tensor, name: str, offset: Tensor | None) -> Facts:
    n, d = x.shape
    facts = _facts(n, name)
    spread(rounding_numba.measure_rows, n, 2 * d, x.numpy(), _offset(offset, d), facts)
    return facts


def round_rows8(x: Tensor, name: str, factor: np.ndarray) -> RoundedRows:
    """Return rows as whole numbers, their columns multiplied by `factor` before."""
    n, d = x.shape
    facts = _facts(n, name)
    scale = buffer(f"{name} scale", (n + low_bit_matmul.ROWS,)).numpy()
    copy = buffer(f"{name} bytes", (n + low_bit_matmul.ROWS, d + -d % 4), torch.uint8)[:n]
    into = WholeCopy(copy.numpy(), scale, np.empty(n, np.int32))
    spread(rounding_numba.round_rows8, n, 8 * d, x.numpy(), factor, _offset(None, d), 128, False, into, facts)
    return RoundedRows(copy, facts, WholeRows(copy.view(torch.int32).numpy(), scale))


def round_latents(
    W: Tensor, name: str, offset: Tensor | None = None, *, packed: bool = False, own_memory: bool = False
) -> RoundedLatents:
    """Return latents in bf16.

    Parameters
    ----------
    W
        Latents ``[n, d]``.
    name
        Owner of the memory.
    offset
        Vector ``[d]`` whose products with the latents are wanted too.
    packed
        Whether to put them into the order of `low_bit_matmul`.
    own_memory
        Whether what is packed gets memory of its own. Else it lies in that of the encoder's gradient, which is not
        there yet when an encoder is rounded.
    """
    if not packed:
        return RoundedLatents(*_bf16_copy(W, name, offset))
    n, d = W.shape
    facts = _facts(n, name)
    shape = -(-n // PANEL), (d + d % 2 + 2) // 2, PANEL, 2
    copy = buffer(f"{name} panels", shape, torch.bfloat16) if own_memory else buffer_within("of enc", shape)
    latents = RoundedLatents(copy, facts)
    cost = 8 * PANEL * d
    spread(rounding_numba.round_panels, shape[0], cost, W.numpy(), _offset(offset, d), latents.panels, facts)
    return latents


def round_latents8(W: Tensor, name: str, factor: np.ndarray, offset: Tensor | None = None) -> RoundedLatents:
    """Return latents as whole numbers, their columns divided by `factor` before; see `round_latents` for `offset`."""
    n, d = W.shape
    product = low_bit_matmul.byte_products()[0]
    facts = _facts(n, name)
    panels = -(-n // PANEL)
    shape = panels, PANEL // product.tile, -(-d // 4), product.tile
    whole = WholeLatents(
        buffer_within("of enc", (2 * math.prod(shape),)).view(torch.int32).view(shape).numpy(),
        buffer(f"{name} starts", (panels * PANEL,), torch.int32).numpy(),
        buffer(f"{name} scale", (panels * PANEL,)).numpy(),
        buffer(f"{name} bias", (panels * PANEL,)).numpy(),
    )
    cost = 16 * PANEL * d
    given = W.numpy(), 1 / factor, _offset(offset, d), product.in_pairs
    spread(rounding_numba.round_panels8, panels, cost, *given, whole, facts)
    words = whole.words[:, 0] if product is low_bit_matmul.WIDE else whole.words
    whole = whole._replace(words=words.view(np.uint32) if product.in_pairs else words)
    return RoundedLatents(torch.from_numpy(words), facts, whole, factor)


def balance(x: Tensor, W: Tensor) -> np.ndarray:
    """Return factors of columns with which ``x * factor`` and ``W / factor`` have columns of the same size.

    One scale has to do for all columns of a row: large columns of `x` take from it what small ones need, while a
    product does not change when a factor moves from one side to the other (as in SmoothQuant, arXiv:2211.10438).
    """
    sizes = []
    for t in (x, W):
        sample = t[:: max(1, len(t) // BALANCED_ROWS)][:BALANCED_ROWS].numpy()
        sizes.append(np.einsum("ij,ij->j", sample, sample) / max(len(sample), 1))
    with np.errstate(all="ignore"):
        factor = np.sqrt(np.sqrt(sizes[1] / sizes[0]))
    # An empty or infinite column gives 0, infinity or NaN: any finite factor is right.
    return np.clip(np.nan_to_num(factor, nan=1.0), 2.0**-16, 2.0**16).astype(np.float32)


# ---------------------------------------------------------------- which format


@functools.cache
def multiplies_bf16() -> bool:
    """Return whether products in bf16 pay on this processor."""
    return backend.bf16_unavailable() is None


def product_here() -> tuple[str, str]:
    """Return the product that finds candidates on this processor, in words, and the reason for it."""
    whole = low_bit_matmul.byte_products() if low_bit_matmul.pays() else ()
    if whole and not multiplies_bf16():
        return "whole numbers, compiled, or fp32 by torch where these leave too many", whole[0].why
    if not multiplies_bf16():
        return "fp32 in blocks, by torch", f"compiled loops after the product; {backend.bf16_unavailable()}"
    if not low_bit_matmul.pays():
        return "bf16, by torch", "compiled loops after the product; torch multiplies bf16 by AMX"
    if whole:
        return "whole numbers, or bf16 where these leave too many, compiled", f"{whole[0].why}, and AVX-512 bf16"
    return "bf16, compiled", "the processor has AVX-512 bf16, and no VNNI"


def _coarse() -> dict[tuple[int, ...], int]:
    """By shape, how many encoders this thread is not to try whole numbers for."""
    return remembered().setdefault("coarse", {})


def round_fastest(W: Tensor, name: str, x: Tensor, offset: Tensor | None = None) -> RoundedLatents:
    """Return latents in the format that is the fastest to multiply with rows like `x`.

    Whole numbers, or bf16 in the order of either product; fp32 where the processor multiplies neither.
    """
    n, d = W.shape
    left = _coarse().get((n, d), 0)
    if left:
        _coarse()[n, d] = left - 1
    if left or d > rounding_numba.MOST_WHOLE or not low_bit_matmul.whole_numbers_pay():
        return round_for_some(W, name, offset)
    return round_latents8(W, name, balance(x, W), offset)


def round_for_some(W: Tensor, name: str, offset: Tensor | None = None, *, own_memory: bool = False) -> RoundedLatents:
    """Return latents in a format that depends on the processor alone: bf16, or fp32 where it multiplies none.

    See `round_latents` for the arguments.
    """
    if not multiplies_bf16():
        return latents_as_they_are(W, name, offset)
    return round_latents(W, name, offset, packed=low_bit_matmul.pays(), own_memory=own_memory)


def round_alike(
    x: Tensor, W_enc: Tensor, W: RoundedLatents, kept: float, exact: bool = True
) -> tuple[RoundedRows, RoundedLatents]:
    """Return rows in the format of the latents; both in bf16 where whole numbers leave too many candidates.

    Parameters
    ----------
    x, W_enc
        Rows and encoder.
    W
        Copy of the encoder.
    kept
        About how many latents of a row are looked for, over all prefixes.
    exact
        Whether candidates are multiplied again. Without that only bf16 is fine enough.
    """
    if W.whole is None or W.factor is None:
        return _rows_for(x, W), W
    if exact:
        rows = round_rows8(x, "x", W.factor)
        if _leave_few(x, W_enc, rows.facts, W.facts, kept):
            return rows, W
        _coarse()[tuple(W_enc.shape)] = NOT_AGAIN
    # Not in the memory of the copy in whole numbers: that is still the encoder's own.
    wide = round_for_some(W_enc, "wide", own_memory=True)
    return _rows_for(x, wide), wide


def _rows_for(x: Tensor, W: RoundedLatents) -> RoundedRows:
    return rows_as_they_are(x, "x") if W.format == "fp32" else round_rows(x, "x")


def _leave_few(x: Tensor, W_enc: Tensor, rows: Facts, latents: Facts, kept: float) -> bool:
    """Return whether the candidates that whole numbers leave cost less than these save."""
    bound = rows.residual.mean() * latents.norm.mean() + rows.norm.mean() * latents.residual.mean()
    few = (np.ascontiguousarray(t.numpy()[:: max(1, len(t) // SPREAD_ROWS)][:SPREAD_ROWS]) for t in (x, W_enc))
    deviation = max(float(rows_numba.product_deviation(*few)), 1e-30)
    more = kept * math.expm1(min(FARTHER * float(bound) / deviation, 50.0))
    cheaper = CHEAPER["bf16" if multiplies_bf16() else "fp32"]
    return more * cheaper[4 * W_enc.numel() <= CACHED] <= len(W_enc)


# ---------------------------------------------------------------- the bound


def with_bias(latents: RoundedLatents, bias: Tensor, size: Tensor | None = None) -> np.ndarray:
    """Put a bias into the copy of latents; return how much of it the product may lose, ``[n_latents]``.

    In bf16 the bias is two more columns, its rounded value and the rest, which rows multiply by 1: 16 bits of it
    survive, and the product needs no second pass.

    Parameters
    ----------
    latents
        Changed in place.
    bias
        ``[n_latents]``.
    size
        Bound of the numbers that the bias is a sum of; None: it is no sum.
    """
    n = len(bias)
    lost = torch.full((n,), 2.0**-120)  # what may be flushed to 0 for being below 2^-126, and some more
    if latents.bias is not None:
        width = latents.copy.shape[1]
        latents.bias[:] = bias.numpy()
    elif latents.whole is not None:
        width = 4 * latents.copy.shape[-2]
        latents.whole.bias[:n], latents.whole.bias[n:] = bias.numpy(), 0
    else:
        width = latents.copy.shape[1] * (2 if latents.is_packed else 1)
        parts = torch.zeros((-(-n // PANEL) * PANEL, 2), dtype=torch.bfloat16)
        parts[:n, 0] = bias
        rest = bias - parts[:n, 0].float()
        parts[:n, 1] = rest
        if latents.is_packed:
            latents.copy[:, -1] = parts.view(-1, PANEL, 2)
        else:
            latents.copy[:, -2:] = parts[:n]
        lost += (rest - parts[:n, 1].float()).abs_()
    # The sum in fp32, as in `row_reach`.
    lost.add_(bias.abs(), alpha=2 * (width + 10) * UNIT)
    if size is not None:  # what rounding a sum beforehand, or comparing it afterwards, may change
        lost.add_(size, alpha=2.0**-21)
    return lost.mul_(1 + 1e-6).numpy()


def row_reach(rows: Facts, d: int) -> np.ndarray:
    """Return the rows' factor of the bound, ``[n]``.

    Product and exact value differ by at most ``row_reach * norm of the latent + norm of the row * residual of the
    latent``, besides the rounding of the product itself, which is relative to the product. A sum of d products in fp32
    is off by at most d 2^-24 of the product of the lengths in any order (Higham 2002, section 3.1), and both the coarse
    product and the exact one that it stands for are such sums; `UNIT` is twice that once more. 1e-6 covers this line.
    """
    return (rows.residual + rows.norm * np.float32(2 * (d + 8) * UNIT)) * np.float32(1 + 1e-6)
