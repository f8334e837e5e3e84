"""Baselines: of an SAE an untrained one, one whose decoder was frozen, and PCA; of a transcoder affine maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sae.codes import Codes
from ..sae.freeze import CALIBRATED_NUMBERS, threshold_for
from ..sae.model import SAE
from ..sae.rules import GroupMaxRule, JumpReLURule, Rule, TopKRule
from .accumulators import double
from .linear import AffineMap
from .pca import PCA


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
    """Return an SAE of the same shape, rule, scaling and L0 that never saw a gradient, at its best scale.

    Encoder rows are random unit vectors about the mean row. The decoder is the same vectors times one factor, with a
    bias, both from least squares on `sample`: without the factor the reconstructions are far too long, and any SAE
    would look good. TopK keeps as many latents as `sae` uses, GroupMax its k; rules that look at one latent at a time
    get one threshold for all latents, set so that `l0` latents fire per row of `sample`.

    Parameters
    ----------
    sae
        The SAE to compare with; ``d_in = d_out``.
    mean
        ``[d]`` mean row.
    sample
        ``[m, d]`` rows for the threshold, the factor and the bias.
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
    return rescaled(blank.replace(rule=_rule_like(sae.rule, blank, sample, l0)), sample)


def rescaled(sae: SAE, sample: Tensor) -> SAE:
    """Return an SAE whose decoder is multiplied by the factor, and whose bias is the one, that fit rows best.

    They minimize ``sum_i ||x_i - undo(factor (x_hat_i - bias of the SAE) + bias)||^2`` in the units of the rows.
    """
    with torch.no_grad():
        _, context = sae.scaling.apply(sample)
        nothing = sae.scaling.undo(torch.zeros_like(sample), context)
        slope = double(sae.scaling.undo(torch.ones_like(sample), context) - nothing)
        silent = sae.replace(b_dec=torch.zeros_like(sae.b_dec))
        written = double(silent.reconstruct(sample) - nothing)
    wanted = double(sample - nothing)

    def bias_of(rows: Tensor) -> Tensor:
        """Return the bias that fits rows best by itself: a mean, weighted where every row has its own scale."""
        return (slope * rows).sum(0) / slope.square().sum(0)

    varied, rest = (rows - slope * bias_of(rows) for rows in (written, wanted))
    spread = float(varied.square().sum())
    factor = float((varied * rest).sum()) / spread if spread > 0 else 0.0
    return sae.replace(W_dec=sae.W_dec * factor, b_dec=bias_of(wanted - factor * written).to(sae.b_dec))


def latents_used(l0: float, n_latents: int) -> int:
    """Return the k of a TopK rule that uses `l0` latents per row."""
    return max(1, min(round(l0), n_latents))


def _rule_like(rule: Rule, blank: SAE, sample: Tensor, l0: float) -> Rule:
    """Return the same rule, without what it learned; as many latents fire."""
    if isinstance(rule, TopKRule):
        return TopKRule(latents_used(l0, blank.n_latents), sign=rule.sign)
    if isinstance(rule, GroupMaxRule):
        return GroupMaxRule(rule.k, rule.group)
    rows = sample[: max(CALIBRATED_NUMBERS // blank.n_latents, 16)]
    threshold = threshold_for(blank.pre(rows), l0)
    return JumpReLURule(torch.full((blank.n_latents,), threshold, dtype=blank.dtype, device=blank.device))
