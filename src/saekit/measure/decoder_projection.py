"""How far rows lie along the decoder rows of an SAE: a number that is lowest where its L0 is right.

Too few latents per row make each latent a mixture of features that fire together, too many make it a mixture of
whatever else helps: rows then project onto decoder rows of features that are not in them (2508.16560). Where every
decoder row is one feature, most projections are small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..sae.model import SAE
from .intervals import Estimate, Sample
from .reconstruction import Measurement

NAME = "decoder_projection"
"""What the metric is called."""

QUARTER = 0.25
"""Fraction of the projections that lie above it: the paper's N-th largest per row, with N = n_latents / 4 (it asks for
an N above the right L0 and below half of the latents)."""

MOST_LATENTS = 4096
"""Latents whose decoder rows are used; of wider SAEs a sample, evenly spaced."""

PARTS = 20
"""Runs of consecutive rows that are left out in turn for the interval."""


def with_projections(found: Measurement, saes: Sequence[SAE | None], rows: Tensor, *, intervals: bool) -> Measurement:
    """Return what was measured with the projections of rows ``[n, d_in]`` onto the decoder rows of each SAE.

    None, and transcoders, whose decoder rows lie among other rows, have no such number.
    """
    at = [index for index, sae in enumerate(saes) if sae is not None and not sae.is_transcoder]
    each = projections([saes[index] for index in at], rows, intervals=intervals)  # type: ignore[misc]
    known = dict(zip(at, each))
    estimates = [
        estimate | ({NAME: known[index]} if index in known else {}) for index, estimate in enumerate(found.estimates)
    ]
    return replace(found, estimates=estimates)


def projections(saes: Sequence[SAE], rows: Tensor, *, intervals: bool = True) -> list[Estimate]:
    """Return for each SAE the level that a quarter of the projections of rows onto its decoder rows exceed.

    The projections are ``(u - mean(u)) . d_j / (|d_j| r)`` over all rows and latents, with u a scaled row and r the
    root mean square of ``|u - mean(u)|``. The paper subtracts `b_dec`; the mean row does not depend on the SAE, so that
    SAEs whose biases differ stay comparable. Where codes have signs they are absolute. Numbers of SAEs of the same
    width on the same rows can be compared, no others.

    Parameters
    ----------
    saes
        SAEs of the width of the rows; no transcoders.
    rows
        ``[n, d_in]``.
    intervals
        Whether to compute them: a jackknife over 20 runs of consecutive rows, the same for all SAEs.
    """
    count = min(PARTS, len(rows))
    edges = [round(part * len(rows) / count) for part in range(count + 1)]
    sizes = np.diff(edges)
    reason = f"interval from {count} runs of consecutive rows"
    sample = Sample.over(sizes, intervals=intervals, reason=reason)
    return [_projection(sae, rows, edges, sample) for sae in saes]


def _projection(sae: SAE, rows: Tensor, edges: Sequence[int], sample: Sample) -> Estimate:
    found = _projections(sae, rows)
    if found is None:
        return Estimate(math.nan, reason="undefined: the rows are all the same, or no decoder row has a length")
    value = float(np.quantile(found, 1 - QUARTER))
    if sample.weights is None:
        return Estimate(value, reason=sample.reason)
    left_out = [
        np.quantile(np.concatenate([found[:start], found[end:]]), 1 - QUARTER) for start, end in pairwise(edges)
    ]
    return sample.estimate(value, np.array(left_out))


def _projections(sae: SAE, rows: Tensor) -> np.ndarray | None:
    """Return all projections ``[n, latents]``; None where they are not defined."""
    with torch.no_grad():
        u = sae.scaling.apply(rows.to(sae.device, sae.dtype))[0].float()
        u = u - u.mean(0)
        length = u.square().sum(1).mean().sqrt()
        W = sae.W_dec.detach().float()
        if len(W) > MOST_LATENTS:
            W = W[torch.linspace(0, len(W) - 1, MOST_LATENTS).round().long().to(W.device)]
        norms = W.norm(dim=1)
        W = W[norms > 0] / norms[norms > 0, None]
        if not len(W) or not float(length) > 0:
            return None
        found = kernels.matmul(u / length, W.T)
        return (found.abs_() if sae.has_signs else found).cpu().numpy()
