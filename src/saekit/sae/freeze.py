"""Training-only rules become rules that work row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .finite import as_tensor
from .model import SAE
from .rules import JumpReLURule

CALIBRATED_NUMBERS = 2**24
"""Pre-activations that a threshold is found from, at most."""


def freeze_batchtopk(sae: SAE, threshold: float) -> SAE:
    """Return an SAE trained with BatchTopK as a JumpReLU SAE with one `threshold` for all latents.

    ``codes = relu(pre) * (pre > threshold)``. The threshold is the running mean of the smallest positive activation
    that BatchTopK kept (Bussmann et al., 2412.06410), in the units of the pre-activations.
    """
    return sae.replace(rule=JumpReLURule(torch.full_like(sae.b_enc, threshold)))


def calibrate_batchtopk(sae: SAE, x: Any, l0: float) -> SAE:
    """Return an SAE of BatchTopK whose file has no threshold, with the one at which `l0` latents fire per row.

    Parameters
    ----------
    sae
        The SAE with any rule, as ``SAE.load(address, k=64)`` gives it.
    x
        Rows ``[n, d_in]`` like those of the training; as many are used as fit into `CALIBRATED_NUMBERS`.
    l0
        Latents per row in training: its k.

    Returns
    -------
    SAE
        With a JumpReLU rule; ``provenance["calibrated"]`` says so.
    """
    rows = as_tensor(x, "calibrate_batchtopk").reshape(-1, sae.d_in)[: max(CALIBRATED_NUMBERS // sae.n_latents, 16)]
    threshold = threshold_for(sae.pre(rows), l0)
    known = {"threshold": threshold, "l0": float(l0), "n_rows": len(rows)}
    return freeze_batchtopk(sae, threshold).replace(provenance={**sae.provenance, "calibrated": known})


def threshold_for(pre: Tensor, l0: float) -> float:
    """Return the threshold, at least 0, that `l0` of the pre-activations ``[n, n_latents]`` per row exceed."""
    flat = pre.flatten().float()
    fired = min(round(l0 * len(pre)), len(flat))
    # Strictly more than the threshold fires, so it is the largest number that must not.
    below = len(flat) - fired
    return max(float(flat.kthvalue(below).values) if below else 0.0, 0.0)


def freeze_gated(
    *, W_gate: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor, W_dec: Tensor, b_dec: Tensor, **fields: Any
) -> SAE:
    """Return a Gated SAE as a JumpReLU SAE that computes the same codes.

    With ``g = u @ W_gate.T``, a gated unit is ``(g + b_gate > 0) * relu(exp(r_mag) * g + b_mag)``. Put
    ``W_enc = exp(r_mag) * W_gate`` and ``b_enc = b_mag``: then ``pre = exp(r_mag) * g + b_mag`` and the gate is open
    iff ``pre > b_mag - exp(r_mag) * b_gate``, so the threshold is ``max(0, b_mag - exp(r_mag) * b_gate)``.

    Parameters
    ----------
    W_gate
        ``[n_latents, d_in]``.
    b_gate, r_mag, b_mag
        ``[n_latents]``.
    W_dec, b_dec
        Decoder, ``[n_latents, d_out]`` and ``[d_out]``.
    **fields
        Further fields of `SAE` (b_pre, scaling, provenance, ...).
    """
    growth = r_mag.exp()
    threshold = (b_mag - growth * b_gate).clamp(min=0)
    return SAE(
        W_enc=growth[:, None] * W_gate, b_enc=b_mag, W_dec=W_dec, b_dec=b_dec, rule=JumpReLURule(threshold), **fields
    )
