"""Plain torch kernels: the definition that every faster path is compared with, and the fallback everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 32 * 2**20
"""Upper bound in bytes for one dense block of pre-activations; no dense ``[rows, n_latents]`` array is larger."""

CUDA_PART = 64
"""A block takes at most one part in so many of the memory of a CUDA device, where products of few rows leave most of
the processors idle: 1.3 GB of 80, which is 2,500 rows of 131,072 latents."""


def block_bytes_on(device: torch.device) -> int:
    """Return the upper bound in bytes for one dense block of pre-activations on a device.

    On a CUDA device from all of its memory, not from what is free: a product of other blocks has other bits, and a run
    that is continued must have the bits of one that was not interrupted.
    """
    if device.type != "cuda":
        return BLOCK_BYTES
    return max(BLOCK_BYTES, torch.cuda.get_device_properties(device).total_memory // CUDA_PART)


def block_rows_for(n_latents: int, device: torch.device, *, bytes_per_value: int = 4) -> int:
    """Return the rows of one block (at least 1): dense ``[rows, n_latents]`` stays within `block_bytes_on`."""
    return max(1, block_bytes_on(device) // (n_latents * bytes_per_value))


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, rank: Tensor | None = None, block_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the `k` largest pre-activations of each row: ``pre = x @ W_enc.T + b_enc``, then ReLU on those kept.

    Parameters
    ----------
    x
        Centred rows, ``[n, d_in]``.
    W_enc, b_enc
        Encoder, ``[n_latents, d_in]`` and ``[n_latents]``.
    k
        Latents kept per row, 1 to n_latents.
    rank
        Positive weights ``[n_latents]``: chosen by ``pre * rank``, the codes stay ``pre``. None: by ``pre``.
    block_rows
        Rows per dense block; None picks `block_rows_for`.

    Returns
    -------
    values : Tensor ``[n, k]``
        Codes, zero where the pre-activation kept was not positive (such a latent has not fired).
    indices : Tensor ``[n, k]`` int64
        Latent of each value; the order within a row is descending in the ranked value.
    """
    key = (lambda pre: pre) if rank is None else (lambda pre: pre * rank)
    values, indices = _largest_by(key, x, W_enc, b_enc, k, block_rows)
    return values.relu_(), indices


def magnitude_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, block_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the `k` pre-activations of each row that are largest by magnitude, with their sign; the largest first.

    See `topk_encode` for the parameters.

    Returns
    -------
    values, indices : Tensor ``[n, k]``
        Codes of either sign, and the latent of each.
    """
    return _largest_by(torch.abs, x, W_enc, b_enc, k, block_rows)


def _largest_by(
    key: Callable[[Tensor], Tensor], x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, block_rows: int | None
) -> tuple[Tensor, Tensor]:
    """Return the `k` pre-activations of each row whose keys are largest, and their latents, block by block."""
    block_rows = block_rows or block_rows_for(W_enc.shape[0], x.device)
    values = x.new_empty((x.shape[0], k))
    indices = torch.empty((x.shape[0], k), dtype=torch.int64, device=x.device)
    for start in range(0, x.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        pre = torch.addmm(b_enc, x[rows], W_enc.T)  # [block, n_latents]
        chosen = key(pre).topk(k, dim=-1).indices
        values[rows], indices[rows] = pre.gather(1, chosen), chosen
    return values, indices


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, *, block_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all pre-activations above a threshold: ``pre = x @ W_enc.T + b_enc`` where ``pre > max(threshold, 0)``.

    Parameters
    ----------
    x
        Centred rows, ``[n, d_in]``.
    W_enc, b_enc
        Encoder, ``[n_latents, d_in]`` and ``[n_latents]``.
    threshold
        ``[n_latents]``; None for 0, which is ReLU.
    block_rows
        Rows per dense block; None picks `block_rows_for`.

    Returns
    -------
    offsets, indices, values : Tensor
        Compressed sparse rows: ``[n + 1]`` int64, ``[nnz]`` int64, ``[nnz]``.
    """
    counts, indices, values = [], [], []
    for block in x.split(block_rows or block_rows_for(W_enc.shape[0], x.device)) if len(x) else (x,):
        pre = torch.addmm(b_enc, block, W_enc.T).relu()
        if threshold is not None:
            pre = pre * (pre > threshold)
        rows, latents = pre.nonzero(as_tuple=True)
        counts.append(torch.bincount(rows, minlength=len(block)))
        indices.append(latents)
        values.append(pre[rows, latents])
    offsets = torch.cat([counts[0].new_zeros(1), torch.cat(counts).cumsum(0)])
    return offsets, torch.cat(indices), torch.cat(values)


def csr_decode(offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """Return the sum of decoder rows weighted by codes, ``[n, d_out]``: row r sums over ``offsets[r]:offsets[r + 1]``.

    Parameters
    ----------
    offsets, indices, values
        Compressed sparse rows: ``[n + 1]`` int64, ``[nnz]`` int64, ``[nnz]``.
    W_dec
        Decoder, ``[n_latents, d_out]``; the codes are taken in its dtype.
    """
    if not len(indices):
        return W_dec.new_zeros((len(offsets) - 1, W_dec.shape[1]))
    weights = values.to(W_dec.dtype)
    return F.embedding_bag(indices, W_dec, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
