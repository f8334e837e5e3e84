"""Where training starts: the centre and the scale of the rows, and first weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FIRST_ROWS = 100_000
"""Rows from which centre and scale are computed, at most. Unit: rows."""

FIRST_BYTES = 512 * 2**20
"""Memory that these rows may take (float32); wide rows are fewer. Unit: bytes."""

MEDIAN_ROWS = 16_384
"""Rows (evenly spaced among the first ones) that the geometric median is computed from. Unit: rows."""

SAMPLE_ROWS = 2_048
"""Rows that first thresholds are fitted on. Unit: rows."""

BLOCK_BYTES = 16 * 2**20
"""Pre-activations that `level_of` computes at a time. Unit: bytes."""


def first_rows(total_rows: int, d_in: int) -> int:
    """How many rows the start of a run is computed from."""
    return min(FIRST_ROWS, total_rows, max(FIRST_BYTES // (4 * d_in), 1))


def geometric_median(x: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 200) -> Tensor:
    """The point that minimizes ``sum_i ||x_i - m||``, by Weiszfeld's iteration from the mean.

    Parameters
    ----------
    x
        Rows ``[n, d]``.
    tolerance
        Stop when the point moves by less than this fraction of the rows' mean distance from it.
    max_iterations
        Stop after this many in any case.

    Returns
    -------
    Tensor
        ``[d]``. Unlike the mean it does not follow a few far rows.
    """
    median = x.mean(0)
    for _ in range(max_iterations):
        distance = (x - median).norm(dim=1)
        typical = distance.mean()
        # A row at the point itself would get infinite weight.
        weight = 1 / distance.clamp(min=1e-6 * float(typical) + 1e-30)
        following = (weight @ x) / weight.sum()
        moved = (following - median).norm()
        median = following
        if float(moved) <= tolerance * float(typical):
            break
    return median


def start_bias(x: Tensor, kind: str) -> Tensor:
    """First `b_dec` ``[d]`` in the units of the rows: ``geometric-median``, ``mean`` or ``zero``."""
    if kind == "zero":
        return torch.zeros(x.shape[1])
    if kind == "mean":
        return x.double().mean(0).float()
    stride = -(-len(x) // MEDIAN_ROWS)
    return geometric_median(x[::stride])


def start_scale(x: Tensor, kind: str) -> Tensor | None:
    """The factor ``[]`` that gives rows a mean norm of ``sqrt(d_in)``; None for ``none``; 1 for rows that are all
    zero.
    """
    if kind == "none":
        return None
    norm = x.norm(dim=1).double().mean().float()
    return torch.where(norm > 0, x.shape[1] ** 0.5 / norm, torch.ones(()))


def first_weights(latents: int, d_in: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Decoder rows uniform on the unit sphere; the encoder starts as a copy of the decoder (in memory of its own);
    zero bias.
    """
    W_dec = torch.randn(latents, d_in, generator=generator)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return {"W_enc": W_dec.clone(), "b_enc": torch.zeros(latents), "W_dec": W_dec}


def level_of(x: Tensor, W_enc: Tensor, bias: Tensor, l0: float) -> Tensor:
    """The value ``[]`` that `l0` pre-activations of a row reach on average, the largest such value.

    Works on a block of rows at a time and keeps ``l0 * n`` values.

    Parameters
    ----------
    x
        Centred rows ``[n, d]``, at least one.
    W_enc, bias
        Encoder ``[n_latents, d]`` and ``[n_latents]``.
    l0
        0 to n_latents; ``l0 * n`` is rounded, and at least 1.
    """
    wanted = min(max(round(l0 * len(x)), 1), len(x) * len(bias))
    block = max(1, BLOCK_BYTES // (4 * len(bias)))
    largest = bias.new_empty(0)
    for rows in x.split(block):
        found = torch.addmm(bias, rows, W_enc.T).flatten()
        if len(largest) == wanted:
            found = found[found > largest.min()]
        largest = torch.cat([largest, found])
        if len(largest) > wanted:
            largest = largest.topk(wanted, sorted=False).values
    return largest.min()


def gather_first(batches: Iterable[Any], wanted: int) -> tuple[list[Any], Tensor]:
    """Whole batches until `wanted` rows are there, and those rows ``[wanted or fewer, d]`` on the CPU."""
    head: list[Any] = []
    have = 0
    for batch in batches:
        head.append(batch)
        have += len(batch.x)
        if have >= wanted:
            break
    return head, torch.cat([batch.x for batch in head])[:wanted].float().cpu()
