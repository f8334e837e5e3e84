"""Codes with a sign: the largest pre-activations by magnitude, from what finds the largest ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .step_interface import Array, Encoder, Pairs, StepKernels

Chosen = tuple[Tensor, Tensor]
"""Values and latents, ``[n, k]`` each."""


def larger_of_both(above: Chosen, below: Chosen, k: int) -> Chosen:
    """Return the `k` largest by magnitude among the largest of ``pre`` and of ``-pre``, the largest first.

    Exact: a code among the k largest by magnitude is among the k largest of its own sign.
    """
    values, indices = torch.cat([above[0], -below[0]], 1), torch.cat([above[1], below[1]], 1)
    chosen = values.abs().topk(k, dim=1).indices
    return values.gather(1, chosen), indices.gather(1, chosen)


def magnitude_pairs(kernel: StepKernels[Array], x: Tensor, encoder: Encoder, k: int) -> Pairs[Array]:
    """Return the pairs of the `k` largest of each row by magnitude, with their sign, the largest first."""
    opposite = Encoder(encoder.W, -encoder.bias, encoder.rounded)
    return _joined(kernel, kernel.topk_pairs(x, encoder, k), kernel.topk_pairs(-x, opposite, k), k)


def magnitude_pairs_of_some(kernel: StepKernels[Array], x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> Pairs[Array]:
    """Return `magnitude_pairs` among some latents; an `Encoder` loses its copy."""
    above = kernel.topk_pairs_of_some(x, W_enc, bias, k)
    return _joined(kernel, above, kernel.topk_pairs_of_some(-x, W_enc, -bias, k), k)


def _joined(kernel: StepKernels[Array], above: Pairs[Array], below: Pairs[Array], k: int) -> Pairs[Array]:
    def chosen(pairs: Pairs[Array]) -> Chosen:
        return kernel.tensor(pairs.values).view(-1, k), kernel.tensor(pairs.latents).view(-1, k)

    values, latents = larger_of_both(chosen(above), chosen(below), k)
    return kernel.even_pairs(kernel.numbers(values), kernel.numbers(latents))
