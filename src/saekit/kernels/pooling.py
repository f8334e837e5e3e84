"""Pooling of sparse codes: rows of a segment (the tokens of a text, the patches of an image) become one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pooled:
    """Segments as compressed sparse rows, latents ascending; one support, several numbers on it."""

    offsets: Tensor
    """``[n_segments + 1]`` int64."""
    indices: Tensor
    """``[nnz]`` int64: latents that fired in some row of the segment."""
    sum: Tensor
    """``[nnz]`` float32: sum of the codes over the rows, added in float64."""
    max: Tensor
    """``[nnz]`` float32: largest code that is stored, by magnitude where codes are signed."""
    min: Tensor
    """``[nnz]`` float32: smallest code that is stored."""
    count: Tensor
    """``[nnz]`` float32: rows in which the latent is stored."""


def pool_segments(offsets: Tensor, indices: Tensor, values: Tensor, lengths: Tensor, n_latents: int) -> Pooled:
    """Reduce consecutive rows of codes to one row per segment.

    ::

        sum[s, j]   = Σ_{r in s} z[r, j]
        max[s, j]   = the z[r, j] of largest magnitude, r in s   (without negative codes: the largest)
        min[s, j]   = min_{r in s, z[r, j] stored} z[r, j]
        count[s, j] = |{r in s: z[r, j] stored}|

    Works on the stored codes alone: time O(nnz log nnz), memory O(nnz), never ``[n_rows, n_latents]``.

    Parameters
    ----------
    offsets, indices, values
        Codes as compressed sparse rows, ``[n_rows + 1]``, ``[nnz]``, ``[nnz]``; any order within a row.
    lengths
        Rows in each segment, ``[n_segments]`` int64, their sum ``n_rows``; zero is allowed.
    n_latents
        Number of latents.
    """
    n_segments = len(lengths)
    device = indices.device
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    per_segment = offsets[ends].diff()  # stored codes in each segment
    key = torch.repeat_interleave(torch.arange(n_segments, device=device) * n_latents, per_segment) + indices
    # stable: a latent's codes stay in the order of the rows, so that a sum does not depend on other latents
    key, order = key.sort(stable=True)
    key, count = torch.unique_consecutive(key, return_counts=True)
    row = key // max(n_latents, 1)
    found = torch.cat([lengths.new_zeros(1), torch.bincount(row, minlength=n_segments).cumsum(0)])
    if not len(key):
        none = torch.zeros(0, device=device)
        return Pooled(found, key, none, none, none, none)
    z = values[order]
    total = torch.segment_reduce(z.double(), "sum", lengths=count).float()
    largest = torch.segment_reduce(z.float(), "max", lengths=count)
    smallest = torch.segment_reduce(z.float(), "min", lengths=count)
    largest = torch.where(-smallest > largest, smallest, largest)
    return Pooled(found, key - row * n_latents, total, largest, smallest, count.float())


def largest_of_rows(offsets: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Return the rank of each stored code in its row, from 0 for the largest by magnitude: ``[nnz]`` int64.

    Equal codes are ranked by latent, lowest first, so that the first n of a row are always the same n.
    """
    row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=indices.device), offsets.diff())
    order = indices.argsort(stable=True)  # from the last key to the first: each sort keeps the order of the one before
    order = order[values[order].abs().argsort(stable=True, descending=True)]
    order = order[row[order].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - offsets[:-1][row[order]]
    return rank
