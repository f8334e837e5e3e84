"""How many bits the codes of a row cost: the description length of an SAE as a lossy code.

References
----------
Ayonrinde, Pearce & Sharkey (2024), *Interpretability as Compression*, 2410.11179.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..sae.codes import Codes
from .accumulators import double
from .token_statistics import TOKEN_BITS, PairSums

PRECISION = 3
"""Bits of relative precision by default: a code is kept to 8 levels per octave, within 4.5 % of its value."""

_MIDDLE = 2 ** (TOKEN_BITS - 1)


class DescriptionLength:
    """Accumulates what codes cost in bits: ``update``, ``merge``, ``compute``.

    Every latent has its own code for whether it fires and for how strongly:
    ``DL = sum_f [H_b(p_f) + p_f H(hist_f)]`` bits per row, with p_f the fraction of rows on which latent f fires, H_b
    the entropy of that choice, and hist_f the histogram of its activations. The bins come from the data, whatever its
    units: activations are quantized on a logarithmic scale, ``floor(2**precision * log2(z))``, so each is known to a
    fraction of its own size; a code twice as large costs the same. Codes of either sign have bins of their own. The
    decoder itself is not counted: over many rows it
    costs nothing.

    Parameters
    ----------
    n_latents
        Width of the codes.
    precision
        Levels per octave, as a power of two, from 0 to 12.

    Raises
    ------
    ConfigError
        `precision` is out of range.
    """

    def __init__(self, n_latents: int, precision: int = PRECISION) -> None:
        if not 0 <= precision <= 12:
            raise ConfigError(f"DescriptionLength: `precision` must be within 0..12 bits; got {precision}.")
        self.n_latents = n_latents
        self.precision = precision
        self._bins = PairSums(1)
        self._n_rows = 0

    def update(self, codes: Codes) -> None:
        """Add codes.

        Raises
        ------
        ShapeError
            The codes have another width.
        DataError
            An activation that is zero or not finite.
        """
        if codes.n_latents != self.n_latents:
            raise ShapeError(f"codes must have {self.n_latents} latents; they have {codes.n_latents}.")
        z = double(codes.values).cpu().numpy()
        if not ((z != 0) & np.isfinite(z)).all():
            raise DataError("codes must be finite and not zero; they are not. Check the weights of the SAE.")
        level = np.floor(2**self.precision * np.log2(np.abs(z))).astype(np.int64) + _MIDDLE // 2
        level += np.where(z < 0, _MIDDLE, 0)
        keys = (codes.indices.cpu().numpy() << TOKEN_BITS) | level
        self._bins.add(keys, np.ones((len(keys), 1)))
        self._n_rows += codes.n_rows

    def merge(self, other: DescriptionLength) -> None:
        """Add what `other`, of the same width and precision, saw."""
        self._bins.merge(other._bins)
        self._n_rows += other._n_rows

    def by_latent(self) -> Tensor:
        """Bits per row of every latent, ``float64 [n_latents]``; 0 for one that never or always does the same.

        Raises
        ------
        DataError
            No row was added.
        """
        if not self._n_rows:
            raise DataError("a description length needs at least one row; none was added. Is the data empty?")
        keys, sums = self._bins.pairs()
        latent, count = keys >> TOKEN_BITS, sums[:, 0]
        fires = np.bincount(latent, count, self.n_latents)
        # p H(hist) = -(1/N) sum_b n_b log2(n_b / n)
        strength = np.bincount(latent, count * np.log2(fires[latent] / count), self.n_latents) / self._n_rows
        p = fires / self._n_rows
        return torch.from_numpy(_plogp(p) + _plogp(1 - p) + strength)

    def compute(self) -> float:
        """Bits per row of all latents together; raises as `by_latent`."""
        return float(self.by_latent().sum())


def _plogp(p: np.ndarray) -> np.ndarray:
    """``-p log2 p``, 0 at 0."""
    return -p * np.log2(np.where(p > 0, p, 1.0))
