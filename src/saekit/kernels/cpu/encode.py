"""Encoders for a CPU with AVX-512 bf16: candidates from a product in few bits, proven bounds, fp32 for what is left."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference
from . import buffers, intrinsics_numba, low_bit_matmul, rounding_numba, selection_numba
from .buffers import _scratch, _shared, _spread, _threads, buffer
from .rounding_numba import LARGEST

# ---------------------------------------------------------------- encode


BLOCK_BYTES = 8 * 2**20
"""Size of the buffer for one block of the product: it should stay in the last cache. Unit: bytes."""


@dataclass(frozen=True)
class _Rounded:
    """A copy of some rows in fewer bits, and what is known about it."""

    copy: Tensor
    """bf16 ``[n, width]``, or in the order of `saekit.kernels.cpu.low_bit_matmul` ``[panels, width / 2, PANEL, 2]``.

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


def _by_blocks(
    work: Callable[[int, int, np.ndarray, np.ndarray, int], None], rows: _Rounded, latents: _Rounded, lanes: int,
    block_rows: int | None,
) -> None:  # fmt: skip
    """``work(start, stop, P, maxima, settled)`` over blocks of rows, each block on one thread: its product and what is
    done to it.

    `P` is the product of these rows and all latents as bits. `maxima` has room for `lanes` keys a row, and the keys of
    lanes of `saekit.kernels.cpu.low_bit_matmul.SHARE` latents for the first `settled` latents (see
    `saekit.kernels.cpu.selection_numba.choose`).
    Threads that share a product have to wait for each other, and torch's threads keep their core busy for milliseconds
    after it, in case there is more.
    """
    n, n_latents = len(rows.norm), len(latents.norm)
    edges = _edges(n, n_latents, block_rows)
    threads = min(buffers.thread_count(), len(edges) - 1)
    packed = latents.copy.ndim > 2
    room = max(stop - start for start, stop in itertools.pairwise(edges))
    width = n_latents
    if packed:  # whole tiles; rows that start in different sets of the caches
        room, width = room + -room % low_bit_matmul.ROWS, intrinsics_numba.PANEL * len(latents.copy) + 32
    products = buffer("product", (threads, room, width), torch.bfloat16)
    maxima = buffer("maxima", (threads, room, lanes), torch.int16)
    ticket = itertools.count()

    words = rows.copy.view(torch.int32).numpy() if packed else np.empty(0)

    def multiply(start: int, stop: int, bits: np.ndarray, best: np.ndarray) -> None:
        if latents.scale is not None:
            low_bit_matmul.multiply8(
                stop - start, words[start:], rows.scale[start:], latents.copy.numpy(), latents.starts, latents.scale,
                latents.bias, bits, best,
            )  # fmt: skip
        else:
            panels = latents.copy.view(torch.int32)[..., 0].numpy()
            low_bit_matmul.multiply(stop - start, words[start:], panels, bits, best)

    def many(P: Tensor, best: np.ndarray) -> None:
        bits = P.view(torch.int16).numpy()
        with torch.no_grad():
            while (index := next(ticket)) < len(edges) - 1:
                start, stop = edges[index : index + 2]
                if packed:
                    multiply(start, stop, bits, best)
                else:
                    torch.mm(rows.copy[start:stop], latents.copy.T, out=P[: stop - start])
                work(
                    start,
                    stop,
                    bits,
                    best,
                    n_latents // intrinsics_numba.PANEL * intrinsics_numba.PANEL if packed else 0,
                )

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
    threads = buffers.thread_count()
    most = max(1, min(block_rows or n, max(64, -(-n // (4 * threads))), max(16, BLOCK_BYTES // (2 * n_latents))))
    edges = [0]
    while (left := n - edges[-1]) > 0:
        size = min(most, max(64, -(-left // (2 * threads)))) if threads > 1 else most
        if block_rows is None:
            size += -size % low_bit_matmul.ROWS
        edges.append(edges[-1] + min(size, left))
    return edges


def _round(
    x: Tensor, name: str, offset: Tensor | None = None, packed: bool = False, own_memory: bool = False
) -> _Rounded:
    """bf16 copy of rows; `packed`: in the order of `low_bit_matmul`, and without the last two entries.

    What is packed lies in the memory of the encoder's gradient, unless it gets its `own_memory`.
    """
    n, d = x.shape
    width = d + d % 2 + 2
    norm, residual, dot, along = _facts(x, name, offset)
    if packed:
        shape = -(-n // intrinsics_numba.PANEL), width // 2, intrinsics_numba.PANEL, 2
        # An encoder is rounded before its gradient is there.
        bf16 = buffer(f"{name} panels", shape, torch.bfloat16) if own_memory else _shared("of enc", shape)
        words = bf16.view(torch.int32)[..., 0].numpy()
        cost = 8 * intrinsics_numba.PANEL * d
        _spread(rounding_numba.round_panels, len(words), cost, x.numpy(), along, words, norm, residual, dot)
    else:
        bf16 = buffer(f"{name} bf16", (n + low_bit_matmul.ROWS, width), torch.bfloat16)[:n]
        bf16[:, d:-2], bf16[:, -2:] = 0, 1
        _spread(
            rounding_numba.round_rows, n, 4 * d, x.numpy(), along, bf16.view(torch.int16).numpy(), norm, residual, dot
        )
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
    scale = buffer(f"{name} scale", (n + low_bit_matmul.ROWS,)).numpy()
    copy = buffer(f"{name} bytes", (n + low_bit_matmul.ROWS, d + -d % 4), torch.uint8)[:n]
    into = copy.numpy(), scale, np.empty(n, np.int32), norm, residual, dot
    _spread(rounding_numba.round_rows8, n, 8 * d, x.numpy(), factor, along, 128, *into)
    return _Rounded(copy, norm, residual, dot, scale)


def _round_latents(W: Tensor, name: str, x: Tensor, offset: Tensor | None = None) -> _Rounded:
    """Latents in the format that is the fastest to multiply with rows like `x`.

    Whole numbers, or bf16 in the order of either product.
    """
    n, d = W.shape
    left = _coarse().get((n, d), 0)
    if left:
        _coarse()[n, d] = left - 1
    if left or d > rounding_numba.MOST_WHOLE or not low_bit_matmul.whole_numbers_pay():
        return _round(W, name, offset, low_bit_matmul.pays())
    norm, residual, dot, along = _facts(W, name, offset)
    shape = -(-n // intrinsics_numba.PANEL), -(-d // 4), intrinsics_numba.PANEL
    panels = _shared("of enc", (2 * math.prod(shape),)).view(torch.int32).view(shape)
    scale, bias = (buffer(f"{name} {part}", (shape[0] * intrinsics_numba.PANEL,)).numpy() for part in ("scale", "bias"))
    starts = buffer(f"{name} starts", (shape[0] * intrinsics_numba.PANEL,), torch.int32).numpy()
    factor = _balance(x, W)
    into = panels.numpy(), scale, starts, norm, residual, dot
    _spread(
        rounding_numba.round_panels8, len(panels), 16 * intrinsics_numba.PANEL * d, W.numpy(), 1 / factor, along, *into
    )
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
            spread = max(float(rounding_numba.spread(*(t.contiguous().numpy() for t in few))), 1e-30)
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
        parts = torch.zeros((-(-n // intrinsics_numba.PANEL) * intrinsics_numba.PANEL, 2), dtype=torch.bfloat16)
        parts[:n, 0] = bias
        rest = bias - parts[:n, 0].float()
        parts[:n, 1] = rest
        if latents.copy.ndim == 4:
            latents.copy[:, -1] = parts.view(-1, intrinsics_numba.PANEL, 2)
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
            settled = settled if share == low_bit_matmul.SHARE else 0
            known = min(m, settled) // intrinsics_numba.PANEL * (intrinsics_numba.PANEL // share)
            selection_numba.choose(
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
    plain = ~(rows.norm <= LARGEST)
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
        known = (
            settled // intrinsics_numba.PANEL * (intrinsics_numba.PANEL // share)
            if share == low_bit_matmul.SHARE
            else 0
        )
        selection_numba.choose_above(
            0, stop - start, P, x_[start:stop], reach[start:stop], rows.norm[start:stop], W_, b_, W.norm, W.residual,
            bias_reach, most, level_, maxima, share, known, values, indices, own,
        )  # fmt: skip
        own[plain[start:stop]] = -1
        if all_or_none and bool((own < 0).any()):
            left_out.set()
            return
        offsets = np.zeros(len(own) + 1, np.int64)
        np.cumsum(np.maximum(own, 0), out=offsets[1:])
        packed = np.empty(offsets[-1], np.float32), np.empty(offsets[-1], np.int64)
        selection_numba.pack_rows(values, indices, offsets, *packed)
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
    return -(-n_latents // intrinsics_numba.PANEL) * (intrinsics_numba.PANEL // share) + 32
