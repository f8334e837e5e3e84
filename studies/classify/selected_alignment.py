"""Are the latents that a classifier relies on those that other seeds find too?

*Alignment* is the mean cosine of a latent with its partners in other seeds, as in `saekit.compare`, here of decoder
rows alone; *stability* is the fraction of other seeds that have the latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saekit.errors import ConfigError, DataError
from saekit.matching.matching import match_latents
from saekit.measure.results import Measured, to_plain
from saekit.sae.model import SAE


@dataclass(frozen=True)
class SelectedAlignment:
    """Mean alignment of selected latents compared with latents that are active as often."""

    n_selected: int
    selected: Measured
    """Mean over the selected latents."""
    matched: Measured
    """Mean over random latents of nearly the same density; the interval holds 95 % of the draws."""
    difference: Measured
    """Selected minus matched; the interval is that of the draws."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {name: to_plain(getattr(self, name)) for name in self.__dataclass_fields__}


def decoder_alignment(sae: SAE, others: Sequence[SAE]) -> np.ndarray:
    """Return per latent the mean cosine of its decoder row with its partner in each other SAE, ``[n_latents]``.

    Partners come from the one-to-one matching with the largest sum of cosines; a latent without one counts 0.

    Raises
    ------
    ConfigError
        No other SAE.
    """
    if not others:
        raise ConfigError("alignment: at least one other SAE must be given; got none. Train another seed.")
    found = np.zeros((len(others), sae.n_latents))
    for row, other in zip(found, others):
        row[:] = np.nan_to_num(match_latents(sae.W_dec, other.W_dec).cosine.double().cpu().numpy())
    return found.mean(0)


def selected_alignment(
    selected: Sequence[int],
    alignment: np.ndarray,
    density: np.ndarray,
    *,
    near: int = 16,
    draws: int = 2000,
    seed: int = 0,
    unit: str = "cosine",
) -> SelectedAlignment:
    """Compare the alignment of selected latents with that of others that are active as often.

    A draw replaces every selected latent by one of the `near` unselected latents whose density is nearest, so that
    what selection adds is told apart from what density alone explains.

    Parameters
    ----------
    selected
        Indices of the latents.
    alignment, density
        ``[n_latents]`` of every latent: see `decoder_alignment`; the fraction of documents where it is active.
    near
        Candidates for each selected latent.
    draws, seed
        Number of draws, and seed of their generator.
    unit
        Unit of `alignment`.

    Raises
    ------
    DataError
        Nothing selected, everything selected, or lengths that differ.
    """
    chosen = np.unique(np.asarray(selected, dtype=np.int64))
    alignment, density = np.asarray(alignment, dtype=float), np.asarray(density, dtype=float)
    others = np.setdiff1d(np.arange(len(alignment)), chosen)
    if not len(chosen) or not len(others) or len(alignment) != len(density) or chosen.max() >= len(alignment):
        raise DataError(
            f"selected latents must be some of the {len(alignment)} latents, with a density each; got "
            f"{len(chosen)} selected and {len(density)} densities."
        )
    gaps = np.abs(density[others][None, :] - density[chosen][:, None])
    nearest = others[np.argsort(gaps, axis=1, kind="stable")[:, :near]]
    generator = np.random.Generator(np.random.PCG64(seed))
    picks = generator.integers(0, nearest.shape[1], size=(draws, len(chosen)))
    null = alignment[nearest[np.arange(len(chosen)), picks]].mean(1)
    value, middle = float(alignment[chosen].mean()), float(null.mean())
    low, high = (float(q) for q in np.quantile(null, [0.025, 0.975]))
    over = "interval over density-matched draws"
    return SelectedAlignment(
        len(chosen),
        Measured(value, None, None, unit, "no interval: the latents are those that were selected"),
        Measured(middle, low, high, unit, over),
        Measured(value - middle, value - high, value - low, unit, over),
    )
