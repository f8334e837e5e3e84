"""Which kernel runs: the compiled loops where they can and pay, plain torch everywhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import backend, reference
from .magnitude import larger_of_both
from .step_interface import StepKernels

FEWEST_ROWS = 32
"""Minimum rows of the fast encoders under `auto`: with fewer, rounding all latents costs more than it saves."""

FEWEST_LATENTS = 512
"""Minimum latents of the fast kernels under `auto`: with fewer, a dense product takes no longer than the search."""

LARGEST_FRACTION = 1 / 8
"""Maximum fraction of the latents that are kept under `auto`: with more, most of them would be multiplied again."""


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
    """Return the `k` largest pre-activations of each row, after ReLU: ``values, indices``, both ``[n, k]``.

    See `saekit.kernels.reference.topk_encode` for both and for the other parameters; each latent is there once per
    row.

    Parameters
    ----------
    exact
        True: the codes of the fp32 product, whichever kernel runs. False: a kernel may choose latents in bf16.
    """
    worth = len(x) >= FEWEST_ROWS and _worth(W_enc, k)
    if rank is None and _runs([x, W_enc, b_enc], worth) and not _differentiated(x, W_enc, b_enc):
        from .cpu import encode

        return encode.topk_encode(x, W_enc, b_enc, k, block_rows=block_rows, exact=exact)
    if rank is None and worth and _runs_on_gpu(x, W_enc, b_enc) and not _differentiated(x, W_enc, b_enc):
        from .cuda import ops

        return ops.topk_encode(x, W_enc, b_enc, k, block_rows=block_rows, exact=exact)
    return reference.topk_encode(x, W_enc, b_enc, k, rank=rank, block_rows=block_rows)


def magnitude_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, block_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the `k` pre-activations of each row that are largest by magnitude: ``values, indices``, both ``[n, k]``.

    See `saekit.kernels.reference.magnitude_encode`. Where a fast kernel runs, from the k largest of ``pre`` and of
    ``-pre``: a latent may then be there a second time, with the value 0, in a row with fewer than k that are not 0.
    """
    worth = len(x) >= FEWEST_ROWS and _worth(W_enc, k)
    fast = _runs([x, W_enc, b_enc], worth) or (worth and _runs_on_gpu(x, W_enc, b_enc))
    if not fast or _differentiated(x, W_enc, b_enc):
        return reference.magnitude_encode(x, W_enc, b_enc, k, block_rows=block_rows)
    above = topk_encode(x, W_enc, b_enc, k, block_rows=block_rows)
    below = topk_encode(-x, W_enc, -b_enc, k, block_rows=block_rows)
    return larger_of_both(above, below, k)


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | None,
    *,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all pre-activations above a threshold, as compressed sparse rows: ``offsets, indices, values``.

    See `saekit.kernels.reference.threshold_encode`; the order within a row has no meaning.
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
    """Return the sum of decoder rows weighted by codes; see `saekit.kernels.reference.csr_decode`."""
    # On a CPU, torch's own loop is as fast as memory.
    if _runs_on_gpu(values, W_dec) and not _differentiated(values, W_dec):
        from .cuda import ops

        return ops.csr_decode(offsets, indices, values, W_dec)
    return reference.csr_decode(offsets, indices, values, W_dec)


def step_kernels(device: torch.device) -> StepKernels[Any] | None:
    """Return `saekit.kernels.cpu.ops` or `saekit.kernels.cuda.ops`: what a fused step on this device is made of.

    None where plain torch has to do: by `use`, or because there are no such kernels for the device.
    """
    # Imported here: numba takes half a second, and most programs never train.
    if device.type == "cpu" and backend.fast_here("step"):
        from .cpu import ops as on_cpu

        kernels: StepKernels[np.ndarray] = on_cpu
        return kernels
    if device.type == "cuda" and backend.triton_runs("step", device):
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
    return W_enc.shape[0] >= FEWEST_LATENTS and k <= LARGEST_FRACTION * W_enc.shape[0]


def _runs(tensors: list[Tensor], worth: bool) -> bool:
    """Return whether the compiled loops take these tensors: float32 on the CPU, and the switch allows it."""
    possible = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return possible and (worth or backend.mode() == "fast") and backend.fast_here("encode")


def _runs_on_gpu(*tensors: Tensor) -> bool:
    """Return whether the Triton kernels take these tensors: float32 on a CUDA device, and the switch allows it."""
    possible = all(t.is_cuda and t.dtype == torch.float32 for t in tensors)
    return possible and backend.triton_runs("encode", tensors[0].device)


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
