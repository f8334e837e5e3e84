"""Which kernel runs: the compiled loops where they can and pay, plain torch everywhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import backend, reference
from .step_interface import StepKernels

FEWEST_ROWS = 32
"""Below this many rows `auto` stays plain; also below `FEWEST_LATENTS` and above `LARGEST_SHARE` of them kept."""
FEWEST_LATENTS = 512
LARGEST_SHARE = 1 / 8


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    rank: Tensor | None = None,
    block_rows: int | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """The `k` largest pre-activations of each row: ``pre = x @ W_enc.T + b_enc``, then ReLU on those kept.

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
        Rows per dense block; None lets the kernel pick.
    exact
        True: the codes of the fp32 product, whichever kernel runs. False: a kernel may choose latents in bf16.

    Returns
    -------
    values : Tensor ``[n, k]``
        Codes, zero where the pre-activation kept was not positive (such a latent has not fired).
    indices : Tensor ``[n, k]`` int64
        Latent of each value, each once per row; the order within a row is descending in the ranked value.
    """
    worth = len(x) >= FEWEST_ROWS and _worth(W_enc, k)
    if rank is None and _runs([x, W_enc, b_enc], worth) and not _differentiated(x, W_enc, b_enc):
        from .cpu import encode

        return encode.topk_encode(x, W_enc, b_enc, k, block_rows=block_rows, exact=exact)
    if rank is None and worth and _runs_on_gpu(x, W_enc, b_enc) and not _differentiated(x, W_enc, b_enc):
        from .cuda import ops

        return ops.topk_encode(x, W_enc, b_enc, k, block_rows=block_rows, exact=exact)
    return reference.topk_encode(x, W_enc, b_enc, k, rank=rank, block_rows=block_rows)


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | None,
    *,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All pre-activations above a threshold: ``pre = x @ W_enc.T + b_enc`` where ``pre > max(threshold, 0)``.

    Parameters
    ----------
    x
        Centred rows, ``[n, d_in]``.
    W_enc, b_enc
        Encoder, ``[n_latents, d_in]`` and ``[n_latents]``.
    threshold
        ``[n_latents]``; None for 0, which is ReLU.
    block_rows
        Rows per dense block; None lets the kernel pick.

    Returns
    -------
    offsets, indices, values : Tensor
        Compressed sparse rows: ``[n + 1]`` int64, ``[nnz]`` int64, ``[nnz]``; the order within a row has no meaning.
    """
    tensors = [x, W_enc, b_enc] if threshold is None else [x, W_enc, b_enc, threshold]
    worth = len(x) >= FEWEST_ROWS and _worth(W_enc, 1)
    if _runs(tensors, worth) and not _differentiated(*tensors):
        from .cpu import encode

        return encode.threshold_encode(x, W_enc, b_enc, threshold, block_rows=block_rows)
    if worth and _runs_on_gpu(*tensors) and not _differentiated(*tensors):
        from .cuda import ops

        return ops.threshold_encode(x, W_enc, b_enc, threshold, block_rows=block_rows)
    return reference.threshold_encode(x, W_enc, b_enc, threshold, block_rows=block_rows)


def csr_decode(offsets: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """Sum of decoder rows weighted by codes, ``[n, d_out]``: row r sums over ``offsets[r]:offsets[r + 1]``.

    Parameters
    ----------
    offsets, indices, values
        Compressed sparse rows: ``[n + 1]`` int64, ``[nnz]`` int64, ``[nnz]``.
    W_dec
        Decoder, ``[n_latents, d_out]``; the codes are taken in its dtype.
    """
    if _runs_on_gpu(values, W_dec) and not _differentiated(values, W_dec):
        from .cuda import ops

        return ops.csr_decode(offsets, indices, values, W_dec)
    return reference.csr_decode(offsets, indices, values, W_dec)


def step_kernels(device: torch.device) -> StepKernels[Any] | None:
    """Return `saekit.kernels.cpu.ops` or `saekit.kernels.cuda.ops`: what a fused step on this device is made of.

    None where plain torch has to do: by `use`, or because there are no such kernels for the device.
    """
    # Imported here: numba takes half a second, and most programs never train.
    if device.type == "cpu" and backend.fast_here():
        from .cpu import ops as on_cpu

        kernels: StepKernels[np.ndarray] = on_cpu
        return kernels
    if device.type == "cuda" and backend.mode() == "fast" and backend.triton_here():  # see `_runs_on_gpu`
        from .cuda import ops as on_cuda

        of_tensors: StepKernels[Tensor] = on_cuda
        return of_tensors
    return None


def step_pays(weights: dict[str, Tensor], k: int) -> bool:
    """Return whether `step_kernels` take these weights and are faster (where not, train in plain torch).

    Parameters
    ----------
    weights
        Every trained weight by name.
    k
        Codes per row, about.
    """
    W = weights["W_enc"]
    fits = all(t.dtype == torch.float32 and t.is_contiguous() and t.device == W.device for t in weights.values())
    return fits and (_worth(W, k) or backend.mode() == "fast") and step_kernels(W.device) is not None


def _worth(W_enc: Tensor, k: int) -> bool:
    return W_enc.shape[0] >= FEWEST_LATENTS and k <= LARGEST_SHARE * W_enc.shape[0]


def _runs(tensors: list[Tensor], worth: bool) -> bool:
    """Whether the compiled loops take these tensors: float32 on the CPU, and the switch allows it."""
    possible = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return possible and (worth or backend.mode() == "fast") and backend.fast_here()


def _runs_on_gpu(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these tensors: float32 on a CUDA device, and the switch asks for them.

    Triton's interpreter has run them and its compiler has compiled them, no GPU yet: `auto` stays with plain torch.
    """
    possible = all(t.is_cuda and t.dtype == torch.float32 for t in tensors)
    return possible and backend.mode() == "fast" and backend.triton_here()


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
