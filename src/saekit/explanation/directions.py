"""Controls of an edit: the same change of codes, at the same tokens and of the same norm, in other directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..measure.normal_equations import column_factors
from ..randomness import random_order
from ..sae.model import SAE


def with_directions(sae: SAE, latents: Sequence[int], directions: Tensor) -> SAE:
    """Return an SAE whose `latents` write other directions, with the norms that theirs have in the rows.

    Its codes are those of `sae`, so an edit that keeps the error is as large, and at the same tokens.

    Parameters
    ----------
    sae
        An SAE.
    latents
        Latents that an edit changes.
    directions
        ``[len(latents), d]`` in the units of the rows; their lengths do not matter.

    Raises
    ------
    DataError
        A direction of length 0 for a latent that writes something.
    """
    index = torch.as_tensor(list(latents), device=sae.device)
    factors = column_factors(sae)
    wanted = (sae.W_dec[index] * factors).norm(dim=1)
    directions = directions.to(sae.W_dec)
    norms = directions.norm(dim=1)
    if bool(((norms == 0) & (wanted > 0)).any()):
        raise DataError("the direction of a control must not be of length 0; the decoder row of a latent is.")
    W_dec = sae.W_dec.clone()
    scale = wanted / torch.where(norms > 0, norms, torch.ones_like(norms))
    W_dec[index] = directions * scale[:, None] / factors
    return sae.replace(W_dec=W_dec)


def written_rows(sae: SAE, latents: Sequence[int] | np.ndarray) -> Tensor:
    """Return what one unit of each of some latents writes, ``[len(latents), d]`` in the units of the rows."""
    return sae.W_dec[torch.as_tensor(np.asarray(latents, np.int64), device=sae.device)] * column_factors(sae)


def other_latents(
    sae: SAE, latents: Sequence[int], count: int, seed: int, density: np.ndarray | None = None
) -> np.ndarray:
    """Return latents to compare some with, in random order; with `density`, those about as dense as the first.

    Latents that write nothing, or never fire, are left out. With `density` the candidates are the ``4 count`` latents
    whose density is nearest on a log scale.
    """
    usable = (sae.W_dec.norm(dim=1) > 0).cpu().numpy()
    usable[list(latents)] = False
    latent = latents[0]
    if density is not None:
        usable &= density > 0
    candidates = np.flatnonzero(usable)
    if density is not None and density[latent] > 0:
        distance = np.abs(np.log(density[candidates]) - np.log(density[latent]))
        candidates = np.sort(candidates[np.argsort(distance, kind="stable")[: 4 * count]])
    return candidates[random_order(len(candidates), "other latents", seed, latent)[:count]]


def covariance_directions(rows: Tensor, count: int, seed: int) -> Tensor:
    """Draw directions from the covariance of rows, ``[count, d]`` of length 1: ``g X`` with g standard normal.

    A random mixture of centred rows has exactly the covariance of the rows; directions that the rows do not use, which
    a model hardly reads, come up as seldom as in the rows. Isotropic directions would be a weaker control.
    """
    centred = rows.double() - rows.double().mean(0)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, len(rows), generator=generator, dtype=torch.float64) @ centred.cpu()
    return drawn / drawn.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
