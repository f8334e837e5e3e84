"""Intervals by resampling documents.

The tokens of one document are not independent, so whole documents are drawn with replacement. Sufficient statistics
are kept per *group* of documents; a resample is a vector of group counts, and all resamples of a sum are one product of
matrices. All estimates that share a `DocumentBootstrap` share its draws, so a difference of two is a paired one.

References
----------
Efron & Tibshirani (1993), *An Introduction to the Bootstrap*: jackknife (chapter 11); Davison & Hinkley
(1997), *Bootstrap Methods and their Application*: basic interval (section 2.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .results import Measured

N_GROUPS = 509
"""Documents are put into at most this many groups (document id modulo a prime): bounded memory, still many clusters."""

LEVEL = 0.95
DRAWS = 1000

BLOCK_ROWS = 64
"""Rows without a document are resampled in runs of this many."""

NORMAL = 1.959964
"""97.5 % point of the normal distribution."""


def row_groups(
    document: Tensor | None, first_row: int, n_rows: int, block_rows: int = BLOCK_ROWS
) -> tuple[Tensor, bool]:
    """Return the group of each row: from its document, or from its position where no document is known.

    Parameters
    ----------
    document
        ``int64 [n_rows]`` document ids, negative where unknown; or None.
    first_row
        Number of rows before this batch, so that any batching gives the same groups.
    n_rows
        Rows in this batch.
    block_rows
        Rows without a document are grouped by runs of this many consecutive rows.

    Returns
    -------
    groups, by_document
        ``int64 [n_rows]`` in ``[0, N_GROUPS)``; whether every row had a document.
    """
    device = None if document is None else document.device
    place = torch.arange(first_row, first_row + n_rows, device=device) // block_rows
    if document is None:
        return place.remainder(N_GROUPS), False
    known = document >= 0
    return torch.where(known, document.long(), place).remainder(N_GROUPS), bool(known.all())


@dataclass(frozen=True)
class Estimate:
    """A value with what its resamples gave.

    Parameters
    ----------
    value
        The estimate on all documents.
    draws
        ``float64 [n_draws]`` values on the resamples, or None where there is no interval.
    reason
        As in `Measured`.
    ends
        An interval from elsewhere than the draws.
    """

    value: float
    draws: np.ndarray | None = None
    reason: str | None = None
    ends: tuple[float, float] | None = None

    def measured(
        self, unit: str, level: float = LEVEL, *, least: float | None = None, most: float | None = None
    ) -> Measured:
        """Return the estimate with the basic bootstrap interval of its draws, cut at the range of the quantity."""
        ends = self.ends
        if ends is None and self.draws is not None and not math.isnan(self.value):
            ends = basic_interval(self.value, self.draws, level)
        if ends is None:
            return Measured(self.value, None, None, unit, self.reason)
        low = ends[0] if least is None else max(ends[0], least)
        high = ends[1] if most is None else min(ends[1], most)
        return Measured(self.value, low, high, unit, self.reason)

    def minus(self, other: Estimate) -> Estimate:
        """Return the difference of two estimates over the same resamples (paired)."""
        draws = None if self.draws is None or other.draws is None else self.draws - other.draws
        reason = self.reason or other.reason
        if draws is None and reason is None:
            reason = "one side has no resamples"
        return Estimate(self.value - other.value, draws, reason)


@dataclass(frozen=True)
class DocumentBootstrap:
    """Resamples of the groups that hold rows.

    Parameters
    ----------
    weights
        ``float64 [n_draws, n_groups]``: how often each group is drawn; None with fewer than two groups.
    reason
        Carried into every estimate: why there is no interval, or what stands in for documents.
    """

    weights: np.ndarray | None
    reason: str | None = None

    @classmethod
    def over(
        cls, rows_per_group: np.ndarray, *, draws: int = DRAWS, seed: int = 0, reason: str | None = None
    ) -> DocumentBootstrap:
        """Resamples of the groups with at least one row, from a generator of its own seeded by `seed`.

        Parameters
        ----------
        rows_per_group
            ``[n_groups]`` row counts; groups without rows are never drawn.
        draws
            Number of resamples.
        seed
            The same seed over the same groups gives the same resamples.
        reason
            Stated with every interval.
        """
        present = np.flatnonzero(np.asarray(rows_per_group) > 0)
        if len(present) < 2 or draws < 1:
            return cls(None, "no interval: it needs at least 2 documents" if draws >= 1 else "no interval asked for")
        generator = np.random.Generator(np.random.PCG64(seed))
        counts = generator.multinomial(len(present), np.full(len(present), 1 / len(present)), size=draws)
        weights = np.zeros((draws, len(rows_per_group)))
        weights[:, present] = counts
        return cls(weights, reason)

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray, *, undefined: str = "0 / 0") -> Estimate:
        """``sum(numerator) / sum(denominator)`` over groups, and the same on every resample."""
        draws = None
        if self.weights is not None:
            draws = _divide(self.weights @ numerator, self.weights @ denominator)
        return self.estimate(float(_divide(numerator.sum(), denominator.sum())), draws, undefined=undefined)

    def estimate(self, value: float, draws: np.ndarray | None, *, undefined: str = "0 / 0") -> Estimate:
        """Return an estimate from a value and its draws; says so where either is not defined."""
        if not math.isfinite(value):
            return Estimate(math.nan, None, f"undefined: {undefined}")
        if draws is not None and not np.isfinite(draws).all():
            return Estimate(value, None, f"no interval: undefined in some resamples ({undefined})")
        return Estimate(value, draws, self.reason)


def wilson_interval(count: int, n: int) -> Measured:
    """Return the fraction ``count / n`` of latents with its Wilson score interval, which also holds at 0 and 1."""
    p, z2 = count / n, NORMAL**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Measured(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), "fraction", "over latents")


def basic_interval(value: float, draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Return the basic (pivotal) bootstrap interval: `value` minus the quantiles of the error ``draws - value``.

    A resample of documents is less diverse than the documents themselves, so ratios to a variance come out too large
    in every resample. The percentile interval would add that error to the one that the value already has; this one
    takes it away. With 20 to 50 documents it covers the true fvu 93 to 96 times in 100, the other 45 to 86 times.

    >>> basic_interval(50.0, np.arange(101.0), level=0.5)
    (25.0, 75.0)
    """
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(2 * value - high), float(2 * value - low)


def bootstrap_mean(
    values: np.ndarray, *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL, unit: str = ""
) -> Measured:
    """Mean of independent values with its basic bootstrap interval.

    Parameters
    ----------
    values
        ``[n]`` numbers, one per independent unit (document, seed, data set).
    draws, seed, level
        Number of resamples, seed of their generator, coverage of the interval.
    """
    values = np.asarray(values, dtype=np.float64)
    resamples = DocumentBootstrap.over(np.ones(len(values)), draws=draws, seed=seed)
    return resamples.ratio(values, np.ones(len(values))).measured(unit, level)


def _divide(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """Division that gives NaN or infinity without a warning; the caller states what is undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(numerator, denominator)
