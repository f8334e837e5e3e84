"""What a training step does with the kernels of either device: `kernel` is `saekit.kernels.cpu.ops` or `.gpu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu.onednn_linear import matmul
from .reference import Adam, StepOutcome, TopKSettings, block_rows_for


def revive(
    kernel: Any, x: Tensor, fit: Any, encoder: Any, W_dec: Tensor, dead: Tensor | None, settings: TopKSettings
) -> tuple[Any, tuple[Tensor, ...] | None]:
    """AuxK of the dead latents: the term of the loss, and its gradient as `gradients` wants it.

    With more dead latents than a row takes, this is a small TopK SAE of the dead latents and the residual, by the same
    sparse kernels; with fewer all of them are taken, and the products are dense. `encoder` is of no more use
    afterwards: its copy in fewer bits may be overwritten. How many latents are dead is read back from the device.

    Parameters
    ----------
    kernel
        Whose arrays these are.
    x
        Centred rows ``[n, d]``.
    fit
        Their reconstruction (`kernel.Fit`).
    encoder, W_dec
        The encoder (`kernel.Encoder`) and the decoder ``[n_latents, d]``.
    dead
        Latents that count as dead, ``[n_latents]`` bool; None for none.
    settings
        `k_aux`, `aux_coefficient` and `exact`.

    Returns
    -------
    aux : float or None
        ``aux_coefficient * V(x) * (mean ||e - e_hat||^2) / V(e)`` as in `reference.topk_step`; None when nothing is
        dead.
    revived : tuple or None
        Latents ``[m]`` int64 and the gradient of their decoder rows, encoder rows and biases.
    """
    if dead is None or not settings.k_aux or not settings.aux_coefficient:
        return None, None
    which = dead.nonzero()[:, 0]
    if not len(which):
        return None, None
    residual = fit.gradient * (-len(x) / 2)
    weights = {"W_enc": encoder.W[which], "W_dec": W_dec[which]}
    bias, zero = encoder.bias[which], torch.zeros_like(W_dec[0])
    weight = settings.aux_coefficient * float(kernel.variance(x)) / float(kernel.variance(residual))
    if len(which) <= settings.k_aux:
        error, *gradient = _fit_all(x, residual, weights["W_enc"], bias, weights["W_dec"], weight)
        return weight * error / len(x), (which, *gradient)
    pairs = kernel.topk_pairs_of_some(x, weights["W_enc"], bias, settings.k_aux, settings.exact)
    again = kernel.reconstruct(residual, pairs, pairs.values, weights["W_dec"], zero, weight, name="dead")
    g = kernel.gradients(
        x, zero, weights, pairs, pairs.values > 0, pairs.values, again.slopes, again.gradient, name="dead "
    )  # fmt: skip
    of_latents = (kernel.tensor(part) for part in (g.of_dec, g.of_enc, g.of_bias))
    return weight * again.error / len(x), (which, *of_latents)


def _fit_all(
    x: Tensor, e: Tensor, W_enc: Tensor, bias: Tensor, W_dec: Tensor, weight: float
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Fit `e` with all of these latents, a block of rows at a time: codes are as dense as the weights.

    Returns the sum of squares that is left, and the gradient of ``weight`` times its mean over rows by `W_dec`, `W_enc`
    and `bias`.
    """
    of_dec, of_enc, of_bias = torch.zeros_like(W_dec), torch.zeros_like(W_enc), torch.zeros_like(bias)
    left = 0.0
    block = min(block_rows_for(len(bias)), 1024)
    for start in range(0, len(x), block):
        part = slice(start, start + block)
        codes = matmul(x[part], W_enc.T).add_(bias).relu_()
        g = matmul(codes, W_dec).sub_(e[part])
        left += float(g.pow(2).sum(dtype=torch.float64))
        g *= 2 * weight / len(x)
        of_codes = matmul(g, W_dec.T).mul_(codes > 0)
        of_dec += matmul(codes.T, g)
        of_enc += matmul(of_codes.T, x[part])
        of_bias += of_codes.sum(0)
    return left, of_dec, of_enc, of_bias


def topk_step(
    kernel: Any,
    weights: dict[str, Tensor],
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    x: Tensor,
    offset: Tensor,
    settings: TopKSettings,
    adam: Adam,
    dead: Tensor | None = None,
) -> StepOutcome:
    """`saekit.kernels.reference.topk_step` with sparse products only; see there for all other arguments.

    Two passes over the latents: the first sums each latent's gradient from the rows that it fired in, because clipping
    needs the length of the whole gradient; the second projects, clips, applies Adam and restores unit length.
    """
    x, offset = x.detach().contiguous(), offset.detach().contiguous()
    W_dec = weights["W_dec"]
    encoder = kernel.encoder_at(weights["W_enc"], weights["b_enc"], offset, x)
    pairs = kernel.topk_pairs(x, encoder, settings.k, settings.exact)
    fit = kernel.reconstruct(x, pairs, pairs.values, W_dec, offset)
    aux, revived = revive(kernel, x, fit, encoder, W_dec, dead, settings)
    g = kernel.gradients(
        x, offset, weights, pairs, pairs.values > 0, pairs.values, fit.slopes, fit.gradient, revived=revived
    )  # fmt: skip
    others = {"b_dec": fit.columns + g.of_offset}
    norm = kernel.descend(weights, first, second, g, others, adam, clip=settings.clip, unit=True)
    fired = kernel.tensor(g.counts)
    aux = None if aux is None else float(aux)
    return StepOutcome(error=float(fit.error), aux=aux, fired=fired, n_fired=int(fired.sum()), grad_norm=float(norm))
