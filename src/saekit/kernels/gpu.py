"""Triton kernels for a CUDA device: top-k encode, sparse sums by row, products of pairs.

None of them makes an array of rows by latents. The top-k encode multiplies in bf16 twice: first it keeps the largest
value of every `GROUP` latents, whose k-th largest is a level that k latents surely reach; then it collects the latents
that may reach it within the bound of `saekit.kernels.cpu` (without the rounding of a bf16 result, which is not made
here). What was collected is multiplied again in fp32, so the codes are those of an fp32 product.

With ``TRITON_INTERPRET=1`` in the environment the kernels run on tensors in main memory, slowly: that is how the tests
run them.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

GROUP = 32
"""Latents whose largest value is kept in the first pass."""

ROWS, LATENTS, DEPTH = 64, 128, 64
"""Block of one product: rows, latents, dimensions at a time."""

LOW = torch.float16 if os.environ.get("TRITON_INTERPRET", "0") == "1" else torch.bfloat16
"""Type of the first products. Triton's interpreter multiplies the bits of a bf16 instead of its value."""

CANDIDATES = 4
"""Room for candidates of a row, as a multiple of k; rows with more are computed by the plain kernel."""


@triton.jit
def _product(
    x, W, bias, rows, latents, n, n_latents, d, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr
):  # type: ignore[no-untyped-def]
    """``x[rows] @ W[latents].T + bias[latents]``; minus infinity beyond the last latent."""
    total = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    for first in range(0, d, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        a = tl.load(x + rows[:, None] * d + at[None, :], mask=(rows[:, None] < n) & (at[None, :] < d), other=0.0)
        b = tl.load(
            W + latents[None, :] * d + at[:, None], mask=(latents[None, :] < n_latents) & (at[:, None] < d), other=0.0
        )
        total = tl.dot(a, b, total)
    total += tl.load(bias + latents, mask=latents < n_latents, other=0.0)[None, :]
    return tl.where(latents[None, :] < n_latents, total, float("-inf"))


@triton.jit
def _group_maxima(
    x, W, bias, maxima, n, n_latents, d, n_groups,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """The largest value of each group of BLOCK_G neighbouring latents, ``maxima [n, n_groups]``."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    latents = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L).to(tl.int64)
    p = _product(x, W, bias, rows, latents, n, n_latents, d, BLOCK_R, BLOCK_L, BLOCK_D)
    largest = tl.max(tl.reshape(p, (BLOCK_R, BLOCK_L // BLOCK_G, BLOCK_G)), axis=2)
    groups = tl.program_id(1) * (BLOCK_L // BLOCK_G) + tl.arange(0, BLOCK_L // BLOCK_G)
    inside = (rows[:, None] < n) & (groups[None, :] < n_groups)
    tl.store(maxima + rows[:, None] * n_groups + groups[None, :], largest, mask=inside)


@triton.jit
def _collect(
    x, W, bias, level, row_reach, latent_reach, counts, candidates, room, n, n_latents, d,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Latents whose upper bound reaches their row's level, in any order, and how many there are."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    latents = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L).to(tl.int64)
    p = _product(x, W, bias, rows, latents, n, n_latents, d, BLOCK_R, BLOCK_L, BLOCK_D)
    reach = tl.load(row_reach + rows, mask=rows < n, other=0.0)[:, None]
    reach = reach * tl.load(latent_reach + latents, mask=latents < n_latents, other=0.0)[None, :]
    inside = (rows[:, None] < n) & (latents[None, :] < n_latents)
    p = tl.where(inside, p, 0.0)
    wanted = inside & (p + (reach + 4.8e-7 * tl.abs(p)) >= tl.load(level + rows, mask=rows < n, other=0.0)[:, None])
    place = tl.atomic_add(counts + rows[:, None] + tl.zeros_like(latents)[None, :], 1, mask=wanted)
    into = candidates + rows[:, None] * room + place
    tl.store(into, (latents[None, :] + tl.zeros_like(rows)[:, None]).to(tl.int32), mask=wanted & (place < room))


@triton.jit
def _pair_products(x, W, rows, latents, out, n_pairs, d, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x[rows[c]] . W[latents[c]]`` in fp32; 0 for a latent below 0."""
    pairs = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    there = pairs < n_pairs
    row = tl.load(rows + pairs, mask=there, other=0).to(tl.int64)
    latent = tl.load(latents + pairs, mask=there, other=-1).to(tl.int64)
    there = there & (latent >= 0)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(0, d, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (at[None, :] < d)
        a = tl.load(x + row[:, None] * d + at[None, :], mask=inside, other=0.0)
        b = tl.load(W + latent[:, None] * d + at[None, :], mask=inside, other=0.0)
        total += tl.sum(a * b, axis=1)
    tl.store(out + pairs, total, mask=pairs < n_pairs)


@triton.jit
def _weighted_sums(offsets, indices, weights, W, out, d, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """``out[r] = sum over the row's entries of weight * W[index]``, in their order."""
    r = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for c in range(tl.load(offsets + r), tl.load(offsets + r + 1)):
        index = tl.load(indices + c).to(tl.int64)
        total += tl.load(weights + c) * tl.load(W + index * d + at, mask=at < d, other=0.0)
    tl.store(out + r * d + at, total, mask=at < d)


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, block_rows: int | None = None, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """`saekit.kernels.reference.topk_encode` without an array of rows by latents; float32 tensors on one CUDA device.

    `exact` is always kept; the order of equal values within a row is not defined.
    """
    x, W, bias = (t.detach().contiguous() for t in (x, W_enc, b_enc))
    n, d = x.shape
    n_latents = len(W)
    low_x, low_W = x.to(LOW), W.to(LOW)
    # Lengths of the short copies and of what they lost, rounded up; fp32 sums on a tensor core are within 2^-20 d.
    upward = 1 + (d + 8) * 2.0**-23
    x_lost, W_lost = ((t - low.float()).norm(dim=1) * upward for t, low in ((x, low_x), (W, low_W)))
    x_length, W_length = x.norm(dim=1) * upward + x_lost, W.norm(dim=1) * upward + W_lost
    loss = (W_lost / W_length.clamp(min=1e-30)).max() + (d + 8) * 2.0**-20
    row_reach = (x_lost + x_length * loss) * (1 + 1e-6)
    grid = (triton.cdiv(n, ROWS), triton.cdiv(n_latents, LATENTS))
    sizes = {"BLOCK_R": ROWS, "BLOCK_L": LATENTS, "BLOCK_D": DEPTH}
    n_groups = triton.cdiv(n_latents, GROUP)
    plain = torch.ones(n, dtype=torch.bool, device=x.device)
    values, indices = x.new_empty((n, k)), torch.empty((n, k), dtype=torch.int64, device=x.device)
    if n and n_groups >= k:
        maxima = x.new_empty((n, n_groups))
        _group_maxima[grid](low_x, low_W, bias, maxima, n, n_latents, d, n_groups, **sizes, BLOCK_G=GROUP)
        reached = maxima.topk(k, dim=1).values[:, -1]
        # The k latents at or above this level are truly above the level minus their own error.
        widest = row_reach * W_length.max() + 4.8e-7 * maxima.abs().amax(dim=1)
        room = CANDIDATES * k + 32
        counts = torch.zeros(n, dtype=torch.int32, device=x.device)
        candidates = torch.full((n, room), -1, dtype=torch.int32, device=x.device)
        level = reached - 1.01 * widest
        _collect[grid](
            low_x, low_W, bias, level, row_reach, W_length, counts, candidates, room, n, n_latents, d, **sizes
        )
        latents = candidates.sort(dim=1).values  # the order of collection differs from run to run
        rows = torch.arange(n, device=x.device, dtype=torch.int32).repeat_interleave(room)
        scores = pair_products(x, W, rows, latents.view(-1)).view(n, room) + bias[latents.clamp(min=0)]
        top = scores.masked_fill(latents < 0, -torch.inf).topk(k, dim=1)
        values, indices = top.values.relu(), latents.gather(1, top.indices).long()
        plain = ~((counts >= k) & (counts <= room) & torch.isfinite(row_reach))
    if bool(plain.any()):
        values[plain], indices[plain] = reference.topk_encode(x[plain], W, bias, k, block_rows=block_rows)
    return values, indices


def pair_products(x: Tensor, W: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
    """``x[rows[c]] . W[latents[c]]`` for each pair c, ``[n_pairs]`` float32; 0 where the latent is below 0."""
    x, W = x.contiguous(), W.contiguous()
    out = x.new_empty(len(rows))
    if len(rows):
        _pair_products[(triton.cdiv(len(rows), 32),)](
            x, W, rows.contiguous(), latents.contiguous(), out, len(rows), x.shape[1], BLOCK_P=32, BLOCK_D=64
        )
    return out


def csr_decode(offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """`saekit.kernels.reference.csr_decode`. With pairs sorted by latent it is also the gradient of the weights."""
    W = W_dec.contiguous()
    n, d = len(offsets) - 1, W.shape[1]
    out = W.new_empty((n, d))
    if n:
        _weighted_sums[(n, triton.cdiv(d, 256))](
            offsets.contiguous(), indices.contiguous(), values.to(W.dtype).contiguous(), W, out, d, BLOCK_D=256
        )
    return out
