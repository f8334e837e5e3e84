"""Fast kernels for a CPU with AVX-512 bf16: torch's bf16 product, and compiled loops for everything sparse.

A top-k selection needs the whole product ``x @ W.T``, and that product is the cost of it. Here it is made in bf16 (2.2
times faster than fp32), a block of rows at a time into one buffer, and only used to rule latents out: what is left is
multiplied again in fp32.

The bound. Let x~, w~ be the bf16 copies and P the bf16 product of a row and a latent. Then::

    |x.w - x~.w~|   <=  |x - x~| |w~| + |x| |w - w~|           (Cauchy-Schwarz; the residuals are measured)
    |x~.w~ - sum|   <=  d 2^-24 |x~| |w~|  (fp32 sum of d exact products in any order; 2^-23 is used)
    |sum - P|       <=  2^-8 |sum|                              (rounding of the result)

A latent whose value could not reach the k-th largest within these bounds is not computed. So the codes are those of an
fp32 product, up to the rounding of fp32 itself. Rows that are not finite are left to the
plain kernel.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import loops, reference
from .reference import Adam, StepOutcome, TopKSettings

BLOCK_BYTES = 8 * 2**20
"""Size of the buffer for one block of the product: it should stay in the last cache. Unit: bytes."""

CHUNK = 64
"""Rows or latents that are summed together first. Fixed, so that sums do not depend on the number of threads."""

PANEL_BYTES = 6 * 2**20
"""Columns of the rows and of their gradients that are read over and over, latent by latent. Unit: bytes."""

PIECE = 4_000_000
"""Least work that is worth handing to another thread: about 0.2 ms of one core. Unit: multiply-adds."""

LARGEST = 1e18
"""Rows and weights with a norm above this could overflow the product: the plain kernel takes them."""


# ---------------------------------------------------------------- threads and buffers

_pool: ThreadPoolExecutor | None = None
_scratch = threading.local()


def _forget_pool() -> None:
    global _pool
    _pool = None  # threads do not survive a fork


os.register_at_fork(after_in_child=_forget_pool)


def thread_count() -> int:
    """Threads to work on: torch's own number, so that one setting rules both."""
    return torch.get_num_threads()


def _spread(loop: Callable[..., None], n: int, cost: float, *arguments: Any) -> None:
    """``loop(start, stop, *arguments)`` over all of ``0 .. n``, on threads; `cost` is that of one, in multiply-adds."""
    global _pool
    grain = max(1, round(PIECE / max(cost, 1)))
    threads = thread_count()
    if threads == 1 or n <= grain:
        if n:
            loop(0, n, *arguments)
        return
    pieces = min(-(-n // grain), 8 * threads)
    bounds = [n * piece // pieces for piece in range(pieces + 1)]
    ticket = itertools.count()  # taking the next number is atomic

    def work() -> None:
        while (piece := next(ticket)) < pieces:
            loop(bounds[piece], bounds[piece + 1], *arguments)

    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(os.cpu_count() or 1, 1), thread_name_prefix="saekit-kernels")
    others = [_pool.submit(work) for _ in range(min(threads, pieces) - 1)]
    work()
    for other in others:
        other.result()


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that is used again by the next call on this thread (its content is undefined): new pages are slow."""
    buffers = _scratch.__dict__.setdefault("buffers", {})
    size = 1
    for length in shape:
        size *= length
    held = buffers.get((name, dtype))
    if held is None or len(held) < size:
        held = buffers[name, dtype] = torch.empty(max(size, 1), dtype=dtype)
    return held[:size].view(shape)


def release() -> None:
    """Give back the memory that calls on this thread have kept for the next one."""
    _scratch.__dict__.clear()


# ---------------------------------------------------------------- encode


@dataclass(frozen=True)
class _Rounded:
    """bf16 copy of some rows, and what is known about it."""

    bf16: Tensor
    norm: np.ndarray
    residual: np.ndarray
    dot: np.ndarray


def _round(x: Tensor, name: str, offset: Tensor | None = None) -> _Rounded:
    n, d = x.shape
    bf16 = buffer(f"{name} bf16", (n, d), torch.bfloat16)
    norm, residual, dot = (buffer(f"{name} {part}", (n,)).numpy() for part in ("norm", "residual", "dot"))
    along = np.zeros(d, np.float32) if offset is None else offset.numpy()
    _spread(loops.round_rows, n, 4 * d, x.numpy(), along, bf16.view(torch.int16).numpy(), norm, residual, dot)
    return _Rounded(bf16, norm, residual, dot)


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, block_rows: int | None = None, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """`saekit.kernels.reference.topk_encode` by a bf16 product and fp32 rescoring (see the module).

    Parameters
    ----------
    x, W_enc, b_enc, k, block_rows
        As there; float32 on the CPU. `block_rows` also bounds the rows of one product.
    exact
        True: the codes of the fp32 product. False: latents are chosen by the bf16 product alone (about 1% of the
        choices differ); their values are fp32 all the same.

    Returns
    -------
    values, indices : Tensor ``[n, k]``
        As there; of equal values the latent with the smaller index comes first.
    """
    x, W_enc, b_enc = (t.detach().contiguous() for t in (x, W_enc, b_enc))
    return _encode(x, W_enc, b_enc, _round(W_enc, "W"), k, block_rows, exact)


def _encode(
    x: Tensor, W_enc: Tensor, bias: Tensor, W: _Rounded, k: int, block_rows: int | None, exact: bool
) -> tuple[Tensor, Tensor]:
    n, d = x.shape
    n_latents = len(W_enc)
    values, indices = torch.empty((n, k)), torch.empty((n, k), dtype=torch.int64)
    most_reach = float(W.norm.max())
    most_bias = float(bias.abs().max())
    if not n:
        return values, indices
    if not most_reach <= LARGEST or not most_bias <= LARGEST:  # also when one of them is NaN
        return reference.topk_encode(x, W_enc, bias, k, block_rows=block_rows)
    rows = _round(x, "x")
    reach = row_reach(rows, W, d)
    block = max(1, min(block_rows or n, n, max(16, BLOCK_BYTES // (2 * n_latents))))
    product = buffer("product", (block, n_latents), torch.bfloat16)
    lanes = lanes_for(n_latents, k)
    with torch.no_grad():
        for start in range(0, n, block):
            part = product[: min(block, n - start)]
            torch.mm(rows.bf16[start : start + len(part)], W.bf16.T, out=part)
            _spread(
                loops.choose, len(part), 4 * n_latents + 8 * k * d,
                start, part.view(torch.int16).numpy(), x.numpy(), reach, W_enc.numpy(),
                bias.numpy(), W.norm, np.float32(most_reach), np.float32(most_bias), k, lanes, exact,
                values.numpy(), indices.numpy(),
            )  # fmt: skip
        again = torch.from_numpy(np.flatnonzero(~(rows.norm <= LARGEST)))
        if len(again):
            values[again], indices[again] = reference.topk_encode(x[again], W_enc, bias, k, block_rows=block_rows)
    return values, indices


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | None,
    *,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`saekit.kernels.reference.threshold_encode` by a bf16 product and fp32 rescoring (see the module).

    Rows in which more than a sixteenth of the latents may fire are left to the plain kernel: there a dense product is
    cheaper than rescoring.
    """
    x, W_enc, bias = (t.detach().contiguous() for t in (x, W_enc, b_enc))
    n, d = x.shape
    n_latents = len(W_enc)
    level = torch.zeros(n_latents) if threshold is None else threshold.detach().clamp(min=0).contiguous()
    W = _round(W_enc, "W")
    finite = bool(W.norm.max() <= LARGEST) and bool((bias.abs() <= LARGEST).all()) and bool((level <= LARGEST).all())
    if not n or not finite:
        return reference.threshold_encode(x, W_enc, bias, threshold, block_rows=block_rows)
    rows = _round(x, "x")
    reach = row_reach(rows, W, d)
    block = max(1, min(block_rows or n, n, max(16, BLOCK_BYTES // (2 * n_latents))))
    room = max(n_latents // 16, min(n_latents, 64))
    product = buffer("product", (block, n_latents), torch.bfloat16)
    values, indices = buffer("values", (block, room)), buffer("indices", (block, room), torch.int64)
    counts = torch.empty(n, dtype=torch.int64)
    parts: list[tuple[Tensor, Tensor]] = []
    place = torch.arange(room)
    with torch.no_grad():
        for start in range(0, n, block):
            at = slice(start, min(start + block, n))
            size = at.stop - start
            torch.mm(rows.bf16[at], W.bf16.T, out=product[:size])
            _spread(
                loops.choose_above, size, 8 * n_latents + 2 * room * d,
                start, product.view(torch.int16).numpy(), x.numpy(), reach, W_enc.numpy(),
                bias.numpy(), W.norm, level.numpy(), lanes_for(n_latents, 1),
                values.numpy(), indices.numpy(), counts[at].numpy(),
            )  # fmt: skip
            counts[at][torch.from_numpy(~(rows.norm[at] <= LARGEST))] = -1
            again = (counts[at] < 0).nonzero()[:, 0]
            if len(again):  # splice rows from the plain kernel between the others
                offsets, more_indices, more_values = reference.threshold_encode(x[at][again], W_enc, bias, threshold)
                counts[at][again] = offsets.diff()
                row_values, row_indices = [], []
                plain = {row: c for c, row in enumerate(again.tolist())}
                for row, count in enumerate(counts[at].tolist()):
                    if row in plain:
                        span = slice(int(offsets[plain[row]]), int(offsets[plain[row] + 1]))
                        row_values.append(more_values[span])
                        row_indices.append(more_indices[span])
                    else:
                        row_values.append(values[row, :count])
                        row_indices.append(indices[row, :count])
                parts.append((torch.cat(row_indices), torch.cat(row_values)))
            else:
                kept = place < counts[at, None]
                parts.append((indices[:size][kept], values[:size][kept]))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return offsets, torch.cat([i for i, _ in parts]), torch.cat([v for _, v in parts])


def row_reach(rows: _Rounded, latents: _Rounded, d: int) -> np.ndarray:
    """The rows' factor of the bound, ``[n]``.

    Product and exact value differ by at most ``row_reach * norm of the latent``, besides the rounding of the product
    itself, which is relative to the product.
    """
    loss = float((latents.residual / latents.norm).max()) + 2 * (d + 8) * 2.0**-23
    return (rows.residual + rows.norm * np.float32(loss)) * np.float32(1 + 1e-6)


def lanes_for(n_latents: int, k: int) -> int:
    """Lanes whose maxima locate the k largest: a multiple of 16, so many that few lanes hold two of them."""
    wanted = max(8 * k, n_latents // 16)
    lanes = 16
    while lanes < wanted:
        lanes *= 2
    return min(lanes, n_latents)


# ---------------------------------------------------------------- the training step


def topk_step(
    weights: dict[str, Tensor],
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    x: Tensor,
    offset: Tensor,
    settings: TopKSettings,
    adam: Adam,
    dead: Tensor | None = None,
) -> StepOutcome:
    """`saekit.kernels.reference.topk_step` with sparse products only; see there for all arguments.

    Two passes over the latents: the first sums each latent's gradient from the rows that it fired in, because clipping
    needs the length of the whole gradient; the second projects, clips, applies Adam and restores unit length.
    """
    x = x.detach().contiguous()
    n, d = x.shape
    k, n_latents = settings.k, len(weights["W_enc"])
    W_enc, W_dec, b_enc, b_dec = (weights[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    offset = offset.detach().contiguous()
    rounded = _round(W_enc, "W", offset)
    bias = b_enc - torch.from_numpy(rounded.dot)
    values, indices = _encode(x, W_enc, bias, rounded, k, None, settings.exact)

    parts = -(-n // CHUNK)
    gradient, products, columns = (
        buffer("gradient", (n, d)),
        buffer("products", (n, k)),
        buffer("columns", (parts, d)),
    )
    squares = buffer("squares", (n,)).numpy()
    scale = np.float32(2 / n)
    _spread(
        loops.reconstruct, parts, 4 * CHUNK * k * d,
        CHUNK, x.numpy(), values.numpy(), indices.numpy(), W_dec.numpy(), offset.numpy(),
        scale, gradient.numpy(), products.numpy(), squares, columns.numpy(),
    )  # fmt: skip
    error = float(squares.sum(dtype=np.float64))

    aux, slot, more = None, np.full(n_latents, -1, np.int32), _nothing(d)
    which = dead.nonzero()[:, 0] if dead is not None and settings.k_aux and settings.aux_coefficient else None
    if which is not None and len(which):
        slot[which.numpy()] = np.arange(len(which), dtype=np.int32)
        aux, *more = reference.aux_gradients(x, gradient * (-n / 2), W_enc[which], bias[which], W_dec[which], settings)

    offsets = np.zeros(n_latents + 1, np.int64)
    loops.count_by_latent(values.numpy(), indices.numpy(), offsets)
    n_fired = int(offsets[-1])
    rows = buffer("rows", (n * k,), torch.int32).numpy()
    code, slope = buffer("code", (n * k,)).numpy(), buffer("slope", (n * k,)).numpy()
    loops.sort_by_latent(values.numpy(), indices.numpy(), products.numpy(), offsets[:-1].copy(), rows, code, slope)
    pairs = (offsets, rows, code, slope, gradient.numpy(), x.numpy(), offset.numpy())
    extra = (slot, *(t.numpy() for t in more))

    chunks = -(-n_latents // CHUNK)
    of_dec, of_enc = buffer("of dec", (n_latents, d)).numpy(), buffer("of enc", (n_latents, d)).numpy()
    of_bias, of_offset = np.empty(n_latents, np.float32), buffer("of offset", (chunks, d)).numpy()
    along, squares = np.zeros(n_latents, np.float32), np.zeros(n_latents)
    panels = max(1, round(8 * n * d / PANEL_BYTES))
    edges = [16 * (d * panel // (16 * panels)) for panel in range(panels)] + [d]
    for left, right in itertools.pairwise(edges):
        _spread(
            loops.gradient_of_latents, chunks, 8 * n * k * d / chunks / panels,
            CHUNK, left, right, *pairs, W_enc.numpy(), W_dec.numpy(), *extra,
            of_dec, of_enc, of_bias, of_offset, along, squares,
        )  # fmt: skip
    g_b_dec = columns.numpy().sum(0) - of_offset.sum(0)
    # Decoder rows have length 1: what projection removes from a gradient is the square of `along`.
    lengths = squares - np.square(along, dtype=np.float64) + np.square(of_bias, dtype=np.float64)
    # Sorted, so that the sum does not depend on the order of the latents.
    total = np.sort(lengths).sum() + np.square(g_b_dec, dtype=np.float64).sum()
    norm = float(np.sqrt(np.maximum(total, 0.0)))
    factor = np.float32(min(1.0, settings.clip / (norm + 1e-6)) if settings.clip is not None else 1.0)
    if not np.isfinite(norm):
        factor = np.float32(np.nan)  # as in plain torch: nothing survives, and the caller sees it
    numbers = tuple(np.float32(value) for value in (factor, *adam.factors()))
    moments = [group[name].numpy() for group in (first, second) for name in ("W_enc", "W_dec", "b_enc")]
    _spread(
        loops.update_latents, n_latents, 32 * d, of_dec, of_enc, of_bias, along,
        W_enc.numpy(), W_dec.numpy(), b_enc.numpy(), *moments, *numbers,
    )  # fmt: skip
    loops.adam_row(g_b_dec, b_dec.numpy(), first["b_dec"].numpy(), second["b_dec"].numpy(), *numbers)
    fired = torch.from_numpy(np.diff(offsets))
    return StepOutcome(error=error, aux=aux, fired=fired, n_fired=n_fired, grad_norm=norm)


def _nothing(d: int) -> list[Tensor]:
    return [torch.empty((0, d)), torch.empty((0, d)), torch.empty(0)]
