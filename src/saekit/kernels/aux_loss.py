"""AuxK: the reconstruction error of a step, explained by latents that have not fired for long.

Gao et al. 2024, arXiv:2406.04093, appendix A.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .cpu.onednn_linear import matmul
from .magnitude import magnitude_pairs_of_some
from .reference import block_rows_for
from .step_interface import Array, Encoder, Fit, Revived, Scalar, StepKernels, Terms

DENSE_ROWS = 1024
"""Maximum rows of a dense block in `_fit_all`: more do not make its products faster, and codes are as dense as that."""


@dataclass(frozen=True)
class AuxK:
    """Settings of AuxK."""

    k: int = 0
    """Dead latents per row; 0 switches it off."""
    coefficient: float = 1 / 32
    """Weight in units of the variance of the rows; 0 switches it off."""
    signed: bool = False
    """Whether codes have a sign: chosen by magnitude, without ReLU."""


def revive(
    kernel: StepKernels[Array],
    x: Tensor,
    fit: Fit[Array],
    encoder: Encoder,
    W_dec: Tensor,
    dead: Tensor | None,
    settings: AuxK,
) -> tuple[Scalar | None, Revived | None]:
    """Return AuxK of the dead latents: the term of the loss, and its gradient as `gradients` takes it.

    With more dead latents than a row takes, this is a small TopK SAE of the dead latents and the residual, by the same
    sparse kernels; with fewer all of them are taken, and the products are dense. `encoder` is of no more use
    afterwards: its copy in fewer bits may be overwritten. How many latents are dead is read back from the device.

    Parameters
    ----------
    kernel
        Kernels of the device.
    x
        Centred rows ``[n, d]``.
    fit
        Their reconstruction.
    encoder, W_dec
        The encoder and the decoder ``[n_latents, d]``.
    dead
        Latents that count as dead, ``[n_latents]`` bool; None for none.
    settings
        Number of latents and weight.

    Returns
    -------
    aux : Scalar or None
        ``coefficient * V(x) * (mean ||e - e_hat||^2) / V(e)`` with the residual e, its reconstruction e_hat and
        ``V(x) = mean ||x - mean x||^2``, a constant; None when nothing is dead.
    revived : tuple or None
        Latents ``[m]`` int64 and the gradient of their decoder rows, encoder rows and biases.
    """
    if dead is None or not settings.k or not settings.coefficient:
        return None, None
    which = dead.nonzero()[:, 0]
    if not len(which):
        return None, None
    residual = fit.gradient * (-len(x) / 2)
    weights = {"W_enc": encoder.W[which], "W_dec": W_dec[which]}
    bias, zero = encoder.bias[which], torch.zeros_like(W_dec[0])
    weight = settings.coefficient * float(kernel.variance(x)) / float(kernel.variance(residual))
    if len(which) <= settings.k:
        of = weights["W_enc"], bias, weights["W_dec"]
        error, of_dec, of_enc, of_bias = _fit_all(x, residual, of, weight, settings.signed)
        return weight * error / len(x), (which, of_dec, of_enc, of_bias)
    choose = partial(magnitude_pairs_of_some, kernel) if settings.signed else kernel.topk_pairs_of_some
    pairs = choose(x, weights["W_enc"], bias, settings.k)
    again = kernel.reconstruct(residual, pairs, pairs.values, weights["W_dec"], zero, weight, name="dead")
    terms = Terms(pairs, pairs.values != 0, pairs.values, again.slopes, again.gradient)
    # Not in the memory of the gradients that these are added to.
    g = kernel.filled(kernel.gradients(x, zero, weights, terms, name="dead "))
    revived = which, kernel.tensor(g.of_dec), kernel.tensor(g.of_enc), kernel.tensor(g.of_bias)
    return weight * again.error / len(x), revived


def _fit_all(
    x: Tensor, e: Tensor, weights: tuple[Tensor, Tensor, Tensor], weight: float, signed: bool
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Fit `e` with all of these latents, a block of rows at a time: codes are as dense as the weights.

    Returns the sum of squares that is left, and the gradient of ``weight`` times its mean over rows by `W_dec`, `W_enc`
    and `bias`.
    """
    W_enc, bias, W_dec = weights
    of_dec, of_enc, of_bias = torch.zeros_like(W_dec), torch.zeros_like(W_enc), torch.zeros_like(bias)
    left = 0.0
    block = min(block_rows_for(len(bias), x.device), DENSE_ROWS)
    for start in range(0, len(x), block):
        part = slice(start, start + block)
        codes = matmul(x[part], W_enc.T).add_(bias)
        codes = codes if signed else codes.relu_()
        g = matmul(codes, W_dec).sub_(e[part])
        left += float(g.pow(2).sum(dtype=torch.float64))
        g *= 2 * weight / len(x)
        of_codes = matmul(g, W_dec.T).mul_(codes != 0)
        of_dec += matmul(codes.T, g)
        of_enc += matmul(of_codes.T, x[part])
        of_bias += of_codes.sum(0)
    return left, of_dec, of_enc, of_bias
