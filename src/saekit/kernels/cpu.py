"""Fast kernels for a CPU with AVX-512 bf16: a product in few bits, and compiled loops for everything sparse.

A top-k selection needs the whole product ``x @ W.T``, and that product is the cost of it. Here it is made of whole
numbers of a byte or of bf16, a block of rows at a time into one buffer, and only used to rule latents out: what is left
is multiplied again in fp32.

The bound. Let x~, w~ be the bf16 copies and P the bf16 product of a row and a latent. Then::

    |x.w - x~.w~|   <=  |x - x~| |w~| + |x| |w - w~|           (Cauchy-Schwarz; the residuals are measured)
    |x~.w~ - sum|   <=  d 2^-24 |x~| |w~|  (fp32 sum of d exact products in any order; 2^-23 is used)
    |sum - P|       <=  2^-8 |sum|                              (rounding of the result)

The bias takes part in the product: rows have two more entries of 1, latents the two leading bf16 parts of their bias
(16 of its 24 bits; what is lost is measured). So P is the pre-activation itself, and 16-bit integers in its order are
all that the search has to read.

Whole numbers (``x~ = scale * q`` with q from -127 to 127, a scale for each row and each latent) make the same product
twice as fast. Their sums are exact, the first line holds as it stands with other residuals, and the bias is added in
fp32. The bound is 3 to 5 times as wide, so more latents are left: `_rounded_alike` weighs that against the time saved.
The codes do not depend on its choice.

A latent whose value could not reach the k-th largest within these bounds is not computed. So the codes are those of an
fp32 product, up to the rounding of fp32 itself. Rows that are not finite are left to the
plain kernel.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import loops, product, reference
from .memory import on_large_pages
from .reference import Adam

BLOCK_BYTES = 8 * 2**20
"""Size of the buffer for one block of the product: it should stay in the last cache. Unit: bytes."""

CHUNK = 64
"""Rows or latents that are summed together first. Fixed, so that sums do not depend on the number of threads."""

PANEL_BYTES = 12 * 2**20
"""Columns of the rows and of their gradients that are read over and over, latent by latent. Unit: bytes."""

PIECE = 4_000_000
"""Least work that is worth handing to another thread: about 0.2 ms of one core. Unit: multiply-adds."""

LARGEST = 1e18
"""Rows and weights with a norm above this could overflow the product: the plain kernel takes them."""


# ---------------------------------------------------------------- threads and buffers

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()
_scratch = threading.local()


def _forget_pool() -> None:
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()  # threads do not survive a fork


os.register_at_fork(after_in_child=_forget_pool)


def thread_count() -> int:
    """Threads to work on: torch's own number, so that one setting rules both."""
    return torch.get_num_threads()


def _alone() -> None:
    """On this thread, products of torch run on this thread alone."""
    torch.get_num_threads()  # torch sets a thread up on first use; after that the next line lasts
    torch.set_num_threads(1)


def _threads(wanted: int) -> ThreadPoolExecutor:
    """Our threads, at least `wanted` of them."""
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < wanted:
            if _pool is not None:
                _pool.shutdown(wait=False)
            together = threading.Barrier(wanted)
            _pool = ThreadPoolExecutor(wanted, thread_name_prefix="saekit-kernels", initializer=_alone)
            _pool_size = wanted
            for started in [_pool.submit(together.wait) for _ in range(wanted)]:
                started.result()
            torch.set_num_threads(torch.get_num_threads())  # what `_alone` said holds for our threads only
        return _pool


def _spread(loop: Callable[..., None], n: int, cost: float, *arguments: Any) -> None:
    """``loop(start, stop, *arguments)`` over all of ``0 .. n``, on threads; `cost` is that of one, in multiply-adds."""
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

    pool = _threads(threads)
    others = [pool.submit(work) for _ in range(min(threads, pieces) - 1)]
    work()
    for other in others:
        other.result()


def _by_blocks(
    work: Callable[[int, int, np.ndarray, np.ndarray, int], None], rows: _Rounded, latents: _Rounded, lanes: int,
    block_rows: int | None,
) -> None:  # fmt: skip
    """``work(start, stop, P, maxima, settled)`` over blocks of rows, each block on one thread: its product and what is
    done to it.

    `P` is the product of these rows and all latents as bits. `maxima` has room for `lanes` keys a row, and the keys of
    lanes of `saekit.kernels.product.SHARE` latents for the first `settled` latents (see `saekit.kernels.loops.choose`).
    Threads that share a product have to wait for each other, and torch's threads keep their core busy for milliseconds
    after it, in case there is more.
    """
    n, n_latents = len(rows.norm), len(latents.norm)
    edges = _edges(n, n_latents, block_rows)
    threads = min(thread_count(), len(edges) - 1)
    packed = latents.copy.ndim > 2
    room = max(stop - start for start, stop in itertools.pairwise(edges))
    width = n_latents
    if packed:  # whole tiles; rows that start in different sets of the caches
        room, width = room + -room % product.ROWS, loops.PANEL * len(latents.copy) + 32
    products = buffer("product", (threads, room, width), torch.bfloat16)
    maxima = buffer("maxima", (threads, room, lanes), torch.int16)
    ticket = itertools.count()

    words = rows.copy.view(torch.int32).numpy() if packed else np.empty(0)

    def multiply(start: int, stop: int, bits: np.ndarray, best: np.ndarray) -> None:
        if latents.scale is not None:
            product.multiply8(
                stop - start, words[start:], rows.scale[start:], latents.copy.numpy(), latents.starts, latents.scale,
                latents.bias, bits, best,
            )  # fmt: skip
        else:
            panels = latents.copy.view(torch.int32)[..., 0].numpy()
            product.multiply(stop - start, words[start:], panels, bits, best)

    def many(P: Tensor, best: np.ndarray) -> None:
        bits = P.view(torch.int16).numpy()
        with torch.no_grad():
            while (index := next(ticket)) < len(edges) - 1:
                start, stop = edges[index : index + 2]
                if packed:
                    multiply(start, stop, bits, best)
                else:
                    torch.mm(rows.copy[start:stop], latents.copy.T, out=P[: stop - start])
                work(start, stop, bits, best, n_latents // loops.PANEL * loops.PANEL if packed else 0)

    if threads == 1:
        many(products[0], maxima[0].numpy())
        return
    pool = _threads(threads)
    others = [pool.submit(many, P, best.numpy()) for P, best in zip(products[packed:], maxima[packed:])]
    if packed:  # torch's product would use more threads on this one
        many(products[0], maxima[0].numpy())
    for other in others:
        other.result()


def _edges(n: int, n_latents: int, block_rows: int | None) -> list[int]:
    """Rows at which blocks begin, and `n`: a product stays in the last cache, and threads end at about the same time.

    Small blocks cost more; so they are large first, and the last ones smaller.
    """
    threads = thread_count()
    most = max(1, min(block_rows or n, max(64, -(-n // (4 * threads))), max(16, BLOCK_BYTES // (2 * n_latents))))
    edges = [0]
    while (left := n - edges[-1]) > 0:
        size = min(most, max(64, -(-left // (2 * threads)))) if threads > 1 else most
        if block_rows is None:
            size += -size % product.ROWS
        edges.append(edges[-1] + min(size, left))
    return edges


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that is used again by the next call on this thread (its content is undefined): new pages are slow."""
    buffers = _scratch.__dict__.setdefault("buffers", {})
    size = math.prod(shape)
    held = buffers.get((name, dtype))
    if held is None or len(held) < size:
        held = buffers[name, dtype] = on_large_pages(max(size, 1), dtype)
    return held[:size].view(shape)


def _shared(name: str, shape: tuple[int, ...]) -> Tensor:
    """bf16 in the memory of a float32 buffer that is not needed before this is no longer needed."""
    size = math.prod(shape)
    return buffer(name, (-(-size // 2),)).view(torch.bfloat16)[:size].view(shape)


def release() -> None:
    """Give back the memory that calls on this thread have kept for the next one."""
    _scratch.__dict__.clear()


# ---------------------------------------------------------------- encode


@dataclass(frozen=True)
class _Rounded:
    """A copy of some rows in fewer bits, and what is known about it."""

    copy: Tensor
    """bf16 ``[n, width]``, or in the order of `saekit.kernels.product` ``[panels, width / 2, PANEL, 2]``.

    The last two entries of a row are 1, or the parts of a bias (see `_with_bias`). `width` is even: before them there
    may be a 0. With `scale` whole numbers of a byte: uint8 ``[n, width]`` of rows, 128 more than the number, or int32
    ``[panels, width / 4, PANEL]`` of latents, four in one.
    """
    norm: np.ndarray
    residual: np.ndarray
    dot: np.ndarray
    scale: Any = None
    """What whole numbers count, of each row; None: bf16, which has none of these arrays."""
    starts: Any = None
    """-128 times the sum of each latent's whole numbers."""
    bias: Any = None
    """Added to the product of whole numbers; see `_with_bias`."""
    factor: Any = None
    """What the columns of latents were divided by before they became whole numbers, those of rows multiplied by."""

    def matrix(self) -> Tensor:
        """``[n, width]``."""
        if self.copy.ndim == 2:
            return self.copy
        _, pairs, _, _ = self.copy.shape
        return self.copy.permute(0, 2, 1, 3).reshape(-1, 2 * pairs)[: len(self.norm)]


def _round(
    x: Tensor, name: str, offset: Tensor | None = None, packed: bool = False, own_memory: bool = False
) -> _Rounded:
    """bf16 copy of rows; `packed`: in the order of `saekit.kernels.product`, and without the last two entries.

    What is packed lies in the memory of the encoder's gradient, unless it gets its `own_memory`.
    """
    n, d = x.shape
    width = d + d % 2 + 2
    norm, residual, dot, along = _facts(x, name, offset)
    if packed:
        shape = -(-n // loops.PANEL), width // 2, loops.PANEL, 2
        # An encoder is rounded before its gradient is there.
        bf16 = buffer(f"{name} panels", shape, torch.bfloat16) if own_memory else _shared("of enc", shape)
        words = bf16.view(torch.int32)[..., 0].numpy()
        cost = 8 * loops.PANEL * d
        _spread(loops.round_panels, len(words), cost, x.numpy(), along, words, norm, residual, dot)
    else:
        bf16 = buffer(f"{name} bf16", (n + product.ROWS, width), torch.bfloat16)[:n]
        bf16[:, d:-2], bf16[:, -2:] = 0, 1
        _spread(loops.round_rows, n, 4 * d, x.numpy(), along, bf16.view(torch.int16).numpy(), norm, residual, dot)
    return _Rounded(bf16, norm, residual, dot)


def _facts(x: Tensor, name: str, offset: Tensor | None) -> tuple[np.ndarray, ...]:
    """Memory for norm, residual and dot of rows, and the offset as an array."""
    n, d = x.shape
    facts = (buffer(f"{name} {part}", (n,)).numpy() for part in ("norm", "residual", "dot"))
    return *facts, np.zeros(d, np.float32) if offset is None else offset.numpy()


def _round8(x: Tensor, name: str, factor: np.ndarray) -> _Rounded:
    """Rows as whole numbers, their columns multiplied by `factor` before."""
    n, d = x.shape
    norm, residual, dot, along = _facts(x, name, None)
    scale = buffer(f"{name} scale", (n + product.ROWS,)).numpy()
    copy = buffer(f"{name} bytes", (n + product.ROWS, d + -d % 4), torch.uint8)[:n]
    into = copy.numpy(), scale, np.empty(n, np.int32), norm, residual, dot
    _spread(loops.round_rows8, n, 8 * d, x.numpy(), factor, along, 128, *into)
    return _Rounded(copy, norm, residual, dot, scale)


def _round_latents(W: Tensor, name: str, x: Tensor, offset: Tensor | None = None) -> _Rounded:
    """Latents in the format that is the fastest to multiply with rows like `x`.

    Whole numbers, or bf16 in the order of either product.
    """
    n, d = W.shape
    left = _coarse().get((n, d), 0)
    if left:
        _coarse()[n, d] = left - 1
    if left or d > loops.MOST_WHOLE or not product.whole_numbers_pay():
        return _round(W, name, offset, product.pays())
    norm, residual, dot, along = _facts(W, name, offset)
    shape = -(-n // loops.PANEL), -(-d // 4), loops.PANEL
    panels = _shared("of enc", (2 * math.prod(shape),)).view(torch.int32).view(shape)
    scale, bias = (buffer(f"{name} {part}", (shape[0] * loops.PANEL,)).numpy() for part in ("scale", "bias"))
    starts = buffer(f"{name} starts", (shape[0] * loops.PANEL,), torch.int32).numpy()
    factor = _balance(x, W)
    into = panels.numpy(), scale, starts, norm, residual, dot
    _spread(loops.round_panels8, len(panels), 16 * loops.PANEL * d, W.numpy(), 1 / factor, along, *into)
    return _Rounded(panels, norm, residual, dot, scale, starts, bias, factor)


SPREAD_ROWS = 48
"""Rows and latents, evenly spaced, that the size of pre-activations is found from."""

BALANCED_ROWS = 256
"""Rows and latents, evenly spaced, that factors of columns are found from."""


def _balance(x: Tensor, W: Tensor) -> np.ndarray:
    """Factors of columns with which ``x * factor`` and ``W / factor`` have columns of the same size.

    One scale has to do for all columns of a row: large columns of `x` take from it what small ones need, while a
    product does not change when a factor moves from one side to the other (as in SmoothQuant, arXiv:2211.10438).
    """
    sizes = []
    for t in (x, W):
        sample = t[:: max(1, len(t) // BALANCED_ROWS)][:BALANCED_ROWS].numpy()
        sizes.append(np.einsum("ij,ij->j", sample, sample) / max(len(sample), 1))
    with np.errstate(all="ignore"):
        factor = np.sqrt(np.sqrt(sizes[1] / sizes[0]))
    return np.clip(np.nan_to_num(factor, nan=1.0), 2.0**-16, 2.0**16).astype(np.float32)


FARTHER = 3.0
"""How fast candidates become more with the bound, in standard deviations of pre-activations: k latents are ``k
exp(FARTHER * bound)`` then, if pre-activations are normal and 0.1% to 1% of the latents are kept."""

CHEAPER = {True: 28, False: 75}
"""On how many latents whole numbers save the time that one more candidate costs: when the encoder stays in the last
cache, and when it comes from memory. From times on a Zen 5, where it makes little difference near the limit."""

CACHED = 16 * 2**20
"""Size up to which an encoder stays there. Unit: bytes."""


NOT_AGAIN = 30
"""So many encoders of a shape go into bf16 at once after whole numbers were too coarse for one: trying takes time."""


def _coarse() -> dict[tuple[int, ...], int]:
    """By shape, how many encoders this thread is not to try whole numbers for."""
    return _scratch.__dict__.setdefault("coarse", {})


def _rounded_alike(x: Tensor, W_enc: Tensor, W: _Rounded, kept: float, exact: bool = True) -> tuple[_Rounded, _Rounded]:
    """Rows in the format of the latents; both in bf16 where whole numbers leave too many candidates.

    The codes are the same. `kept` is about how many latents of a row are looked for, over all prefixes.
    """
    if W.scale is not None:
        if exact:
            rows = _round8(x, "x", W.factor)
            bound = rows.residual.mean() * W.norm.mean() + rows.norm.mean() * W.residual.mean()
            few = (
                x[:: max(1, len(x) // SPREAD_ROWS)][:SPREAD_ROWS],
                W_enc[:: max(1, len(W_enc) // SPREAD_ROWS)][:SPREAD_ROWS],
            )
            spread = max(float(loops.spread(*(t.contiguous().numpy() for t in few))), 1e-30)
            more = kept * math.expm1(min(FARTHER * float(bound) / spread, 50.0))
            if more * CHEAPER[4 * W_enc.numel() <= CACHED] <= len(W_enc):
                return rows, W
            _coarse()[tuple(W_enc.shape)] = NOT_AGAIN
        W = _round(W_enc, "wide", packed=True, own_memory=True)
    return _round(x, "x"), W


def _with_bias(latents: _Rounded, bias: Tensor, size: Tensor | None = None) -> np.ndarray:
    """Put a bias into the copy of latents; returns how much of it the product may lose, ``[n_latents]``.

    `size` bounds the numbers that the bias is a sum of; None: it is no sum.
    """
    n = len(bias)
    if latents.bias is not None:
        width = 4 * latents.copy.shape[1]
        latents.bias[:n], latents.bias[n:] = bias.numpy(), 0
        lost = torch.full((n,), 2.0**-120)
    else:
        width = latents.copy.shape[1] * (2 if latents.copy.ndim == 4 else 1)
        parts = torch.zeros((-(-n // loops.PANEL) * loops.PANEL, 2), dtype=torch.bfloat16)
        parts[:n, 0] = bias
        rest = bias - parts[:n, 0].float()
        parts[:n, 1] = rest
        if latents.copy.ndim == 4:
            latents.copy[:, -1] = parts.view(-1, loops.PANEL, 2)
        else:
            latents.copy[:, -2:] = parts[:n]
        lost = (rest - parts[:n, 1].float()).abs_() + 2.0**-120
    # The sum in fp32, as in `row_reach`; and what rounding a sum beforehand, or comparing it afterwards, may change.
    lost.add_(bias.abs(), alpha=2 * (width + 10) * 2.0**-23)
    if size is not None:
        lost.add_(size, alpha=2.0**-21)
    return lost.mul_(1 + 1e-6).numpy()


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, block_rows: int | None = None, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """`saekit.kernels.reference.topk_encode` by a product in few bits and fp32 rescoring (see the module).

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
    return _encode(x, W_enc, b_enc, _round_latents(W_enc, "W", x), k, block_rows, exact)


def _encode(
    x: Tensor, W_enc: Tensor, bias: Tensor, W: _Rounded, k: int, block_rows: int | None, exact: bool,
    ordered: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _encode_prefixes(x, W_enc, bias, W, [(len(W_enc), k)], block_rows, exact, ordered)[0]


def _encode_prefixes(
    x: Tensor, W_enc: Tensor, bias: Tensor, W: _Rounded, prefixes: Sequence[tuple[int, int]], block_rows: int | None,
    exact: bool, ordered: bool = True,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """For each ``(size, k)`` the k largest of the first `size` latents, all from one product."""
    n, d = x.shape
    found = [(torch.empty((n, k)), torch.empty((n, k), dtype=torch.int64)) for _, k in prefixes]
    if not n:
        return found
    if not float(W.norm.max()) <= LARGEST or not float(bias.abs().max()) <= LARGEST:  # also when one of them is NaN
        return [reference.topk_encode(x, W_enc[:m], bias[:m], k, block_rows=block_rows) for m, k in prefixes]
    rows, W = _rounded_alike(x, W_enc, W, sum(k for _, k in prefixes), exact)
    reach = row_reach(rows, d)
    bias_reach = _with_bias(W, bias)
    x_, W_, b_ = x.numpy(), W_enc.numpy(), bias.numpy()
    shares = [lane_share(m, k) for m, k in prefixes]
    bounds = [np.array([part[:m].max() for part in (W.norm, W.residual, bias_reach)]) for m, _ in prefixes]
    # The larger ones first: each may write lanes of latents from its last panel on, or all if they have another share.
    order = sorted(range(len(prefixes)), key=lambda which: -prefixes[which][0])

    def work(start: int, stop: int, P: np.ndarray, maxima: np.ndarray, settled: int) -> None:
        for which in order:
            (m, k), share, (values, indices) = prefixes[which], shares[which], found[which]
            settled = settled if share == product.SHARE else 0
            known = min(m, settled) // loops.PANEL * (loops.PANEL // share)
            loops.choose(
                0, stop - start, P, x_[start:stop], reach[start:stop], rows.norm[start:stop], W_[:m], b_[:m],
                W.norm[:m], W.residual[:m], bias_reach[:m], bounds[which], k, maxima, share, known, exact, ordered,
                values[start:stop].numpy(), indices[start:stop].numpy(),
            )  # fmt: skip

    _by_blocks(work, rows, W, max(_lanes(m, share) for (m, _), share in zip(prefixes, shares)), block_rows)
    again = torch.from_numpy(np.flatnonzero(~(rows.norm <= LARGEST)))
    if len(again):
        for (m, k), (values, indices) in zip(prefixes, found):
            values[again], indices[again] = reference.topk_encode(x[again], W_enc[:m], bias[:m], k)
    return found


THRESHOLD_SHARE = 256
"""One of so many latents is taken to be above its threshold when a format is chosen."""


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | None,
    *,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`saekit.kernels.reference.threshold_encode` by a product in few bits and fp32 rescoring (see the module).

    Rows in which more than a sixteenth of the latents may fire are left to the plain kernel: there a dense product is
    cheaper than rescoring.
    """
    x, W_enc, bias = (t.detach().contiguous() for t in (x, W_enc, b_enc))
    n_latents = len(W_enc)
    level = torch.zeros(n_latents) if threshold is None else threshold.detach().clamp(min=0).contiguous()
    room = max(n_latents // 16, min(n_latents, 64))
    found = _encode_above(x, W_enc, bias, _round_latents(W_enc, "W", x), level, room, block_rows)
    if found is None:
        return reference.threshold_encode(x, W_enc, bias, threshold, block_rows=block_rows)
    offsets, indices, values, again = found
    if not len(again):
        return tuple(torch.from_numpy(part) for part in (offsets, indices, values))  # type: ignore[return-value]
    # Splice rows from the plain kernel between the others: those that were left out are empty so far.
    at = torch.from_numpy(again)
    plain = reference.threshold_encode(x[at], W_enc, bias, threshold, block_rows=block_rows)
    counts = torch.from_numpy(offsets).diff()
    counts[at] = plain[0].diff()
    whole = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    from_plain = torch.zeros(len(x), dtype=torch.bool)
    from_plain[at] = True
    from_plain = torch.repeat_interleave(from_plain, counts)
    all_indices, all_values = torch.empty(int(whole[-1]), dtype=torch.int64), torch.empty(int(whole[-1]))
    for mine, other, into in ((indices, plain[1], all_indices), (values, plain[2], all_values)):
        into[from_plain] = other
        into[~from_plain] = torch.from_numpy(mine)
    return whole, all_indices, all_values


def _encode_above(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    W: _Rounded,
    level: Tensor,
    room: int,
    block_rows: int | None,
    all_or_none: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """All pre-activations above a level of any sign: offsets, latents and values, and the rows that were left out.

    Rows are left out when they are not finite or have more than `room` such latents, whatever the format of the
    product. None when the weights are not finite, or (with `all_or_none`) when a row would be left out.
    """
    n, d = x.shape
    n_latents = len(W_enc)
    finite = bool(W.norm.max() <= LARGEST) and bool(bias.abs().max() <= LARGEST) and bool(level.abs().max() <= LARGEST)
    if not n or not finite:
        return None
    rows, W = _rounded_alike(x, W_enc, W, n_latents / THRESHOLD_SHARE)
    reach = row_reach(rows, d)
    share = lane_share(n_latents, 1)
    bias_reach = _with_bias(W, bias - level, bias.abs() + level.abs())
    x_, W_, b_, level_ = (t.numpy() for t in (x, W_enc, bias, level))
    most = np.array([part.max() for part in (W.norm, W.residual, bias_reach)])
    counts = np.zeros(n, np.int64)
    left_out = threading.Event()
    parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def work(start: int, stop: int, P: np.ndarray, maxima: np.ndarray, settled: int) -> None:
        if left_out.is_set():
            return
        values = buffer("values above", (stop - start, room)).numpy()
        indices = buffer("indices above", (stop - start, room), torch.int64).numpy()
        own = counts[start:stop]
        known = settled // loops.PANEL * (loops.PANEL // share) if share == product.SHARE else 0
        loops.choose_above(
            0, stop - start, P, x_[start:stop], reach[start:stop], rows.norm[start:stop], W_, b_, W.norm, W.residual,
            bias_reach, most, level_, maxima, share, known, values, indices, own,
        )  # fmt: skip
        own[~(rows.norm[start:stop] <= LARGEST)] = -1
        if all_or_none and bool((own < 0).any()):
            left_out.set()
            return
        offsets = np.zeros(len(own) + 1, np.int64)
        np.cumsum(np.maximum(own, 0), out=offsets[1:])
        packed = np.empty(offsets[-1], np.float32), np.empty(offsets[-1], np.int64)
        loops.pack_rows(values, indices, offsets, *packed)
        parts[start] = packed

    _by_blocks(work, rows, W, _lanes(n_latents, share), block_rows)
    if left_out.is_set():
        return None
    again = np.flatnonzero(counts < 0)
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(np.maximum(counts, 0), out=offsets[1:])
    values, indices = (np.concatenate([parts[start][which] for start in sorted(parts)]) for which in (0, 1))
    return offsets, indices, values, again


def row_reach(rows: _Rounded, d: int) -> np.ndarray:
    """The rows' factor of the bound, ``[n]``.

    Product and exact value differ by at most ``row_reach * norm of the latent + norm of the row * residual of the
    latent``, besides the rounding of the product itself, which is relative to the product.
    """
    return (rows.residual + rows.norm * np.float32(2 * (d + 8) * 2.0**-23)) * np.float32(1 + 1e-6)


def lane_share(n_latents: int, k: int) -> int:
    """Latents of one lane, of whose maxima the k-th locates the k largest: so few that few lanes hold two of them."""
    share = 8
    while share > 1 and n_latents < share * max(8 * k, 256):
        share //= 2
    return share


def _lanes(n_latents: int, share: int) -> int:
    """Room that the lanes of `share` latents take, whole vectors."""
    return -(-n_latents // loops.PANEL) * (loops.PANEL // share) + 32


# ---------------------------------------------------------------- the training step


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder at one step: what it subtracts from rows is a part of the bias."""

    W: Tensor
    bias: Tensor
    """``b_enc - W_enc @ offset``, ``[n_latents]``."""
    rounded: _Rounded


@dataclass(frozen=True, eq=False)
class Pairs:
    """(row, latent) pairs, row by row."""

    offsets: np.ndarray
    """``[n_rows + 1]`` int64."""
    latents: np.ndarray
    """``[n_pairs]`` int64."""
    values: np.ndarray
    """Pre-activations or codes, ``[n_pairs]`` float32."""

    def where(self, kept: np.ndarray) -> Pairs:
        """The pairs that `kept` ``[n_pairs]`` bool marks."""
        before = np.zeros(len(kept) + 1, np.int64)
        np.cumsum(kept, out=before[1:])
        return Pairs(before[self.offsets], self.latents[kept], self.values[kept])


@dataclass(frozen=True, eq=False)
class Fit:
    """A reconstruction, differentiated."""

    error: float
    """Sum over rows of ``||x - x_hat||^2``."""
    gradient: Tensor
    """Of the loss by ``x_hat``, ``[n, d]``."""
    slopes: np.ndarray
    """``gradient . W_dec[latent]`` of each pair."""
    columns: np.ndarray
    """``gradient`` summed over rows, ``[d]``."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradient of all weights with a latent axis."""

    of_enc: np.ndarray
    of_dec: np.ndarray
    """Before projection."""
    of_bias: np.ndarray
    along: np.ndarray
    """``of_dec[j] . W_dec[j]``, ``[n_latents]``."""
    squares: np.ndarray
    """``|of_dec[j]|^2 + |of_enc[j]|^2``, ``[n_latents]``."""
    of_offset: np.ndarray
    """What the bias passes on to the offset, ``[d]``."""
    counts: np.ndarray
    """Pairs of each latent, ``[n_latents]``."""


array = np
"""The library that the numbers of a step belong to."""


def number(value: Tensor) -> np.float32:
    """A running value to compute with."""
    return np.float32(float(value))


def numbers(t: Tensor) -> np.ndarray:
    """A tensor to compute with, in the same memory."""
    return t.numpy()


def tensor(values: np.ndarray) -> Tensor:
    """The inverse of `numbers`."""
    return torch.from_numpy(values)


def counts_of(latents: np.ndarray, n_latents: int) -> np.ndarray:
    """How often each latent is there, ``[n_latents]`` int64."""
    return np.bincount(latents, minlength=n_latents)


def sums_of(latents: np.ndarray, weights: np.ndarray, n_latents: int) -> np.ndarray:
    """Sum of the weights of each latent's pairs, ``[n_latents]`` float64."""
    return np.bincount(latents, weights, n_latents).astype(np.float64, copy=False)


def smallest_of_largest(values: np.ndarray, count: int) -> np.float32:
    """The smallest of the `count` largest values."""
    more = len(values) - count
    return np.partition(values, more)[more]


def room_for(x: Tensor, count: int) -> Tensor:
    """Memory of undefined content for `count` sets of rows like `x`, one after the other."""
    return buffer("sets of rows", (count * len(x), x.shape[1]))


def centered(x: Tensor, scale: Tensor | None, center: Tensor) -> Tensor:
    """``x * scale - center`` in memory that the next call on this thread uses again."""
    x = x.detach().contiguous()
    out = buffer("centered rows", tuple(x.shape))
    factor = np.float32(1.0 if scale is None else float(scale))
    _spread(loops.center_rows, len(x), 4 * x.shape[1], x.numpy(), factor, center.numpy(), out.numpy())
    return out


def variance(x: Tensor) -> float:
    """``mean over rows of ||x - mean(x)||^2``, at least 1e-12."""
    n, d = x.shape
    parts = -(-n // CHUNK)
    columns, squares = buffer("columns", (parts, d)).numpy(), np.empty(parts, np.float32)
    _spread(loops.column_sums, parts, CHUNK * d, CHUNK, x.numpy(), columns)
    mean = (columns.sum(0, dtype=np.float64) / n).astype(np.float32)
    _spread(loops.squares_around, parts, CHUNK * d, CHUNK, x.numpy(), mean, squares)
    return max(float(squares.sum(dtype=np.float64)) / n, 1e-12)


def row_norms(W: Tensor) -> np.ndarray:
    """Length of each row of ``W [n, d]``."""
    norms = np.empty(len(W), np.float32)
    _spread(loops.row_norms, len(W), W.shape[1], W.numpy(), norms)
    return norms


def encoder_at(W_enc: Tensor, b_enc: Tensor, offset: Tensor, x: Tensor) -> Encoder:
    """The encoder for rows like `x`, from which `offset` is yet to be subtracted."""
    buffer("of enc", tuple(W_enc.shape))  # the copy lies in it, and `gradients` wants it this large
    rounded = _round_latents(W_enc, "W", x, offset)
    return Encoder(W_enc, b_enc - torch.from_numpy(rounded.dot), rounded)


def join(parts: Sequence[Pairs]) -> Pairs:
    """Pairs of several sets of rows, one set after the other."""
    starts = np.cumsum([0, *(len(part.latents) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts)]
    latents, values = (np.concatenate([getattr(part, name) for part in parts]) for name in ("latents", "values"))
    return Pairs(np.concatenate([*offsets, starts[-1:]]), latents, values)


def even_pairs(values: np.ndarray, latents: np.ndarray) -> Pairs:
    """As many pairs in every row, ``[n, k]`` each."""
    n, k = values.shape
    return Pairs(
        np.arange(0, n * k + 1, k), np.ascontiguousarray(latents).ravel(), np.ascontiguousarray(values).ravel()
    )


def topk_pairs(x: Tensor, encoder: Encoder, k: int, exact: bool = True) -> Pairs:
    """The `k` largest of each row, after ReLU (0 where the pre-activation was not positive)."""
    values, indices = _encode(x, encoder.W, encoder.bias, encoder.rounded, k, None, exact)
    return Pairs(np.arange(0, len(x) * k + 1, k), indices.view(-1).numpy(), values.view(-1).numpy())


def topk_pairs_of_prefixes(x: Tensor, encoder: Encoder, prefixes: Sequence[tuple[int, int]]) -> list[Pairs]:
    """`topk_pairs` of the first `size` latents for each ``(size, k)``, from one product of all latents."""
    found = _encode_prefixes(x, encoder.W, encoder.bias, encoder.rounded, prefixes, None, True)
    return [even_pairs(values.numpy(), indices.numpy()) for values, indices in found]


def topk_pairs_of_some(x: Tensor, W_enc: Tensor, bias: Tensor, k: int, exact: bool = True) -> Pairs:
    """The `k` largest of each row among some latents, after ReLU, in no order; an `Encoder` loses its copy.

    Always from bf16: the order follows the format, and the choice of that what other encoders have met.
    """
    values, indices = _encode(x, W_enc, bias, _round(W_enc, "some", packed=product.pays()), k, None, exact, False)
    return even_pairs(values.numpy(), indices.numpy())


def pairs_above(x: Tensor, encoder: Encoder, level: Tensor, room: int) -> Pairs | None:
    """All pre-activations above a level ``[n_latents]`` of any sign; None when a row has more than `room`, or when
    something is not finite.
    """
    found = _encode_above(x, encoder.W, encoder.bias, encoder.rounded, level, room, None, all_or_none=True)
    return None if found is None else Pairs(*found[:3])


def reconstruct(
    x: Tensor, pairs: Pairs, codes: np.ndarray, W_dec: Tensor, offset: Tensor, weight: float = 1.0, name: str = ""
) -> Fit:
    """Decode the pairs and differentiate ``weight * mean over rows of ||x - x_hat||^2``."""
    n, d = x.shape
    parts = -(-n // CHUNK)
    gradient, columns = buffer(f"gradient {name}", (n, d)), buffer("columns", (parts, d)).numpy()
    slopes, squares = buffer(f"slopes {name}", (len(codes),)).numpy(), buffer("squares", (n,)).numpy()
    _spread(
        loops.reconstruct, parts, 4 * CHUNK * d * len(codes) / max(n, 1),
        CHUNK, x.numpy(), pairs.offsets, codes, pairs.latents, W_dec.numpy(), offset.numpy(),
        np.float32(2 * weight / n), gradient.numpy(), slopes, squares, columns,
    )  # fmt: skip
    return Fit(float(squares.sum(dtype=np.float64)), gradient, slopes, columns.sum(0))


def gradients(
    x: Tensor, offset: Tensor, weights: dict[str, Tensor], pairs: Pairs, wanted: np.ndarray, codes: np.ndarray,
    slopes: np.ndarray, gradient: Tensor, *, stretch: np.ndarray | None = None,
    revived: tuple[Tensor, ...] | None = None, sections: Sequence[int] = (), name: str = "",
) -> Gradients:  # fmt: skip
    """Sums over each latent's pairs: ``of_dec = sum code * gradient[row]``, ``of_enc = sum slope * (x[row] - offset)``.

    Parameters
    ----------
    x, offset, weights
        Centred rows ``[n, d]``, ``b_dec`` minus the centre ``[d]``, and at least ``W_enc`` and ``W_dec``.
    pairs, wanted, codes, slopes
        Pairs; which of them count ``[n_pairs]`` bool; their codes, and the gradient of their pre-activations. With
        more rows than `x` has they are row r + n, r + 2 n, ... of it.
    gradient
        Of the loss by the reconstruction, ``[n, d]`` or ``[m * n, d]``.
    stretch
        ``[n_latents]``; ``stretch[j] * W_dec[j]`` is added to `of_dec`.
    revived
        Latents ``[m]`` int64 and a further gradient of their decoder rows, encoder rows and biases.
    sections
        Edges of groups of latents, each of which takes the next n rows of `gradient`.
    name
        The gradients lie in memory that the next call with this name uses again.
    """
    n, d = x.shape
    W_enc, W_dec = weights["W_enc"], weights["W_dec"]
    n_latents = len(W_enc)
    slot, more = np.full(n_latents, -1, np.int32), [torch.empty((0, d)), torch.empty((0, d)), torch.empty(0)]
    if revived is not None:
        slot[revived[0].numpy()] = np.arange(len(revived[0]), dtype=np.int32)
        more = list(revived[1:])
    offsets = np.zeros(n_latents + 1, np.int64)
    loops.count_by_latent(pairs.latents, wanted, offsets)
    count = int(offsets[-1])
    rows = buffer("rows", (count,), torch.int32).numpy()
    code, slope = buffer("code", (count,)).numpy(), buffer("slope", (count,)).numpy()
    loops.sort_by_latent(
        pairs.offsets, codes, pairs.latents, slopes, wanted, offsets[:-1].copy(), rows, code, slope
    )  # fmt: skip
    sources = rows
    if len(pairs.offsets) - 1 > n:
        rows = sources % np.int32(n)
    elif sections:
        sources = rows.copy()
        for edge in sections:
            sources[offsets[edge] :] += np.int32(n)
    chunks = -(-n_latents // CHUNK)
    of_dec, of_enc = (buffer(f"{name}of {part}", (n_latents, d)).numpy() for part in ("dec", "enc"))
    of_bias, of_offset = np.empty(n_latents, np.float32), buffer("of offset", (chunks, d)).numpy()
    along, squares = np.zeros(n_latents, np.float32), np.zeros(n_latents)
    stretch = np.zeros(n_latents, np.float32) if stretch is None else stretch
    cost = 4 * count * d / n_latents
    for left, right in _panels(len(gradient), d):
        _spread(
            loops.gradient_of_decoder, n_latents, cost, left, right, offsets, sources, code, gradient.numpy(),
            W_dec.numpy(), slot, more[0].numpy(), stretch, of_dec, along, squares,
        )  # fmt: skip
    for left, right in _panels(n, d):
        _spread(
            loops.gradient_of_encoder, chunks, CHUNK * cost, CHUNK, left, right, offsets, rows, slope, x.numpy(),
            offset.numpy(), W_enc.numpy(), slot, more[1].numpy(), more[2].numpy(), of_enc, of_bias, of_offset,
            squares,
        )  # fmt: skip
    return Gradients(of_enc, of_dec, of_bias, along, squares, -of_offset.sum(0), np.diff(offsets))


def _panels(n: int, d: int) -> list[tuple[int, int]]:
    """Columns of ``[n, d]`` in panels that stay in the last cache."""
    panels = max(1, round(4 * n * d / PANEL_BYTES))
    edges = [16 * (d * panel // (16 * panels)) for panel in range(panels)] + [d]
    return list(itertools.pairwise(edges))


def descend(
    weights: dict[str, Tensor], first: dict[str, Tensor], second: dict[str, Tensor], g: Gradients,
    others: dict[str, np.ndarray], adam: Adam, *, clip: float | None, unit: bool, rates: Mapping[str, float] = {},
) -> float:  # fmt: skip
    """Clipping, Adam and (with `unit`) decoder rows of length 1, in place; returns the length of the gradient.

    `others` are gradients of further weights, `b_dec` among them; ``others["b_enc"]`` stands in for the gradient of the
    bias in `g`. `rates` multiply the learning rate of some of them.
    """
    W_enc, W_dec, b_enc = (weights[name].numpy() for name in ("W_enc", "W_dec", "b_enc"))
    of_bias = others.get("b_enc", g.of_bias)
    lengths = g.squares + np.square(of_bias, dtype=np.float64)
    if unit:  # what projection removes from the gradient of a row of length 1 is the square of `along`
        lengths -= np.square(g.along, dtype=np.float64)
    # Sorted, so that the sum does not depend on the order of the latents.
    total = np.sort(lengths).sum()
    for name, gradient in others.items():
        if name != "b_enc":
            total += np.sort(np.square(gradient, dtype=np.float64)).sum()
    norm = float(np.sqrt(np.maximum(total, 0.0)))
    factor = min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0
    if not np.isfinite(norm):
        factor = np.nan  # as in plain torch: nothing survives, and the caller sees it
    memory1, memory2, rate, root, eps = adam.factors()

    def numbers(name: str) -> tuple[np.float32, ...]:
        values = factor, memory1, memory2, rate * rates.get(name, 1.0), root, eps
        return tuple(np.float32(value) for value in values)

    moments = [group[name].numpy() for group in (first, second) for name in ("W_enc", "W_dec", "b_enc")]
    _spread(
        loops.update_latents, len(W_enc), 32 * W_enc.shape[1], g.of_dec, g.of_enc, of_bias, g.along,
        W_enc, W_dec, b_enc, *moments, unit, *numbers("W_enc"),
    )  # fmt: skip
    for name, gradient in others.items():
        if name != "b_enc":
            moving = (group[name].numpy() for group in (weights, first, second))
            loops.adam_row(gradient.astype(np.float32, copy=False), *moving, *numbers(name))
    return norm
