"""Baselines: of an SAE an untrained one, one whose decoder was frozen, and PCA; of a transcoder affine maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.rules import GroupMaxRule, JumpReLURule, Rule, TopKRule
from .linear import AffineMap
from .pca import PCA

CALIBRATED_NUMBERS = 2**24
"""Pre-activations that the threshold of an untrained SAE is found from, at most."""


@dataclass(frozen=True)
class Reconstructor:
    """Anything that reconstructs rows: an SAE or a control.

    Parameters
    ----------
    name
        What tables call it.
    forward
        Rows ``[n, d]`` to their reconstructions (a transcoder: its predictions) and, where there are any, their codes.
    sae
        The SAE behind it; None for PCA and affine maps.
    about
        How it was made; JSON-able.
    l0
        Latents per row where that is fixed by construction (PCA, affine maps).
    """

    name: str
    forward: Callable[[Tensor], tuple[Tensor, Codes | None]]
    sae: SAE | None = None
    about: dict[str, Any] = field(default_factory=dict)
    l0: int | None = None


def reconstructor_of(name: str, sae: SAE, about: dict[str, Any] | None = None) -> Reconstructor:
    """Return an SAE as a reconstructor; it encodes sparsely and answers on the device and in the dtype of the rows."""

    def forward(x: Tensor) -> tuple[Tensor, Codes]:
        with torch.no_grad():
            codes = sae.encode(x)
            return sae.decode(codes, x.to(sae.device, sae.dtype)).to(x.device, x.dtype), codes

    return Reconstructor(name, forward, sae, about or {})


def pca_reconstructor(pca: PCA, about: dict[str, Any]) -> Reconstructor:
    """Return principal components as a reconstructor."""
    k = len(pca.components)
    return Reconstructor("pca", lambda x: (pca.reconstruct(x).to(x.dtype), None), None, {"k": k, **about}, k)


def affine_reconstructor(name: str, found: AffineMap, about: dict[str, Any]) -> Reconstructor:
    """Return the best affine map of a rank as a reconstructor."""
    k = len(found.decoder)
    return Reconstructor(name, lambda x: (found.predict(x).to(x.dtype), None), None, {"k": k, **about}, k)


def untrained_like(sae: SAE, mean: Tensor, sample: Tensor, l0: float, seed: int) -> SAE:
    """Return an SAE of the same shape, rule and scaling that never saw a gradient.

    Decoder rows are random unit vectors, the encoder equals the decoder, and both biases are the mean row. TopK and
    GroupMax keep their k; rules that look at one latent at a time get one threshold for all latents, set so that
    `l0` latents fire per row of `sample`.

    Parameters
    ----------
    sae
        The SAE to compare with; ``d_in = d_out``.
    mean
        ``[d]`` mean row.
    sample
        ``[m, d]`` rows for the threshold.
    l0
        Latents per row that `sae` uses.
    seed
        Random seed of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(sae.n_latents, sae.d_in, generator=generator).to(sae.device, sae.dtype)
    W = W / W.norm(dim=1, keepdim=True)
    sample, mean = (t.to(sae.device, sae.dtype) for t in (sample, mean))
    if sae.scaling.per_row:  # not affine: the mean of scaled rows is not the scaled mean row
        centre = sae.scaling.apply(sample)[0].mean(0)
    else:
        centre = sae.scaling.apply(mean[None])[0][0]
    same: dict[str, Any] = {
        "b_enc": torch.zeros_like(sae.b_enc),
        "b_pre": centre,
        "b_dec": centre,
        "W_skip": None,
        "provenance": {},
    }
    threshold = W.new_zeros(sae.n_latents)
    blank = sae.replace(W_enc=W, W_dec=W, rule=JumpReLURule(threshold), **same)
    return blank.replace(rule=_rule_like(sae.rule, blank, sample, l0))


def _rule_like(rule: Rule, blank: SAE, sample: Tensor, l0: float) -> Rule:
    """Return the same rule, without what it learned."""
    if isinstance(rule, TopKRule):
        return TopKRule(rule.k, sign=rule.sign)
    if isinstance(rule, GroupMaxRule):
        return GroupMaxRule(rule.k, rule.group)
    rows = sample[: max(CALIBRATED_NUMBERS // blank.n_latents, 16)]
    pre = blank.pre(rows).flatten().float()
    fired = min(round(l0 * len(rows)), len(pre))
    # Strictly more than the threshold fires, so it is the largest number that must stay silent.
    silent = len(pre) - fired
    threshold = float(pre.kthvalue(silent).values) if silent else 0.0
    return JumpReLURule(torch.full((blank.n_latents,), max(threshold, 0.0), dtype=blank.dtype, device=blank.device))
